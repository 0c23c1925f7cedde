"""Residual blocks one after the other in an ``nn.Sequential``, as one call for inference.

``fuse_`` makes a ``FusedSequential`` of an ``nn.Sequential`` that has such blocks. It keeps its
children, keys and hooks: what has a hook, trains, or is no such block is called as ever, and the
blocks before and after it are calls of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..folds import stamp
from ..ops.conv_bn_act import PLAIN, under_modes
from ..ops.res_chain import Link, prepared_chain
from .blocks import MOST_SIZES, BlockPlan, FusedForward, _key, child, conv_norm_of, has_hooks
from .watch import Watch


def links(module: nn.Module) -> bool:
    """Whether a module is a block that may be part of a chain, by its plan."""
    plan: BlockPlan | None = module.plan if isinstance(module, FusedForward) else None
    return (
        plan is not None
        and plan.skip == "add"
        and plan.shortcut is None
        and all(s.conv is not None and not s.before for s in plan.branch)
        and all(s.relu for s in plan.branch[:-1])
    )


def has_chain(container: nn.Sequential) -> bool:
    """Whether two blocks that may be part of a chain follow each other."""
    return any(a and b for a, b in pairwise(map(links, container)))


def link(block: nn.Module) -> Link | None:
    """A block as ``res_chain`` takes it; None where it is to be called."""
    if not links(block) or "forward" in block.__dict__ or not block._bypasses_safely():
        return None
    if any(map(has_hooks, block.modules())):
        return None
    convs = []
    for stage in block.plan.branch:
        bn = None if stage.norm is None else child(block, stage.norm)
        if bn is not None and (bn.training or bn.running_mean is None):
            return None
        conv = conv_norm_of(child(block, stage.conv), bn)
        if conv is None:
            return None
        convs.append(conv)
    before = block.plan.branch[-1].relu
    act = "relu_before_add" if before else "relu" if block.plan.relu else "none"
    return Link(tuple(convs), act)


def tensors_of(modules: list[nn.Module]) -> list[Tensor] | None:
    """Their parameters and buffers; None where one can change unseen."""
    found = [t for m in modules for own in (m._parameters, m._buffers) for t in own.values()]
    tensors = {id(t): t for t in found if t is not None}
    return None if any(t.is_inference() for t in tensors.values()) else list(tensors.values())


class _Kept(NamedTuple):
    """What runs inputs of one size, while nothing changes that it was made of."""

    children: list[nn.Module]
    watch: Watch
    tensors: list[Tensor]
    stamp: tuple
    steps: list[Callable[[Tensor], Tensor]]

    def holds(self, container: nn.Module) -> bool:
        return (
            list(container._modules.values()) == self.children
            and self.watch.holds()
            and stamp(self.tensors) == self.stamp
        )


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` whose residual blocks run in one call where no gradient is wanted, on a CPU
    in float32."""

    original = nn.Sequential

    def forward(self, x):
        if type(x) not in PLAIN or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if not x.is_cpu or x.dim() != 4 or under_modes(x) or _has_any_global_hook():
            return super().forward(x)
        key, sizes = _key(x), self.__dict__.setdefault("_kept", {})
        kept = sizes.get(key)
        if kept is None:
            return self._prepare(x, key)
        if not kept.holds(self):
            sizes.clear()  # they keep what was replaced
            return self._prepare(x, key)
        for step in kept.steps:
            x = step(x)
        return x

    def _prepare(self, x: Tensor, key: tuple) -> Tensor:
        blocks = list(self)
        made = list(map(link, blocks))
        modules = [m for block in blocks if links(block) for m in block.modules()]
        watch, tensors = Watch(modules), tensors_of(modules)
        before = None if tensors is None else stamp(tensors)
        steps, i = [], 0
        while i < len(blocks):
            end = i
            while end < len(blocks) and made[end] and blocks[end].backend == blocks[i].backend:
                end += 1
            run = prepared_chain(x, made[i:end], blocks[i].backend) if end - i > 1 else None
            if run is None:
                run, end = blocks[i], i + 1
            steps.append(run)
            x, i = run(x), end
        chained = len(steps) < len(blocks)
        if chained and before is not None and watch.holds() and stamp(tensors) == before:
            while len(self._kept) >= MOST_SIZES:
                self._kept.pop(next(iter(tuple(self._kept))), None)
            self._kept[key] = _Kept(blocks, watch, tensors, before, steps)
        return x

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def unchain(container: FusedSequential) -> None:
    """Makes it a plain ``nn.Sequential`` again."""
    container.__dict__.pop("_kept", None)
    container.__class__ = nn.Sequential
