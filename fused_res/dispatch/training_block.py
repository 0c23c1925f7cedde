"""Chooses what runs a residual block in training: PyTorch's ops, or one op for the whole block.

On a CPU rules decide (``cpu_rules``). On a GPU a measurement of the whole block, forward and
backward, does (``first_use``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
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
    "triton": Candidate("triton", training_conv.TIMED),
    "triton 1x1": Candidate("triton", training_conv.POINTWISE),
    "triton convolutions": Candidate("triton", training_conv.ALL),
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


class Trial:
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


_recorded: dict[tuple, Trial] | None = None


@contextlib.contextmanager
def recording() -> Iterator[dict[tuple, Trial]]:
    """Collects a trial of each distinct block that runs in one call in the body."""
    global _recorded
    _recorded = found = {}
    try:
        yield found
    finally:
        _recorded = None


def record(call: Call) -> None:
    """Keeps a trial of the call while a model's blocks are recorded."""
    if _recorded is not None:
        _recorded.setdefault(_key_of(call), Trial(call))


def measure(key: tuple, trial: Trial) -> tuple[Row, str] | None:
    """Measures all candidates for a recorded block: the row that was kept, and the candidate that
    ``auto`` takes by it. None where there is no candidate, or the block cannot run."""
    device, row = key[1].device, row_of(*key[1:])
    found = first_use.measure(device, row, trial, trial.names) if trial.names else None
    return None if found is None else (user_timings.find(device, row), found.name)


def _key_of(call: Call) -> tuple:
    block = training_conv.block_of(call.x, call.branch, call.shortcut)
    return OP, block, call.act, call.recompute


def convolutions_of_triton(call: Call, otherwise: str) -> str:
    """The convolutions that fused kernels run where Triton runs the block, one of
    ``training_conv.KINDS``: by the user's timings of the block, or ``otherwise``."""
    _, *of = _key_of(call)
    return _fastest_of_triton(*of, inference_conv.state()[0]) or otherwise


@functools.lru_cache(maxsize=shipped_timings.MOST_SHAPES)
def _fastest_of_triton(
    block: training_conv.Block, act: Act, recompute: bool, forgotten: int
) -> str | None:
    mine = user_timings.find(block.device, row_of(block, act, recompute))
    names = [n for n, c in CANDIDATES.items() if c.backend == "triton" and mine and n in mine.ms]
    if not names:
        return None
    return CANDIDATES[min(names, key=mine.ms.__getitem__)].convolutions


def timed_row(call: Call) -> Row | None:
    """The user's timing of a block."""
    return user_timings.find(call.x.device, row_of(*_key_of(call)[1:]))


def choose(call: Call) -> first_use.Verdict:
    """The candidate that ``auto`` takes for a block on a GPU; ``eager``: PyTorch's ops."""
    key = _key_of(call)
    return first_use.decide(key, call.x.device, lambda: row_of(*key[1:]), lambda: Trial(call))
