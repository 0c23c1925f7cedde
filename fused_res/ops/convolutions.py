"""Native convolutions on a CPU, one after the other without a return to Python.

Each is direct (``ops/direct.py``) or Winograd's (``ops/winograd.py``), with BatchNorm in its
weight and with residual and ReLU in its epilogue. In a network an op's call takes 20 us: between
two calls the network's weights push the interpreter's code and data out of the caches. So one call
runs all convolutions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import ACTS, Act
from . import library

# program has for each convolution: Winograd's tile, or 0 for a direct one; channels out; act, an
# index in reference.ACTS; the residual's role, an index in RESIDUALS; the number of sizes, then
# the sizes. Winograd's: padding (2). A direct one's: input channels, kernel, stride, padding and
# dilation (1 + 2 + 2 + 2 + 2), then the same of the convolution of the residual, if there is one.
library.define(
    "convolutions(Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] biases, int[] program) "
    "-> Tensor"
)
RESIDUALS = "none", "add", "concat", "convolve"


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class Convolutions(NamedTuple):
    """``(x, residual) -> y`` of the packed ``weights``."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    program: list[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            residual = nhwc(residual)
        return torch.ops.fused_res.convolutions.default(nhwc(x), residual, *self)


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    tile: int,
    out_channels: int,
    act: Act,
    residual: str,
    sizes: Sequence[int],
) -> Convolutions:
    """One convolution; the arguments are those of ``program`` above."""
    numbers = tile, out_channels, ACTS.index(act), RESIDUALS.index(residual), len(sizes), *sizes
    return Convolutions([weight], [bias], list(numbers))


def joined(steps: Sequence[Convolutions]) -> Convolutions:
    """The steps one after the other, all with one residual."""
    lists = zip(*steps, strict=True)
    return Convolutions(*([one for each in of for one in each] for of in lists))
