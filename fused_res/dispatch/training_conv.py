"""Chooses the kernel of each convolution of a block in training, forward and backward.

The candidates are ATen's convolution (cuDNN), fused kernels in Triton, and for few channels a fused
kernel in CUDA C++ (``conv_halo``). In order of precedence these decide: the user's timing of
exactly this convolution on this device (``user_timings``, made by ``fused_res.tune(...,
train=True)``); the package's timings near its shape (``shipped_timings``); without any it is ATen.
``eager`` in a timing row is ATen's convolution with the passes over memory that a fused kernel
saves. ``training_block`` says for which blocks all of this is asked, and where Triton runs every
convolution that it can, or those of 1x1, instead. Nothing is timed here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import ConvNorm, Shortcut
from . import backends, inference_conv, shipped_timings, user_timings
from .shipped_timings import Row

OP = "training_convolution"
# The convolutions of a block that fused kernels run: those for which timings say so, those of 1x1,
# or all that they can.
TIMED, POINTWISE, ALL = KINDS = "timed", "1x1", "all"
# The numbers of kernels/res_block.py. TRITON + 1 + i is Triton in its i-th configuration.
HALO, ATEN, TRITON = -1, 0, 1
# Epilogues. Forward: the statistics of the BatchNorm after the convolution. Backward, on the
# gradient of its input: the ReLU and BatchNorm before it, or the sum with the gradient from the
# block's other path.
STATISTICS, FROZEN = "statistics", "frozen norm"
RELU, FROZEN_RELU, ADD, ADD_IN_PLACE = "relu and sums", "relu", "add", "add in place"


class Call(NamedTuple):
    """A convolution of a block, one way: everything that its candidate depends on.

    epilogue: the work that a fused kernel does in the same pass; empty: none.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the convolution's input
    channels_last: bool
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    tf32: bool
    backward: bool
    epilogue: str


class Block(NamedTuple):
    """Everything that the candidates for a block depend on.

    stages: for each the weight's shape, the convolution's numbers and whether its BatchNorm trains.
    shortcut: whether the last stage is the shortcut's.
    add: whether the block adds anything to the branch.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool
    stages: tuple[tuple, ...]
    shortcut: bool
    add: bool
    tf32: bool


def block_of(x: Tensor, branch: list[ConvNorm], shortcut: Shortcut) -> Block:
    return Block(
        x.device,
        x.dtype,
        tuple(x.shape),
        x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else False,
        tuple(
            (tuple(c.weight.shape), *map(tuple, c[2:5]), c.groups, c.norm.training)
            for c in ([*branch, shortcut] if shortcut else branch)
        ),
        bool(shortcut),
        shortcut is not False,
        x.dtype is torch.float32 and inference_conv.allows_tf32(),
    )


def calls(block: Block) -> list[Call]:
    """Two calls for each stage, forward and backward; none where a convolution does not fit its
    input."""
    of_block = block.device, block.dtype
    found, shape = [], block.shape
    for i, (weight, stride, padding, dilation, groups, training) in enumerate(block.stages):
        is_shortcut = block.shortcut and i + 1 == len(block.stages)
        shape = block.shape if is_shortcut else shape
        if len(weight) != 4 or len(shape) != 4 or min(*shape, *weight, *stride) < 1:
            return []
        if is_shortcut:
            epilogue = ADD_IN_PLACE
        elif i > 0:
            epilogue = RELU if block.stages[i - 1][-1] else FROZEN_RELU
        else:
            epilogue = ADD if block.add and not block.shortcut else ""
        conv = shape, block.channels_last, weight, stride, padding, dilation, groups, block.tf32
        found.append(Call(*of_block, *conv, False, STATISTICS if training else FROZEN))
        found.append(Call(*of_block, *conv, True, epilogue))
        numbers = zip(shape[2:], weight[2:], stride, padding, dilation, strict=True)
        image = [(n + 2 * pad - d * (taps - 1) - 1) // s + 1 for n, taps, s, pad, d in numbers]
        shape = (shape[0], weight[0], *image)
    return found


def name_of(candidate: int) -> str:
    """The name of a candidate in timing rows."""
    return {HALO: "conv_halo", ATEN: "eager"}.get(candidate, "triton")


def config_of(candidate: int):
    """Triton's configuration; None: Triton guesses the best one, or does not run the candidate."""
    from ..kernels.conv_tiles import CONFIGS

    return CONFIGS[candidate - TRITON - 1] if candidate > TRITON else None


