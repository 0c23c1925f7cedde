"""Runs a plan for inference, one op for each convolution, and keeps the steps by input size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import inference_conv
from ..fuse.modules import child, conv_norm_of, tensors_of, uses_batch
from ..fuse.plan import BlockPlan, Stage
from ..ops.conv_bn_act import (
    Call,
    Run,
    conv_bn_act,
    fuses_convolutions,
    out_shape,
    prepared,
    under_modes,
)
from ..ops.convolutions import Convolutions, joined
from ..reference import ConvNorm
from .guards import ChildrenGuard, Guard, last_guard
from .kept import Kept, keep, size_of
from .own_forward import leave
from .places import Places
from .training import add_shortcut
from .weight_cache import fingerprint


class _OfPlan(NamedTuple):
    """The steps that a guard keeps for a plan, by the size of the input.

    branch: the branch of the plan, kept alive because its address is the key. (The plan itself may
    lead back to the block and keep that alive.)
    """

    branch: tuple[Stage, ...]
    sizes: dict[tuple, Kept]


def _keeps(x: Tensor, residual: Tensor | None) -> bool:
    """Whether steps can be kept for such a call."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and not under_modes(x)
        and (residual is None or (isinstance(residual, Tensor) and not under_modes(residual)))
    )


def kept_for(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None = None
) -> Kept | None:
    """The valid steps that an earlier call kept for such inputs, or None.

    The caller has just checked the block's guard.
    """
    if torch.is_grad_enabled() or not _keeps(x, residual):
        return None
    guard = last_guard(block)
    of_plan = None if guard is None else guard.kept.get(id(plan.branch))
    if of_plan is None:
        return None
    size = *size_of(x, residual), block.backend
    kept = of_plan.sizes.get(size)
    if kept is None:
        return None
    if kept.passes(block):
        guard.ran = size
        return kept
    of_plan.sizes.clear()  # these keep replaced tensors alive
    return None


def run_kept(kept: Kept, x: Tensor, residual: Tensor | None) -> Tensor:
    *inner, last = kept.steps
    for step in inner:
        x = step(x, None)
    return last(x, residual)


def convolutions_of(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None
) -> list[ConvNorm] | None:
    """The plan's convolutions as arguments of ``conv_bn_act``, the shortcut's last; None where the
    call is not for inference."""
    if x.dim() != 4 or plan.branch[-1].conv is None:
        return None
    if residual is not None and not isinstance(residual, Tensor):
        return None
    if residual is not None and residual.dtype != x.dtype:
        return None
    norms = [None if s.norm is None else child(block, s.norm) for s in plan.stages]
    if any(bn is not None and uses_batch(bn) for bn in norms):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (residual is not None and residual.requires_grad)
        or any(p.requires_grad for p in block.parameters())
    ):
        return None
    if not fuses_convolutions(x, block.backend):
        return None
    convs = []
    for stage, bn in zip(plan.stages, norms, strict=True):
        if stage.conv is None:  # a shortcut that only pools
            continue
        conv = conv_norm_of(child(block, stage.conv), bn)
        if conv is None:
            return None
        convs.append(conv)
    return convs


class _Source(NamedTuple):
    """The children and tensors that steps are made from, recorded before the steps are made."""

    guard: Guard
    children: ChildrenGuard
    tensors: list[Tensor]
    fingerprint: tuple


def _source_of(block: nn.Module, plan: BlockPlan) -> _Source | None:
    """None where a change could stay unseen."""
    guard = last_guard(block)
    if guard is None or any(stage.before for stage in plan.stages):
        return None
    paths, tensors = [], []
    for stage in plan.stages:
        conv = None if stage.conv is None else child(block, stage.conv)
        bn = None if stage.norm is None else child(block, stage.norm)
        found = tensors_of(conv, bn)
        if found is None:
            return None
        tensors += found
        paths += [path for path in (stage.conv, stage.norm) if path is not None]
    try:
        children = ChildrenGuard(block, paths)
    except KeyError:
        return None
    return _Source(guard, children, tensors, fingerprint(tensors))


def run(
    block: nn.Module, plan: BlockPlan, convs: list[ConvNorm], x: Tensor, residual: Tensor | None
) -> Tensor:
    """Runs the plan by the results of ``convolutions_of``, and keeps the steps where it can."""
    source = _source_of(block, plan) if _keeps(x, residual) else None
    size = None if source is None else (*size_of(x, residual), block.backend)
    steps: list[Run] = []
    # on a GPU, where ``auto`` takes PyTorch's ops for all, the block's own forward is as good
    left = inference_conv.may_leave(x, block.backend) and plan is getattr(block, "plan", None)

    def call(*arguments) -> Tensor:
        nonlocal left
        made = Call(*arguments)
        step = None if source is None else prepared(made, block.backend)
        if step is None:
            y = conv_bn_act(*made, block.backend)
            left = left and inference_conv.is_left(made)
            return y
        steps.append(step)
        return step(made.x, made.residual)

    *inner, last = plan.branch
    out, residual = x, x if residual is None else residual
    for stage, conv in zip(inner, convs, strict=False):
        for name in stage.before:
            out = child(block, name)(out)
        out = call(out, conv, None, None, False, "relu" if stage.relu else "none")
    for name in last.before:
        out = child(block, name)(out)
    for name in () if plan.shortcut is None else plan.shortcut.before:
        residual = child(block, name)(residual)
    conv, *shortcut = convs[len(inner) :]
    concat = plan.skip == "concat"
    if plan.skip == "none":
        residual = None
    elif not concat:
        shape = out_shape(residual, shortcut[0]) if shortcut else residual.shape
        if shape != out_shape(out, conv):
            return _broadcast(block, plan, out, residual, conv, *shortcut)
    y = call(out, conv, residual, *(shortcut or [None]), concat, plan.act)
    if left:
        leave(block, x)
    if source is not None and len(steps) == len(plan.branch):
        _keep(block, plan, source, size, steps)
    return y


def _broadcast(
    block: nn.Module,
    plan: BlockPlan,
    x: Tensor,
    residual: Tensor,
    conv: ConvNorm,
    shortcut: ConvNorm | None = None,
) -> Tensor:
    """The last convolution and an add of two shapes."""
    act = "relu" if plan.branch[-1].relu else "none"
    y = conv_bn_act(x, conv, act=act, backend=block.backend)
    if shortcut is not None:
        residual = conv_bn_act(residual, shortcut, act="none", backend=block.backend)
    return add_shortcut(plan, y, residual)


def _keep(
    block: nn.Module, plan: BlockPlan, source: _Source, size: tuple, steps: list[Run]
) -> None:
    if all(isinstance(step, Convolutions) for step in steps):
        steps = [joined(steps)]
    kept = Kept(steps, source.children, Places(), source.tensors, source.fingerprint)
    if last_guard(block) is not source.guard or not kept.passes(block):
        return  # another thread has changed the weights
    of_plan = source.guard.kept.setdefault(id(plan.branch), _OfPlan(plan.branch, {}))
    keep(of_plan.sizes, size, kept)
