"""A whole residual block in training, in Triton: the op ``res_block``, stage by stage as in
``csrc/res_block.h``, with convolutions of our own (``training_convolution``) where the plan says so
and else PyTorch's.

Own convolutions save passes over memory: forward, that of the statistics; backward, that of the
sums of each BatchNorm inside the block, the masks of the ReLUs there, and the pass that adds the
shortcut's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.ops import conv_halo
from fused_res.reference import ACTS, ConvNorm, Shortcut

from . import bn_act
from . import training_convolution as own
from .training_convolution import ADD, RELU, End

_RELU = ACTS.index("relu")
_HALO = -1


class Choice(NamedTuple):
    """What runs a convolution each way: 0 the library, 1 our own, 2 + i our own in the i-th of
    ``conv_bn_act.CONFIGS``, -1 ``conv_halo``, where its ends are those that are wanted."""

    forward: int = 0
    backward: int = 0


def _config(choice: int):
    return own.inference.CONFIGS[choice - 2] if choice > 1 else None


def _convolve(x: Tensor, conv: ConvNorm, choice: Choice, statistics: bool):
    """The convolution, and its statistics where they came with it."""
    if choice.forward == _HALO and statistics and conv_halo.trains(x, conv):
        return conv_halo.convolve(x, conv)
    if choice.forward <= 0 or own.why_not(x, conv):
        return torch.convolution(x, *conv[:5], False, (0, 0), conv.groups), None
    return own.convolve(x, conv, statistics, _config(choice.forward))


def forward(
    x: Tensor, branch: list[ConvNorm], shortcut: Shortcut, act: int, save: bool, recompute: bool,
    plan: list[Choice],
) -> list[Tensor]:  # fmt: skip
    """``res_block_fwd`` of ``fused_res/ops/res_block.py``; of norms with running statistics, which
    are updated."""
    outputs, kept, z, mask = [], [], x, None
    for i, (stage, choice) in enumerate(zip(branch, plan, strict=False)):
        last = i + 1 == len(branch)
        a, partial = _convolve(z, stage, choice, stage.norm.training)
        residual, second, partial2 = None, (None,) * 4 + (False, 0.0, 1.0), None
        if last and shortcut is None:
            residual = x
        joined = last and bool(shortcut)
        if joined:
            residual, partial2 = _convolve(x, shortcut, plan[-1], shortcut.norm.training)
            second = _norm(shortcut)
        z, mask, stats = bn_act.forward(
            a, *_norm(stage), residual, joined, *second, act if last else _RELU, save and last,
            partial, partial2,
        )  # fmt: skip
        if save and not (last and recompute):
            outputs.append(a)
        if save and joined:
            outputs.append(residual)
        kept.append(stats)
    return [z, *outputs, *kept, mask] if save else [z]


def _norm(stage: ConvNorm) -> tuple:
    """As ``bn_act.forward`` takes one."""
    running_mean, running_var, weight, bias, *numbers = stage.norm
    return weight, bias, running_mean, running_var, *numbers


class _Wanted(NamedTuple):
    """Which gradients: of x, and of each stage the weight, the bias and the BatchNorm's."""

    needs: int

    @property
    def x(self) -> bool:
        return bool(self.needs & 1)

    def of(self, stage: int) -> tuple[bool, bool, bool]:
        return tuple(bool(self.needs >> (1 + 3 * stage + bit) & 1) for bit in range(3))

    def before(self, stage: int) -> bool:
        return self.needs & ((1 << (1 + 3 * stage)) - 1) != 0


