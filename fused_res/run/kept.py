"""Steps that were prepared for inputs of one size, and whether they are still valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import inference_conv
from .guards import ChildrenGuard, ModulesGuard
from .places import Places
from .weight_cache import fingerprint

MOST_SIZES = 4  # for each plan, container or served model


class Kept(NamedTuple):
    """Steps, and everything that they were made from.

    modules, places: the guard of the modules, and the places that their forwards read.
    tensors, fingerprint: the weights, and their fingerprint from before they were read.
    """

    steps: list[Callable]
    modules: ModulesGuard | ChildrenGuard
    places: Places
    tensors: list[Tensor]
    fingerprint: tuple

    def passes(self, root: nn.Module) -> bool:
        """Whether everything in ``root`` that the steps were made from is unchanged."""
        return (
            self.modules.passes(root)
            and self.places.passes()
            and fingerprint(self.tensors) == self.fingerprint
        )


def size_of(x: Tensor, residual: Tensor | None = None) -> tuple:
    """The key of steps: the input's shape, strides and dtype, threads and dispatch settings."""
    other = None if residual is None else (residual.shape, residual.stride(), residual.dtype)
    size = x.shape, x.stride(), x.dtype, other
    return *size, torch.get_num_threads(), *inference_conv.state()


def keep(sizes: dict[tuple, Kept], size: tuple, kept: Kept) -> None:
    """Adds an entry to ``sizes``; removes the oldest where there are too many."""
    while len(sizes) >= MOST_SIZES:
        sizes.pop(next(iter(tuple(sizes)), None), None)
    sizes[size] = kept
