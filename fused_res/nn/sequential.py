"""Residual blocks one after the other in an ``nn.Sequential``, as one call for inference.

``fuse_`` makes a ``FusedSequential`` of an ``nn.Sequential`` that has such blocks. It keeps its
children, keys and hooks: what has a hook, trains, or is no such block is called as ever, and the
blocks before and after it are calls of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch.backends import named
from ..ops.conv_bn_act import PLAIN, under_modes
from ..ops.res_chain import Chain, CudaChain, Link, fits, is_for, prepared_chain
from ..run.description import has_hooks
from ..run.guards import Watch, guard_of
from ..run.places import Places
from ..run.weight_cache import fingerprint
from .blocks import (
    MOST_SIZES,
    BlockPlan,
    _key,
    child,
    conv_norm_of,
    plain_twin,
    runs_plan,
    tensors_of,
    uses_batch,
)


def links(module: nn.Module) -> bool:
    """Whether a module is a block that may be part of a chain, by its class and plan."""
    if not runs_plan(module):
        return False
    plan: BlockPlan = module.plan
    return (
        plan.skip == "add"
        and plan.shortcut is None
        and all(s.conv is not None and not s.before for s in plan.branch)
        and all(s.relu for s in plan.branch[:-1])
    )


def has_chain(container: nn.Sequential) -> bool:
    """Whether two blocks that may be part of a chain follow each other."""
    return any(a and b for a, b in pairwise(map(links, container)))


class Linked(NamedTuple):
    """A block as ``res_chain`` takes it, the tensors that it is made of, and what else its forward
    read."""

    link: Link
    tensors: list[Tensor]
    places: Places


def linked(block: nn.Module) -> Linked | None:
    """None where the block is to be called."""
    if not links(block) or "forward" in block.__dict__ or not block._is_as_recorded():
        return None
    places = guard_of(block, block.plan.record).places
    if places is None or any(map(has_hooks, block.modules())):
        return None
    convs, tensors = [], []
    for stage in block.plan.branch:
        module = child(block, stage.conv)
        bn = None if stage.norm is None else child(block, stage.norm)
        if bn is not None and uses_batch(bn):
            return None
        conv = conv_norm_of(module, bn)
        found = None if conv is None else tensors_of(module, bn)
        if found is None:
            return None
        convs.append(conv)
        tensors += found
    before = block.plan.branch[-1].relu
    act = "relu" if block.plan.relu else "relu_before_add" if before else "none"
    return Linked(Link(tuple(convs), act), tensors, places)


def chain_of(
    blocks: list[nn.Module], made: list[Linked | None], x: Tensor
) -> tuple[Chain | CudaChain | None, int]:
    """Of the first blocks, a chain and how many are in it, of inputs like x; None, 1 where the
    first is to be called."""
    count, chain = 0, None
    usable = type(x) in PLAIN and is_for(x)
    while usable and count < len(blocks) and made[count] is not None:
        if blocks[count].backend != blocks[0].backend or not fits(x, made[count].link):
            break
        count += 1
    if count > 1:
        chain = prepared_chain(x, [one.link for one in made[:count]], blocks[0].backend)
    return (None, 1) if chain is None else (chain, count)


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


class _Kept(NamedTuple):
    """What runs inputs of one size, while nothing changes that it was made of."""

    children: list[nn.Module]
    watch: Watch
    places: Places
    tensors: list[Tensor]
    fingerprint: tuple
    steps: list[Callable[[Tensor], Tensor]]

    def holds(self, container: nn.Module) -> bool:
        return (
            list(container._modules.values()) == self.children
            and self.watch.holds()
            and self.places.hold()
            and fingerprint(self.tensors) == self.fingerprint
        )


def _asks_for_cuda(block: nn.Module) -> bool:
    return (getattr(block, "backend", None) or named()) == "cuda"


def _step(
    chain: Chain | CudaChain, blocks: list[nn.Module], x: Tensor
) -> Callable[[Tensor], Tensor]:
    """The chain for tensors like x; block by block for others, which another module may return."""
    like = type(x), x.shape, x.stride(), x.dtype, x.device

    def step(x: Tensor) -> Tensor:
        if (type(x), x.shape, x.stride(), x.dtype, x.device) == like:
            return chain(x)
        for block in blocks:
            x = block(x)
        return x

    return step


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` whose residual blocks run in one call where no gradient is wanted, on a CPU
    in float32; on a CUDA device where its backend is named."""

    def forward(self, input):
        if type(input) not in PLAIN or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        if under_modes(input) or _has_any_global_hook() or not is_for(input):
            return super().forward(input)
        if input.is_cuda and not any(map(_asks_for_cuda, self)):
            return super().forward(input)
        key, sizes = _key(input), self.__dict__.setdefault("_kept", {})
        kept = sizes.get(key)
        if kept is None or not kept.holds(self):
            for size, old in tuple(sizes.items()):  # which keep what was replaced
                if not old.holds(self):
                    sizes.pop(size, None)
            return self._prepare(input, key)
        x = input
        for step in kept.steps:
            x = step(x)
        return x

    def _prepare(self, x: Tensor, key: tuple) -> Tensor:
        blocks = list(self)
        modules = [m for block in blocks if links(block) for m in block.modules()]
        if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
            return super().forward(x)
        watch, made, places = Watch(modules), list(map(linked, blocks)), Places()
        for one in made:
            if one is not None:
                places.add(one.places)
        tensors = unique(t for one in made if one is not None for t in one.tensors)
        if x.is_cuda:  # where they are read in every call
            tensors = []
        before = fingerprint(tensors)
        steps, i = [], 0
        while i < len(blocks):
            chain, count = chain_of(blocks[i:], made[i:], x)
            step = blocks[i] if chain is None else _step(chain, blocks[i : i + count], x)
            steps.append(step)
            x, i = step(x), i + count
        # where nothing is chained, that is kept too
        if watch.holds() and places.hold() and fingerprint(tensors) == before:
            while len(self._kept) >= MOST_SIZES:
                self._kept.pop(next(iter(tuple(self._kept)), None), None)
            self._kept[key] = _Kept(blocks, watch, places, tensors, before, steps)
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        return plain_twin(self)

    def _apply(self, fn, recurse=True):
        self.__dict__.pop("_kept", None)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def unchain(container: FusedSequential) -> None:
    """Makes it a plain ``nn.Sequential`` again."""
    container.__dict__.pop("_kept", None)
    container.__class__ = nn.Sequential
