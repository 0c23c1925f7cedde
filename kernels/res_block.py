"""A whole residual block in training, in Triton: the op ``res_block``, stage by stage as in
``csrc/res_block.h``. ``Candidates`` say for each convolution whether ``training_convolution.py``,
``conv_halo`` or cuDNN (through ATen) runs it.

Fused convolutions save passes over memory: forward, that of the statistics; backward, that of the
sums of each BatchNorm inside the block, the masks of the ReLUs there, and the pass that adds the
shortcut's gradient.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_res.reference import ACTS, ConvNorm, Shortcut

from . import bn_act_bwd, bn_act_fwd, conv_tiles
from . import training_convolution as convolutions
from .bn_act import Geometry, dense_like
from .training_convolution import ADD, RELU, Epilogue

_RELU = ACTS.index("relu")
_HALO = -1


class Candidates(NamedTuple):
    """What runs a convolution each way: 0 cuDNN, 1 ``training_convolution``, 2 + i the same in the
    i-th of ``conv_tiles.CONFIGS``, -1 ``conv_halo``, where it has the epilogue that is wanted."""

    forward: int = 0
    backward: int = 0


class Halo(Protocol):
    """``fused_res.ops.conv_halo``, given by the op: kernels import no ops."""

    def trains(self, x: Tensor, conv: ConvNorm) -> bool: ...

    def convolve(self, x: Tensor, conv: ConvNorm) -> tuple[Tensor, Tensor]: ...

    def input_gradient(
        self, dy: Tensor, conv: ConvNorm, a: Tensor, stats: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class Block(NamedTuple):
    """A block on its input.

    Args:
        act: of ``reference.ACTS``, by place, after the last stage; a ReLU follows each before.
        recompute: whether backward computes the branch's last convolution again.
        candidates: of each stage, the shortcut's last.
    """

    x: Tensor
    branch: list[ConvNorm]
    shortcut: Shortcut
    act: int
    recompute: bool
    candidates: list[Candidates]
    halo: Halo

    @property
    def stages(self) -> list[ConvNorm]:
        return [*self.branch, self.shortcut] if self.shortcut else self.branch


def config_of(candidate: int):
    return conv_tiles.CONFIGS[candidate - 2] if candidate > 1 else None


def convolve(x: Tensor, conv: ConvNorm, candidate: Candidates, statistics: bool, halo: Halo):
    """The convolution, and its statistics where they came with it."""
    if candidate.forward == _HALO and statistics and halo.trains(x, conv):
        return halo.convolve(x, conv)
    if candidate.forward <= 0 or convolutions.why_not(x, conv):
        return torch.convolution(x, *conv[:5], False, (0, 0), conv.groups), None
    return convolutions.convolve(x, conv, statistics, config_of(candidate.forward))


def aten_backward(dy: Tensor, x: Tensor, conv: ConvNorm, wanted: tuple[bool, bool, bool]):
    """The gradients of the input, the weight and the bias; None where not wanted."""
    if not any(wanted):
        return None, None, None
    size = None if conv.bias is None else [len(conv.weight)]
    return torch.ops.aten.convolution_backward(
        dy, x, conv.weight, size, *conv[2:5], False, (0, 0), conv.groups, wanted)  # fmt: skip


def forward(block: Block, save: bool) -> list[Tensor]:
    """``res_block_fwd`` of ``fused_res/ops/res_block.py``; of norms with running statistics, which
    are updated."""
    x, branch, shortcut, candidates = block.x, block.branch, block.shortcut, block.candidates
    outputs, kept, z, mask = [], [], x, None
    for i, (stage, candidate) in enumerate(zip(branch, candidates, strict=False)):
        last = i + 1 == len(branch)
        a, statistics = convolve(z, stage, candidate, stage.norm.training, block.halo)
        call = bn_act_fwd.Call(
            a, stage.norm, act=block.act if last else _RELU, save_mask=save and last,
            statistics=statistics,
        )  # fmt: skip
        if last and shortcut is None:
            call = call._replace(residual=x)
        joined = last and bool(shortcut)
        if joined:
            a_shortcut, statistics = convolve(
                x, shortcut, candidates[-1], shortcut.norm.training, block.halo
            )
            call = call._replace(
                residual=a_shortcut, residual_norm=shortcut.norm, residual_statistics=statistics
            )
        z, mask, stats = bn_act_fwd.forward(call)
        if save and not (last and block.recompute):
            outputs.append(a)
        if save and joined:
            outputs.append(call.residual)
        kept.append(stats)
    return [z, *outputs, *kept, mask] if save else [z]


class _Wanted(NamedTuple):
    """Which gradients: of x, and of each stage the weight, the bias and the BatchNorm's."""

    needs: int

    @property
    def x(self) -> bool:
        return bool(self.needs & 1)

    def of(self, stage: int) -> tuple[bool, bool, bool]:
        return tuple(bool(self.needs >> (1 + 3 * stage + bit) & 1) for bit in range(3))

    def of_conv(self, stage: int) -> bool:
        """Whether the convolution's weight or bias wants one."""
        return any(self.of(stage)[:2])

    def before(self, stage: int) -> bool:
        """Whether anything before a stage of the branch wants one."""
        return self.needs & ((1 << (1 + 3 * stage)) - 1) != 0