def _library_backward(dy, x, conv: ConvNorm, wanted: tuple[bool, bool, bool]):
    """Of the input, the weight and the bias; None where not wanted."""
    if not any(wanted):
        return None, None, None
    size = None if conv.bias is None else [len(conv.weight)]
    return torch.ops.aten.convolution_backward(
        dy, x, conv.weight, size, *conv[2:5], False, (0, 0), conv.groups, wanted)  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, branch: list[ConvNorm], shortcut: Shortcut, saved: list[Tensor],
    act: int, recompute: bool, needs: int, plan: list[Choice],
) -> list[Tensor]:  # fmt: skip
    """``res_block_bwd`` of ``fused_res/ops/res_block.py``, with one gradient of x: the sum."""
    n, wanted = len(branch), _Wanted(needs)
    stages = [*branch, shortcut] if shortcut else branch
    outputs, stats, mask = saved[: n - recompute], saved[-n - 1 : -1], saved[-1]
    a_shortcut = saved[n - recompute] if shortcut else None
    gradients = [[None] * 4 for _ in stages]

    def inside(i: int) -> tuple[Tensor, Tensor | None]:
        """What convolution i read, and the mask of the ReLU before it."""
        return bn_act.reapply(outputs[i - 1], stats[i - 1]) if i else (x, None)

    def owns(i: int, *read: Tensor) -> bool:
        """Whether the gradient of what convolution i read is our own's, which reads these."""
        return plan[i].backward > 0 and all(own.why_not(t, stages[i]) is None for t in read)

    def halos(i: int, da: Tensor, a: Tensor) -> bool:
        """Whether the gradient of what convolution i read, past a ReLU, is ``conv_halo``'s."""
        dense = da.is_contiguous(memory_format=torch.channels_last)
        return plan[i].backward == _HALO and dense and conv_halo.trains(a, stages[i])

    def own_gradient(i: int, da: Tensor, size, end: End, out: Tensor | None = None):
        config = _config(plan[i].backward)
        return own.input_gradient(da, stages[i], size, end, config, out)

    def of_library(i: int, da: Tensor, z: Tensor, input: bool) -> Tensor | None:
        """The gradients of convolution i, but for the input's where it is our own's."""
        dz, *gradients[i][:2] = _library_backward(da, z, stages[i], (input, *wanted.of(i)[:2]))
        return dz

    # the end: both BatchNorms, the add and the ReLU
    z = inner_mask = None
    if recompute:
        z, inner_mask = inside(n - 1)
        a, _ = _convolve(z, branch[-1], plan[n - 1], False)
        outputs = [*outputs, a]
    a = outputs[-1]
    dy = bn_act._like(dy, a)
    of_shortcut = bool(shortcut) and (wanted.x or any(wanted.of(n)[:2]))
    # an own convolution of x's gradient adds what passes the block by, to every pixel
    past = shortcut is None and wanted.x
    adds = past and owns(0, outputs[0])
    adds = adds and bn_act.Geometry.of(a).channels_last and max(branch[0].stride) == 1
    passes = past and act == _RELU and not adds
    of_branch = wanted.before(n - 1) or any(wanted.of(n - 1)[:2])
    of_norms = wanted.of(n - 1)[2] or (bool(shortcut) and wanted.of(n)[2])
    norm, second = branch[-1].norm, shortcut.norm if shortcut else None
    da, *gradients[n - 1][2:], d_residual, dweight, dbias = bn_act.backward(
        dy, a, norm.weight, norm.training, a_shortcut, second is not None,
        None if second is None else second.weight, second is not None and second.training,
        stats[-1], mask, act, of_branch, of_shortcut or passes, of_norms,
    )  # fmt: skip
    if second is not None:
        gradients[n][2:] = dweight, dbias

    dx = None
    for i in reversed(range(n)):
        before = wanted.before(i)
        if not before and not any(wanted.of(i)[:2]):
            break
        if i == 0:
            if before and owns(0, da):
                of_library(0, da, x, False)
                end = End(ADD, other=dy, mask=mask if act == _RELU else None) if adds else End()
                dx, _ = own_gradient(0, da, x.shape[2:], end)
            else:
                dx = of_library(0, da, x, before)
            break
        a, norm = outputs[i - 1], branch[i - 1].norm
        *of_conv, of_norm = wanted.of(i - 1)
        of_conv = wanted.before(i - 1) or any(of_conv)
        halo = before and halos(i, da, a)
        if halo or (before and owns(i, da, a)):
            if halo:
                g, sums = conv_halo.input_gradient(da, stages[i], a, stats[i - 1])
            else:
                end = End(RELU, a=a, stats=stats[i - 1])
                g, sums = own_gradient(i, da, a.shape[2:], end)
            d_before, *gradients[i - 1][2:], z = bn_act.backward_of_sums(
                g, a, norm.weight, norm.training, stats[i - 1], sums, of_conv, of_norm,
                any(wanted.of(i)[:2]))  # fmt: skip
            of_library(i, da, z, False)
            da = d_before
        else:
            if z is None or i + 1 < n:
                z, inner_mask = inside(i)
            dz = of_library(i, da, z, before)
            if before:
                da, *gradients[i - 1][2:], _, _, _ = bn_act.backward(
                    dz, a, norm.weight, norm.training, None, False, None, False, stats[i - 1],
                    inner_mask, _RELU, of_conv, False, of_norm)  # fmt: skip
    if of_shortcut:
        if wanted.x and owns(n, d_residual) and bn_act.Geometry.of(dx).channels_last:
            of_library(n, d_residual, x, False)
            own_gradient(n, d_residual, x.shape[2:], End(ADD, other=dx), dx)
        else:
            dz = of_library(n, d_residual, x, wanted.x)
            if wanted.x:
                dx += dz
    elif past and not adds:
        dx += d_residual if act == _RELU else dy
    results = [dx] if wanted.x else []
    for i, found in enumerate(gradients):
        weight, bias, norm = wanted.of(i)
        flags = weight, bias, norm, norm
        results += [t for t, flag in zip(found, flags, strict=True) if flag]
    return results
