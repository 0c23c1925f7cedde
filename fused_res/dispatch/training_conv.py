"""Which convolutions of a block in training are our own, forward and backward, and why: in Triton,
or of few channels in CUDA C++ (``conv_halo``).

In order of precedence, as in ``choices``: what the user measured for the very convolution on this
device (``fused_res.tune(..., train=True)``); what was measured for the package near its shape;
else the library. ``eager`` in a measurement is the library's convolution with the passes over
memory that ours saves. A backend named ``triton`` has our own wherever they can run. Nothing is
measured here.
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
# What kernels/res_block.py takes: or OWN + 1 + i, our own in Triton's i-th configuration.
HALO, LIBRARY, OWN = -1, 0, 1
# What comes with a convolution: forward the BatchNorm after it; backward, in the gradient of its
# input, the ReLU and BatchNorm before it, or what passes the block by, of a shortcut's convolution
# the branch's gradient.
STATISTICS, FROZEN = "statistics", "frozen norm"
RELU, FROZEN_RELU, ADD, ADD_IN_PLACE = "relu and sums", "relu", "add", "add in place"


class Call(NamedTuple):
    """A convolution of a block, one way: all that a choice depends on.

    end: what comes in the same pass where it is our own; none: nothing does.
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
    end: str


class Block(NamedTuple):
    """All that a plan depends on.

    stages: of each the weight's shape, the convolution's numbers and whether its BatchNorm trains.
    shortcut: whether its last is the shortcut's. add: whether anything is added to the branch.
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
    """Of each stage forward, then backward; none where its convolutions do not fit their inputs."""
    of_block = block.device, block.dtype
    found, shape = [], block.shape
    for i, (weight, stride, padding, dilation, groups, training) in enumerate(block.stages):
        is_shortcut = block.shortcut and i + 1 == len(block.stages)
        shape = block.shape if is_shortcut else shape
        if len(weight) != 4 or len(shape) != 4 or min(*shape, *weight, *stride) < 1:
            return []
        if is_shortcut:
            end = ADD_IN_PLACE
        elif i > 0:
            end = RELU if block.stages[i - 1][-1] else FROZEN_RELU
        else:
            end = ADD if block.add and not block.shortcut else ""
        conv = shape, block.channels_last, weight, stride, padding, dilation, groups, block.tf32
        found.append(Call(*of_block, *conv, False, STATISTICS if training else FROZEN))
        found.append(Call(*of_block, *conv, True, end))
        numbers = zip(shape[2:], weight[2:], stride, padding, dilation, strict=True)
        image = [(n + 2 * pad - d * (taps - 1) - 1) // s + 1 for n, taps, s, pad, d in numbers]
        shape = (shape[0], weight[0], *image)
    return found


def name_of(choice: int) -> str:
    """As measurements name what a choice is of."""
    return {HALO: "conv_halo", LIBRARY: "eager"}.get(choice, "triton")


def config_of(choice: int):
    """Triton's configuration; None: the best guess, or not Triton's."""
    from ..kernels.conv_tiles import CONFIGS

    return CONFIGS[choice - OWN - 1] if choice > OWN else None


def trains(call: Call) -> bool | None:
    """Whether the BatchNorm that comes with a call does; None: none does."""
    return {STATISTICS: True, RELU: True, FROZEN: False, FROZEN_RELU: False}.get(call.end)


def row_of(call: Call, ms: dict[str, float], config: dict | None = None) -> Row:
    """A measurement of a call as the tables keep it, for any device."""
    like = f"{inference_conv._sizes(*call[4:9])}, {'backward' if call.backward else 'forward'}"
    if call.end:
        like += f", {call.end}"
    if call.dtype == torch.float32:
        like += ", tf32" if call.tf32 else ", no tf32"
    return inference_conv.row_like(like, OP, call, ms, config)


def tensors_of(call: Call, device: torch.device | str) -> tuple[Tensor, ConvNorm]:
    """The convolution's input and itself, not filled."""
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    x, weight = (
        torch.empty(shape, dtype=call.dtype, device=device, memory_format=layout)
        for shape in (call.shape, call.weight)
    )
    return x, ConvNorm(weight, None, *call[5:9], None)


@functools.lru_cache(maxsize=shipped_timings.MOST_SHAPES)
def _choose(call: Call, named: bool, forgotten: int) -> int:
    """``forgotten``: what was chosen before the tables changed does not count."""
    from ..kernels import conv_tiles, training_convolution

    row, config, choice = row_of(call, {}), None, LIBRARY
    reason = training_convolution.why_not(*tensors_of(call, "meta"))
    if reason is None and named:
        choice, reason = OWN, "the backend was named"
    elif reason is None:
        mine = user_timings.find(call.device, row)
        if mine is not None and mine.ms.keys() >= {"eager", "triton"}:
            name, config = inference_conv.taken(mine), mine.config
            ms = mine.ms["triton" if name == "eager" else name]
            reason = f"tuned: {ms:.3g} ms, {mine.ms['eager'] / ms:.2f}x the library"
        else:
            device = shipped_timings.device_of(call.device.type, call.device.index)
            of = row.dtype, row.layout, row.shape
            fused = "triton", "conv_halo"
            name, reason, config = shipped_timings.verdict(OP, device, *of, fused, row.like)
        if name == "conv_halo":
            choice = HALO
        elif name == "triton":
            fields = [c._asdict() for c in conv_tiles.CONFIGS]
            choice = OWN + (1 + fields.index(config) if config in fields else 0)
    runs = "the library" if choice == LIBRARY else "our own"
    backends.say(f"{OP} {inference_conv.words(row)} runs {runs}: {reason}")
    # the layouts inside a block are known when it runs, and looked at then
    return OWN if named else choice


_recorded: dict[Call, None] | None = None


@contextlib.contextmanager
def recording() -> Iterator[dict[Call, None]]:
    """Collects the distinct calls that have a choice, of the blocks that Triton runs in the body.
    They run in the library."""
    global _recorded
    _recorded = found = {}
    try:
        yield found
    finally:
        _recorded = None


def _record(block: Block, x: Tensor) -> list[int]:
    from ..kernels import training_convolution

    for call in calls(block):
        if training_convolution.why_not(*tensors_of(call, "meta")) is None:
            _recorded.setdefault(call)
    name = backends.choose("bn_act", "auto", x)
    if name != "triton":
        size = "x".join(map(str, x.shape))
        backends.say(f"a block of {size} runs on Triton only where it is named: auto takes {name}")
    return [LIBRARY] * (2 * len(block.stages))


def plan(x: Tensor, branch: list[ConvNorm], shortcut: Shortcut, backend: str | None) -> list[int]:
    """What runs each stage's convolution, the shortcut's last: forward, backward, forward, ...

    Args:
        x, branch, shortcut: as of ``res_block``, where Triton runs it.
        backend: that was named, or None.
    """
    block = block_of(x, branch, shortcut)
    if _recorded is not None:
        return _record(block, x)
    return list(_plan(block, not backends.is_auto(backend), inference_conv.state()[0]))


@functools.lru_cache(maxsize=shipped_timings.MOST_SHAPES)
def _plan(block: Block, named: bool, forgotten: int) -> tuple[int, ...]:
    found = calls(block)
    if not found:  # which the op finds too
        return (LIBRARY,) * (2 * len(block.stages))
    return tuple(_choose(call, named, forgotten) for call in found)