def trains(call: Call) -> bool | None:
    """Whether the BatchNorm in the epilogue of a call trains; None: there is no BatchNorm."""
    return {STATISTICS: True, RELU: True, FROZEN: False, FROZEN_RELU: False}.get(call.epilogue)


def row_of(call: Call, ms: dict[str, float], config: dict | None = None) -> Row:
    """The timing row of a call, without a device."""
    like = f"{inference_conv._sizes(*call[4:9])}, {'backward' if call.backward else 'forward'}"
    if call.epilogue:
        like += f", {call.epilogue}"
    if call.dtype == torch.float32:
        like += ", tf32" if call.tf32 else ", no tf32"
    return inference_conv.row_like(like, OP, call, ms, config)


def tensors_of(call: Call, device: torch.device | str) -> tuple[Tensor, ConvNorm]:
    """The convolution's input and the convolution, with uninitialised tensors."""
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    x, weight = (
        torch.empty(shape, dtype=call.dtype, device=device, memory_format=layout)
        for shape in (call.shape, call.weight)
    )
    return x, ConvNorm(weight, None, *call[5:9], None)


@functools.lru_cache(maxsize=shipped_timings.MOST_SHAPES)
def _choose(call: Call, kind: str, forgotten: int) -> int:
    """``forgotten``: counts changes of the tables, after which every call is decided anew."""
    from ..kernels import conv_tiles, training_convolution

    row, config, candidate = row_of(call, {}), None, ATEN
    reason = training_convolution.why_not(*tensors_of(call, "meta"))
    if reason is None and kind == POINTWISE and call.weight[2:] != (1, 1):
        reason = "it is no 1x1 convolution"
    elif reason is None and kind != TIMED:
        candidate, reason = TRITON, f"the block runs them in fused kernels: {kind}"
    elif reason is None:
        mine = user_timings.find(call.device, row)
        if mine is not None and mine.ms.keys() >= {"eager", "triton"}:
            name, config = inference_conv.taken(mine), mine.config
            ms = mine.ms["triton" if name == "eager" else name]
            reason = f"tuned: {ms:.3g} ms, {mine.ms['eager'] / ms:.2f}x PyTorch"
        else:
            device = shipped_timings.device_of(call.device.type, call.device.index)
            of = row.dtype, row.layout, row.shape
            fused = "triton", "conv_halo"
            name, reason, config = shipped_timings.verdict(OP, device, *of, fused, row.like)
        if name == "conv_halo":
            candidate = HALO
        elif name == "triton":
            fields = [c._asdict() for c in conv_tiles.CONFIGS]
            candidate = TRITON + (1 + fields.index(config) if config in fields else 0)
    runs = "ATen's convolution" if candidate == ATEN else "a fused kernel"
    backends.say(f"{OP} {inference_conv.words(row)} runs {runs}: {reason}")
    if kind == TIMED or (kind == POINTWISE and call.weight[2:] != (1, 1)):
        return candidate
    return TRITON  # which checks again: the layouts inside the block are known when it runs


_recorded: dict[Call, None] | None = None


@contextlib.contextmanager
def recording() -> Iterator[dict[Call, None]]:
    """Collects the distinct calls that fused kernels can run, in blocks that run on Triton in the
    body. ATen runs them there."""
    global _recorded
    _recorded = found = {}
    try:
        yield found
    finally:
        _recorded = None


def _record(block: Block) -> list[int]:
    from ..kernels import training_convolution

    for call in calls(block):
        if training_convolution.why_not(*tensors_of(call, "meta")) is None:
            _recorded.setdefault(call)
    return [ATEN] * (2 * len(block.stages))


def chosen_for(x: Tensor, branch: list[ConvNorm], shortcut: Shortcut, kind: str) -> list[int]:
    """The candidates of the stages, the shortcut's last: forward, backward, forward...

    Args:
        x, branch, shortcut: arguments of a ``res_block`` that runs on Triton.
        kind: of ``KINDS``.
    """
    block = block_of(x, branch, shortcut)
    if _recorded is not None:
        return _record(block)
    return list(_chosen(block, kind, inference_conv.state()[0]))


@functools.lru_cache(maxsize=shipped_timings.MOST_SHAPES)
def _chosen(block: Block, kind: str, forgotten: int) -> tuple[int, ...]:
    found = calls(block)
    if not found:  # the op refuses such a block
        return (ATEN,) * (2 * len(block.stages))
    return tuple(_choose(call, kind, forgotten) for call in found)
