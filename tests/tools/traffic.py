"""Bytes that each kernel of a block's training step in Triton reads and writes, counted in Triton's
interpreter and beside what the plans say.

Maps are small, launches those of large ones, and every convolution is a fused one. An address
counts once a launch: what a kernel reads again comes from a cache. Tables of channels do not count.

The design's plan ("L2") is: every convolution with BatchNorm's statistics, the gradient of its
input with the ReLU before it, by a mask of one bit an element, and BatchNorm's sums, or with what
passes the block by; the passes that apply BatchNorm; and cuDNN's gradient of the weight, which
is not counted but taken from the plan. The kernels' plan differs in this:

- It keeps no activations inside a block, so the pass of BatchNorm's gradient writes them once more.
- The ReLUs inside have no masks: their signs are computed again from what is read anyway.
- The gradient of a convolution in steps is one for every first pixel of a step, each of which reads
  the output's gradient.
- The gradient of a shortcut in steps is added to the pixels that it read, in place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from unittest import mock

import numpy as np
import torch
from net_sequences import sequence
from suites.nets import NETS
from torch import Tensor
from triton_traffic import Traffic

from fused_res.kernels import bn_act, res_block
from fused_res.ops import conv_halo
from fused_res.reference import ACTS, ConvNorm, Norm, ResBlock

CASES = {  # channels in and out, stride, kind, image and batch
    "bottleneck": (64, 64, 1, "bottleneck", 12, 4),
    "basic": (32, 32, 1, "basic", 12, 4),
    "projection": (32, 64, 2, "basic", 16, 4),
}
EPILOGUES = ("", " + statistics", " + ReLU + sums", " + add")
WEIGHTS = "gradient of the weight (cuDNN's)"
Bytes = dict[str, list[int]]  # read and written


def _name(backward: bool, epilogue: int) -> str:
    return f"{'gradient of the input' if backward else 'convolution'}{EPILOGUES[epilogue]}"


class Once(Traffic):
    """Counts an address once a launch, in images, filters and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self._seen: dict[int, list[tuple[int, np.ndarray]]] = {}

    def name_of(self, kernel, arguments: dict) -> str:
        if "EPILOGUE" in arguments:
            return _name(self.backward, arguments["EPILOGUE"])
        return kernel.fn.__name__

    def given(self, tensors: list[Tensor]) -> None:
        super().given(tensors)
        self._large = np.array([t.dim() == 4 or t.dtype == torch.uint8 for t in tensors])
        self._seen = {id(c): np.empty(0, np.int64) for c in (self.read, self.written)}

    def touched(self, counter, address: np.ndarray, size: int, inside: np.ndarray) -> None:
        address = address[inside[:, self._large].any(axis=1)]
        new = np.setdiff1d(address, self._seen[id(counter)], assume_unique=True)
        self._seen[id(counter)] = np.concatenate([self._seen[id(counter)], new])
        counter[self.launches[-1]] += size * len(new)


