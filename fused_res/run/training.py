"""Runs a plan for training, in one op for the whole block, or in one op for each norm with the add
and ReLU that follow it."""

from __future__ import annotations

import operator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fuse.modules import child, group_of, is_frozen, norm_of, pair
from ..fuse.plan import BlockPlan, Stage
from ..ops.bn_act import bn_act_norms
from ..ops.res_block import Eager, whole
from ..ops.sync_bn_act import sync_bn_act
from ..reference import Act, ConvNorm, Norm, Shortcut


def _convolve(block: nn.Module, stage: Stage, x: Tensor) -> Tensor:
    for name in stage.before:
        x = child(block, name)(x)
    return x if stage.conv is None else child(block, stage.conv)(x)


def _normalise(
    block: nn.Module,
    stage: Stage,
    x: Tensor,
    residual: Tensor | None = None,
    shortcut: Stage | None = None,
    act: Act | None = None,
    backend: str | None = None,
) -> Tensor:
    """Applies the norm of ``stage`` to ``x`` and the norm of ``shortcut`` to ``residual``, where
    there are any; then the add and ``act``."""
    if act is None:
        act = "relu" if stage.relu else "none"
    if stage.norm is None:
        return F.relu(x) if act == "relu" else x
    if x.dim() != 4:  # before the norm counts the batch
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    bn, second = child(block, stage.norm), None
    group = group_of(bn)
    if shortcut is not None and shortcut.norm is not None:
        second = child(block, shortcut.norm)
        if group_of(second) is not group:
            residual, second = _normalise(block, shortcut, residual, backend=backend), None
    norms = norm_of(bn), None if second is None else norm_of(second)
    if group is None:
        return bn_act_norms(x, norms[0], residual, norms[1], act, backend)
    return sync_bn_act(x, norms[0], group, residual, norms[1], act, backend)


def _stage_of_whole(block: nn.Module, stage: Stage) -> tuple[ConvNorm, Tensor | None] | None:
    """A stage as an argument of ``res_block``, and its BatchNorm's counter of batches; None where
    ``res_block`` would compute something else.

    It reads the modules' dictionaries: attribute lookups cost more than the kernels of a small
    block.
    """
    if stage.before or stage.conv is None or stage.norm is None:
        return None
    conv, bn = child(block, stage.conv), child(block, stage.norm)
    frozen = is_frozen(bn)
    if (
        conv.padding_mode != "zeros"
        or (not frozen and bn.momentum is None)  # needs the counter, which is on the device
        or group_of(bn) is not None
    ):
        return None
    kernel, affine, state = conv._parameters, bn._parameters, bn._buffers
    if frozen:
        affine = state = {"num_batches_tracked": None, **state}
    try:
        weight, bias = kernel["weight"], kernel["bias"]
        gamma, beta, counter = affine["weight"], affine["bias"], state["num_batches_tracked"]
        mean, var = state["running_mean"], state["running_var"]
    except KeyError:  # one is a plain attribute, or was removed
        return None
    sizes = conv.stride, conv.padding, conv.dilation
    for size in sizes:
        if type(size) is not tuple or len(size) != 2:
            if isinstance(conv.padding, str):
                return None
            sizes = tuple(map(pair, sizes))
            break
    if (gamma is None) != (beta is None):
        return None
    training = not frozen and (bn.training or mean is None)
    if training and (not bn.track_running_stats or counter is None):
        return None
    momentum = 0.0 if frozen else bn.momentum
    norm = Norm(mean, var, gamma, beta, training, momentum, bn.eps)
    found = ConvNorm(weight, bias, *sizes, conv.groups, norm)
    return found, counter if training else None


class Arguments(NamedTuple):
    """A block as arguments of ``res_block``, and its BatchNorms' counters of batches."""

    branch: list[ConvNorm]
    shortcut: Shortcut
    act: Act
    counters: list[Tensor]


def run_whole(block: nn.Module, plan: BlockPlan, x: Tensor) -> Tensor | Eager | None:
    """Runs the plan in one op; returns None where it has to run stage by stage, ``Eager`` where
    dispatch takes PyTorch's ops."""
    found = arguments_of(block, plan)
    if found is None:
        return None
    *of, counters = found
    return whole(x, *of, block.backend, counters, block.recompute)


def arguments_of(block: nn.Module, plan: BlockPlan) -> Arguments | None:
    """The arguments for ``res_block``; None where it cannot run the plan."""
    if torch.compiler.is_compiling() or plan.skip == "concat":
        return None
    stages = []
    for stage in plan.stages:
        found = _stage_of_whole(block, stage)
        if found is None:
            return None
        stages.append(found)
    if not all(stage.relu for stage in plan.branch[:-1]):
        return None
    shortcut = None if plan.skip == "add" else False
    if plan.shortcut is not None:
        shortcut = stages[-1][0]
    branch = [stage for stage, _ in stages[: len(plan.branch)]]
    counters = [counter for _, counter in stages if counter is not None]
    return Arguments(branch, shortcut, plan.act, counters)


def add_shortcut(plan: BlockPlan, out: Tensor, residual: Tensor) -> Tensor:
    """The add and the ReLU after it, in PyTorch's ops: they broadcast shapes and promote dtypes."""
    if plan.into == "shortcut":
        out, residual = residual, out
    out = operator.iadd(out, residual) if plan.into else out + residual
    return F.relu(out) if plan.relu else out


def run_stages(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None, backend: str | None
) -> Tensor:
    """Runs the plan with one op for each norm, on a backend."""
    normalise = partial(_normalise, backend=backend)
    *inner, last = plan.branch
    out = x
    for stage in inner:
        out = normalise(block, stage, _convolve(block, stage, out))
    out = _convolve(block, last, out)
    if plan.skip == "none":
        return normalise(block, last, out, act=plan.act)
    if plan.skip == "concat":
        out = torch.cat((x, normalise(block, last, out)), dim=1)
        return F.relu(out) if plan.relu else out
    shortcut = plan.shortcut
    residual = x if residual is None else residual
    if shortcut is not None:
        residual = _convolve(block, shortcut, residual)
    alike = isinstance(residual, Tensor) and residual.shape == out.shape
    if last.norm is not None and alike and residual.dtype == out.dtype:
        return normalise(block, last, out, residual, shortcut, plan.act)
    if shortcut is not None:
        residual = normalise(block, shortcut, residual)
    return add_shortcut(plan, normalise(block, last, out), residual)
