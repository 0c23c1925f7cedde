"""Consecutive residual blocks as one call for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fuse.modules import child, conv_norm_of, tensors_of, uses_batch
from ..fuse.plan import BlockPlan, runs_plan
from ..ops.conv_bn_act import PLAIN
from ..ops.res_chain import Chain, CudaChain, Link, fits, is_for, prepared_chain
from .description import has_hooks
from .guards import ModulesGuard, guard_of
from .kept import Kept
from .own_forward import note
from .places import Places
from .weight_cache import fingerprint


def is_link(module: nn.Module) -> bool:
    """Whether the class and plan of a module allow it in a chain of blocks."""
    return runs_plan(module) and may_link(module.plan)


def may_link(plan: BlockPlan) -> bool:
    """Whether the plan of a block allows it in a chain."""
    return (
        plan.skip == "add"
        and plan.shortcut is None
        and all(s.conv is not None and not s.before for s in plan.branch)
        and all(s.relu for s in plan.branch[:-1])
    )


def has_chain(container: nn.Sequential) -> bool:
    """Whether two blocks that ``is_link`` allows follow each other."""
    return any(a and b for a, b in pairwise(map(is_link, container)))


class LinkedBlock(NamedTuple):
    """A block as an argument of ``res_chain``, its tensors, and the places that its forward
    read."""

    link: Link
    tensors: list[Tensor]
    places: Places


def linked(block: nn.Module) -> LinkedBlock | None:
    """The block as a link of a chain; None where the block has to be called."""
    if not is_link(block) or "forward" in block.__dict__ or not block._is_as_recorded():
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
    return LinkedBlock(Link(tuple(convs), block.plan.act), tensors, places)


def chain_of(
    blocks: list[nn.Module], made: list[LinkedBlock | None], x: Tensor
) -> tuple[Chain | CudaChain | None, int]:
    """A chain of the first blocks for inputs like ``x``, and the number of these blocks; (None, 1)
    where the first block has to be called."""
    count, chain = 0, None
    usable = type(x) in PLAIN and is_for(x)
    while usable and count < len(blocks) and made[count] is not None:
        if blocks[count].backend != blocks[0].backend or not fits(x, made[count].link):
            break
        count += 1
    if count > 1:
        chain = prepared_chain(x, [one.link for one in made[:count]], blocks[0].backend)
    return (None, 1) if chain is None else (chain, count)


def places_of(made: Iterable[Any]) -> Places:
    """The places of all items; an item may be None."""
    places = Places()
    for one in made:
        if one is not None:
            places.add(one.places)
    return places


def unique_tensors(made: Iterable[Any]) -> list[Tensor]:
    """The tensors of all items, each once; an item may be None."""
    return list({id(t): t for one in made if one is not None for t in one.tensors}.values())


def _step(
    chain: Chain | CudaChain, blocks: list[nn.Module], x: Tensor
) -> Callable[[Tensor], Tensor]:
    """A step that runs the chain for tensors like ``x``, and block after block for others."""
    like = type(x), x.shape, x.stride(), x.dtype, x.device

    def step(x: Tensor) -> Tensor:
        if (type(x), x.shape, x.stride(), x.dtype, x.device) == like:
            return chain(x)
        for block in blocks:
            x = block(x)
        return x

    return step


def run_container(container: nn.Sequential, x: Tensor) -> tuple[Tensor, Kept | None]:
    """Runs a container, its blocks as chains where possible; returns the result and the steps to
    keep."""
    blocks = list(container)
    modules = [m for block in blocks if is_link(block) for m in block.modules()]
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        return nn.Sequential.forward(container, x), None
    guard, made = ModulesGuard(container, modules), list(map(linked, blocks))
    places = places_of(made)
    tensors = [] if x.is_cuda else unique_tensors(made)  # a CUDA kernel reads them in every call
    before = fingerprint(tensors)
    steps, i = [], 0
    while i < len(blocks):
        chain, count = chain_of(blocks[i:], made[i:], x)
        step = blocks[i] if chain is None else _step(chain, blocks[i : i + count], x)
        if chain is not None:
            for block in blocks[i : i + count]:  # their inputs are alike
                note(block, x, chained=True)
        steps.append(step)
        x, i = step(x), i + count
    kept = Kept(steps, guard, places, tensors, before)
    return x, kept if kept.passes(container) else None  # kept even if no blocks form a chain