def stages_of(block: ResBlock) -> tuple[list[ConvNorm], ConvNorm | None]:
    def stage(conv, bn) -> ConvNorm:
        norm = Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.1, 1e-5)
        weight = conv.weight.detach().bfloat16()
        sizes = conv.stride, conv.padding, conv.dilation
        return ConvNorm(weight, None, *sizes, conv.groups, norm)

    count = range(1, block.depth + 1)
    branch = [stage(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in count]
    return branch, None if block.downsample is None else stage(*block.downsample)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def counted(x: Tensor, branch: list[ConvNorm], shortcut: ConvNorm | None) -> Bytes:
    """Of a training step, by kernel."""
    stages = branch if shortcut is None else [*branch, shortcut]
    fused, act = [res_block.Candidates(1, 1)] * len(stages), ACTS.index("relu")
    needs = (1 << (1 + 3 * len(stages))) - 1
    needs &= ~sum(1 << (2 + 3 * i) for i in range(len(stages)))  # there are no biases
    with torch.no_grad(), mock.patch.object(bn_act, "SMALL_VALUES", 0), Once() as traffic:
        block = res_block.Block(x, branch, shortcut, act, False, fused, conv_halo)
        y, *saved = res_block.forward(block, True)
        traffic.backward = True
        dy = image(*y.shape)
        res_block.backward(block, dy, saved, needs)
    names = dict.fromkeys(traffic.launches)
    found = {name: [traffic.read[name], traffic.written[name]] for name in names}
    return {name: moved for name, moved in found.items() if any(moved)}


def planned(x: Tensor, branch: list[ConvNorm], shortcut: ConvNorm | None, kernels: bool) -> Bytes:
    """What each kernel is to read and write, or would by the design's plan."""
    moved: Bytes = defaultdict(lambda: [0, 0])
    mask = 8 * x.element_size()  # elements' bytes for one of it

    def add(name: str, read: int, written: int) -> None:
        moved[name][0] += read
        moved[name][1] += written

    def convolution(stage: ConvNorm, shape: torch.Size) -> torch.Size:
        """Its forward, and the gradient of its weight; the size of its output."""
        out = torch.empty(shape, device="meta")
        out = torch.conv2d(out, stage.weight.to("meta").float(), None, *stage[2:5]).shape
        read = shape.numel()
        if stage.weight.shape[2:] == (1, 1):  # in steps it reads only the pixels it keeps
            read //= stage.stride[0] * stage.stride[1]
        read *= x.element_size()
        size = out.numel() * x.element_size()
        add(_name(False, 1), read + stage.weight.nbytes, size)
        add(WEIGHTS, size + read, stage.weight.nbytes)
        return out

    sizes, shape = [x.nbytes], x.shape
    for stage in branch:
        shape = convolution(stage, shape)
        sizes.append(shape.numel() * x.element_size())
        if stage is not branch[-1]:
            add(
                "_bn_act_fwd_apply_kernel",
                sizes[-1],
                sizes[-1] + (0 if kernels else sizes[-1] // mask),
            )
    y = sizes[-1]
    second = 0 if shortcut is None else y  # the residual, a BatchNorm's too
    if shortcut is not None:
        convolution(shortcut, x.shape)
    add("_bn_act_fwd_apply_kernel", 2 * y, y + y // mask)
    add("_bn_act_bwd_sums_kernel", 2 * y + y // mask + second, 0)
    add("_bn_act_bwd_gradients_kernel", 2 * y + y // mask + second, y + second)
    for i, stage in reversed([*enumerate(branch)]):
        before, after = sizes[i : i + 2]
        steps = zip(stage.stride, stage.weight.shape[2:], strict=True)
        parts = math.prod(min(step, taps) for step, taps in steps) if kernels else 1
        read = parts * after + stage.weight.nbytes
        if i > 0:
            add(_name(True, 2), read + before + (0 if kernels else before // mask), before)
            add("_bn_act_bwd_reapply_kernel", 2 * before, (2 if kernels else 1) * before)
        elif shortcut is None:
            add(_name(True, 3), read + before + before // mask, before)
        else:
            add(_name(True, 0), read, before)
    if shortcut is not None:
        steps = shortcut.stride[0] * shortcut.stride[1] if kernels else 1
        add(_name(True, 3), y + shortcut.weight.nbytes + x.nbytes // steps, x.nbytes // steps)
    return dict(moved)


def total(moved: Bytes) -> int:
    return sum(map(sum, moved.values()))


def measure(case: str) -> tuple[Bytes, Bytes, Bytes]:
    """Counted with cuDNN's share, the kernels' plan, and the design's plan, of a case."""
    channels, out, stride, kind, size, batch = CASES[case]
    branch, shortcut = stages_of(ResBlock(channels, out, stride, kind=kind))
    args = image(batch, channels, size, size), branch, shortcut
    plan, design = planned(*args, True), planned(*args, False)
    return counted(*args) | {WEIGHTS: plan[WEIGHTS]}, plan, design


def of_net(name: str, batch: int, pixels: int) -> str:
    """What the plans say of a net's blocks."""
    plan = design = 0
    with torch.device("meta"):
        net, x = sequence(NETS[name].make()), torch.empty(batch, 3, pixels, pixels)
    for part in net:
        if isinstance(part, ResBlock):
            args = x.bfloat16(), *stages_of(part)
            plan += total(planned(*args, True))
            design += total(planned(*args, False))
        x = part(x)
    return (
        f"The blocks of {name} at {pixels} pixels, batch {batch}: {plan / batch / 1e6:.0f} MB an "
        f"image by the kernels' plan, {design / batch / 1e6:.0f} by L2"
    )
