"""Chooses what runs a residual block in training: PyTorch's ops, or one op for the whole block.

On a CPU rules decide (``cpu_rules``). On a GPU a measurement of the whole block, forward and
backward, does (``first_use``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Act, ConvNorm, Shortcut
from . import (
    backends,
    first_use,
    inference_conv,
    samples,
    shipped_timings,
    training_conv,
    user_timings,
)
from .shipped_timings import Row

OP = "block_train"


class Candidate(NamedTuple):
    """convolutions: those that fused kernels run, of ``training_conv.KINDS``."""

    backend: str
    convolutions: str = ""


# ``cuda`` and ``triton`` run all convolutions in cuDNN, but for those that ``tune`` found faster in
# a fused kernel. 3x3 convolutions in Triton lose to cuDNN from about 128 channels on.
CANDIDATES = {
    "cpu": Candidate("cpu"),
    "cuda": Candidate("cuda"),
    "triton": Candidate("triton", "measured"),
    "triton 1x1": Candidate("triton", "1x1"),
    "triton convolutions": Candidate("triton", "all"),
}


class Call(NamedTuple):
    """The arguments of ``res_block``."""

    x: Tensor
    branch: list[ConvNorm]
    shortcut: Shortcut
    act: Act
    recompute: bool


Runner = Callable[[Call, Candidate | None], Tensor]
_runner: Runner | None = None


def register(runner: Runner) -> None:
    """Registers the function that runs a call by a candidate; None: PyTorch's ops."""
    global _runner
    _runner = runner


def row_of(block: training_conv.Block, act: Act, recompute: bool) -> Row:
    """The timing row of a block, without milliseconds."""
    stages = []
    for weight, *sizes, groups, trains in block.stages:
        words = f"{weight[0]}: {inference_conv._sizes(weight, *sizes, groups)}"
        stages.append(words if trains else f"{words}, frozen norm")
    like = "; ".join(stages)
    if block.shortcut:
        like += " (shortcut)"
    elif block.add:
        like += "; x"
    if recompute:
        like += "; recompute"
    if block.dtype == torch.float32 and block.device.type != "cpu":
        like += "; tf32" if block.tf32 else "; no tf32"
    dtype = str(block.dtype).removeprefix("torch.")
    layout = "channels_last" if block.channels_last else "NCHW"
    shape = *block.shape, block.stages[-1][0][0]
    return Row("", "", OP, dtype, layout, shape, {}, f"{like}; {act}")


def able(x: Tensor) -> list[str]:
    """The candidates that can run blocks on tensors like x."""
    of = x.device.type, x.dtype
    return [
        name
        for name, candidate in CANDIDATES.items()
        if backends.why_not("bn_act", candidate.backend, *of) is None
    ]


class _Trial:
    """A ``first_use.Trial`` of a block."""

    def __init__(self, call: Call) -> None:
        self.names = able(call.x)
        # Triton compiles each kernel for seconds; the CUDA library is compiled.
        self.quick = [n for n in ("cpu", "cuda", "triton") if n in self.names][:1]
        self._call, self._device = call._replace(x=samples.meta_like(call.x)), call.x.device

    def sample(self, seed: int, images: int | None = None) -> Call:
        call, of = self._call, samples.generator(self._device, seed)
        x = samples.normal(call.x if images is None else call.x[:images], of)
        branch = [samples.stage(stage, of) for stage in call.branch]
        shortcut = samples.stage(call.shortcut, of) if call.shortcut else call.shortcut
        return call._replace(x=x, branch=branch, shortcut=shortcut)

    def cast(self, sample: Call, dtype: torch.dtype) -> Call:
        return samples.cast(sample, dtype)

    def run(self, name: str, sample: Call) -> first_use.Results:
        """The output, the running statistics, and the gradients of the input, the weights and the
        norms."""

        def trained(stage: ConvNorm) -> ConvNorm:
            weight, norm = samples.leaf(stage.weight), samples.trained(stage.norm)
            return stage._replace(weight=weight, norm=norm)

        x, branch = samples.leaf(sample.x), [*map(trained, sample.branch)]
        shortcut = trained(sample.shortcut) if sample.shortcut else sample.shortcut
        stages = [*branch, shortcut] if shortcut else branch
        call = sample._replace(x=x, branch=branch, shortcut=shortcut)
        y = _runner(call, None if name == "eager" else CANDIDATES[name])
        weights, norms = [of.weight for of in stages], [of.norm for of in stages]
        affine = [t for norm in norms for t in norm[2:4] if t is not None]
        dy = samples.gradient_of(y, self._call.x.dtype, 1)
        dx, *rest = torch.autograd.grad(y, [x, *weights, *affine], dy)
        return {
            "y": [y.detach()],
            "running statistics": samples.updated(norms),
            "dx": [dx],
            "gradients of weights": rest[: len(weights)],
            "gradients of norms": rest[len(weights) :],
        }


def convolutions_of_triton(call: Call) -> str:
    """The convolutions that fused kernels run where ``triton`` is named, as ``training_conv.KINDS``
    has them: by the user's timings of the block; all that they can where there are none."""
    block = training_conv.block_of(call.x, call.branch, call.shortcut)
    return _fastest_of_triton(block, call.act, call.recompute, inference_conv.state()[0])


@functools.lru_cache(maxsize=shipped_timings.MOST_SHAPES)
def _fastest_of_triton(
    block: training_conv.Block, act: Act, recompute: bool, forgotten: int
) -> str:
    mine = user_timings.find(block.device, row_of(block, act, recompute))
    names = [n for n, c in CANDIDATES.items() if c.backend == "triton" and mine and n in mine.ms]
    if not names:
        return training_conv.ALL
    return CANDIDATES[min(names, key=mine.ms.__getitem__)].convolutions


def choose(call: Call) -> first_use.Verdict:
    """The candidate that ``auto`` takes for a block on a GPU; ``eager``: PyTorch's ops."""
    block = training_conv.block_of(call.x, call.branch, call.shortcut)
    key = OP, block, call.act, call.recompute

    def row() -> Row:
        return row_of(block, call.act, call.recompute)

    return first_use.decide(key, call.x.device, row, lambda: _Trial(call))