class _Backward:
    """The backward pass of a block, from its end to its input."""

    def __init__(self, block: Block, dy: Tensor, saved: list[Tensor], needs: int) -> None:
        n = len(block.branch)
        self.block, self.dy, self.wanted = block, dy, _Wanted(needs)
        self.count, self.stages, self.candidates = n, block.stages, block.candidates
        self.outputs = saved[: n - block.recompute]
        self.stats, self.mask = saved[-n - 1 : -1], saved[-1]
        self.a_shortcut = saved[n - block.recompute] if block.shortcut else None
        self.gradients = [[None] * 4 for _ in self.stages]
        self.last_input = None  # of the last convolution, and its ReLU's mask, where computed

    # Which convolution runs

    def _fused(self, i: int, *read: Tensor) -> bool:
        """Whether ``training_convolution`` runs the gradient of convolution i's input, from
        these."""
        takes = all(convolutions.why_not(t, self.stages[i]) is None for t in read)
        return self.candidates[i].backward > 0 and takes

    def _halo(self, i: int, da: Tensor, a: Tensor) -> bool:
        """Whether ``conv_halo`` runs the gradient of convolution i's input, past a ReLU."""
        dense = da.is_contiguous(memory_format=torch.channels_last)
        halo = self.candidates[i].backward == _HALO
        return halo and dense and self.block.halo.trains(a, self.stages[i])

    def _fused_gradient(self, i: int, da: Tensor, size, epilogue: Epilogue, out=None):
        config = config_of(self.candidates[i].backward)
        return convolutions.input_gradient(da, self.stages[i], size, epilogue, config, out)

    def _aten_gradients(self, i: int, da: Tensor, z: Tensor, input: bool) -> Tensor | None:
        """The gradients of convolution i; of its input only where no fused kernel runs it."""
        wanted = input, *self.wanted.of(i)[:2]
        dz, *self.gradients[i][:2] = aten_backward(da, z, self.stages[i], wanted)
        return dz

    def _input_of(self, i: int) -> tuple[Tensor, Tensor | None]:
        """What convolution i read, and the mask of the ReLU before it."""
        if i == 0:
            return self.block.x, None
        return bn_act_fwd.reapply(self.outputs[i - 1], self.stats[i - 1])

    # The stages

    def run(self) -> list[Tensor]:
        da, d_residual = self._end()
        dx = None
        for i in reversed(range(self.count)):
            if not self.wanted.before(i) and not self.wanted.of_conv(i):
                break
            if i == 0:
                dx = self._first(da)
            else:
                da = self._stage(i, da)
        if self.of_shortcut:
            dx = self._add_projection(dx, d_residual)
        elif self.past and not self.adds:
            dx += d_residual if self.block.act == _RELU else self.dy
        return self._results(dx)

    def _end(self) -> tuple[Tensor | None, Tensor | None]:
        """Both BatchNorms, the add and the ReLU: the gradients of the branch's last convolution's
        output and of what was added to it."""
        block, wanted, n, act = self.block, self.wanted, self.count, self.block.act
        if block.recompute:
            self.last_input = self._input_of(n - 1)
            a, _ = convolve(
                self.last_input[0], block.branch[-1], self.candidates[n - 1], False, block.halo
            )
            self.outputs = [*self.outputs, a]
        a = self.outputs[-1]
        self.dy = dense_like(self.dy, a)
        shortcut = block.shortcut
        self.of_shortcut = bool(shortcut) and (wanted.x or wanted.of_conv(n))
        # A fused convolution of x's gradient adds what passes the block by, to every pixel.
        self.past = shortcut is None and wanted.x
        self.adds = (
            self.past
            and self._fused(0, self.outputs[0])
            and Geometry.of(a).channels_last
            and max(block.branch[0].stride) == 1
        )
        passes = self.past and act == _RELU and not self.adds
        norm, second = block.branch[-1].norm, shortcut.norm if shortcut else None
        of_norms = wanted.of(n - 1)[2] or (second is not None and wanted.of(n)[2])
        found = bn_act_bwd.backward(
            bn_act_bwd.Call(
                self.dy,
                a,
                bn_act_bwd.NormCall(norm.weight, norm.training),
                self.stats[-1],
                self.mask,
                self.a_shortcut,
                None if second is None else bn_act_bwd.NormCall(second.weight, second.training),
                act,
                bn_act_bwd.Wanted(
                    wanted.before(n - 1) or wanted.of_conv(n - 1),
                    self.of_shortcut or passes,
                    of_norms,
                ),
            )
        )
        self.gradients[n - 1][2:] = found.dweight, found.dbias
        if second is not None:
            self.gradients[n][2:] = found.dresidual_weight, found.dresidual_bias
        return found.dx, found.dresidual

    def _first(self, da: Tensor) -> Tensor | None:
        """Convolution 0: the gradient of x by way of the branch."""
        x, before = self.block.x, self.wanted.before(0)
        if not (before and self._fused(0, da)):
            return self._aten_gradients(0, da, x, before)
        self._aten_gradients(0, da, x, False)
        mask = self.mask if self.block.act == _RELU else None
        epilogue = Epilogue(ADD, other=self.dy, mask=mask) if self.adds else Epilogue()
        return self._fused_gradient(0, da, x.shape[2:], epilogue)[0]

    def _stage(self, i: int, da: Tensor) -> Tensor | None:
        """Convolution i, and the ReLU and BatchNorm before it: the gradient of the output of the
        convolution before."""
        a, stats, norm = self.outputs[i - 1], self.stats[i - 1], self.stages[i - 1].norm
        last_input, self.last_input = self.last_input, None
        before = self.wanted.before(i)
        of_norm = bn_act_bwd.NormCall(norm.weight, norm.training)
        wanted = bn_act_bwd.Wanted(
            self.wanted.before(i - 1) or self.wanted.of_conv(i - 1), False, self.wanted.of(i - 1)[2]
        )
        halo = before and self._halo(i, da, a)
        if halo or (before and self._fused(i, da, a)):
            if halo:
                g, sums = self.block.halo.input_gradient(da, self.stages[i], a, stats)
            else:
                epilogue = Epilogue(RELU, a=a, stats=stats)
                g, sums = self._fused_gradient(i, da, a.shape[2:], epilogue)
            found, z = bn_act_bwd.backward_of_sums(
                bn_act_bwd.SumsCall(g, a, of_norm, stats, sums, wanted, self.wanted.of_conv(i))
            )
            self.gradients[i - 1][2:] = found.dweight, found.dbias
            self._aten_gradients(i, da, z, False)
            return found.dx
        z, mask = last_input or self._input_of(i)
        dz = self._aten_gradients(i, da, z, before)
        if not before:
            return None
        call = bn_act_bwd.Call(dz, a, of_norm, stats, mask, act=_RELU, wanted=wanted)
        found = bn_act_bwd.backward(call)
        self.gradients[i - 1][2:] = found.dweight, found.dbias
        return found.dx

    def _add_projection(self, dx: Tensor | None, d_residual: Tensor) -> Tensor | None:
        """The shortcut's convolution; its gradient of x is added to dx."""
        n, x, wants_x = self.count, self.block.x, self.wanted.x
        if wants_x and self._fused(n, d_residual) and Geometry.of(dx).channels_last:
            self._aten_gradients(n, d_residual, x, False)
            self._fused_gradient(n, d_residual, x.shape[2:], Epilogue(ADD, other=dx), dx)
            return dx
        dz = self._aten_gradients(n, d_residual, x, wants_x)
        if wants_x:
            dx += dz
        return dx

    def _results(self, dx: Tensor | None) -> list[Tensor]:
        """Those that are wanted, in the order of ``needs``."""
        results = [dx] if self.wanted.x else []
        for i, found in enumerate(self.gradients):
            weight, bias, norm = self.wanted.of(i)
            flags = weight, bias, norm, norm
            results += [t for t, flag in zip(found, flags, strict=True) if flag]
        return results


def backward(block: Block, dy: Tensor, saved: list[Tensor], needs: int) -> list[Tensor]:
    """``res_block_bwd`` of ``fused_res/ops/res_block.py``, with one gradient of x: the sum."""
    return _Backward(block, dy, saved, needs).run()
