"""Steps that were prepared for inputs of one size, and whether they are still right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import inference_conv
from .guards import ModulesGuard
from .places import Places
from .weight_cache import fingerprint

MOST_SIZES = 4  # inputs of so many sizes are kept: for each plan, container or served model


class Kept(NamedTuple):
    """Steps, and all that they were made from.

    modules, places: what they depend on beside weights.
    tensors, fingerprint: the weights, and their fingerprint from before they were read.
    """

    steps: list[Callable]
    modules: ModulesGuard
    places: Places
    tensors: list[Tensor]
    fingerprint: tuple

    def passes(self) -> bool:
        """Whether nothing that the steps were made from has changed."""
        return (
            self.modules.passes()
            and self.places.passes()
            and fingerprint(self.tensors) == self.fingerprint
        )


def size_of(x: Tensor, residual: Tensor | None = None) -> tuple:
    """All but weights that steps for an input depend on."""
    other = None if residual is None else (residual.shape, residual.stride(), residual.dtype)
    size = x.shape, x.stride(), x.dtype, other
    return *size, torch.get_num_threads(), *inference_conv.state()


def keep(sizes: dict[tuple, Kept], size: tuple, kept: Kept) -> None:
    """Adds to ``sizes``; the oldest gives way."""
    while len(sizes) >= MOST_SIZES:
        sizes.pop(next(iter(tuple(sizes)), None), None)
    sizes[size] = kept
