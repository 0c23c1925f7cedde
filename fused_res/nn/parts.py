"""Blocks of which only parts run fused: what ``fuse_`` makes of those with more in them than
convolutions, BatchNorms, ReLUs and one add (squeeze-and-excitation, pre-activation, ...).

Their forward is written anew, as Python source, from its trace: a ``BlockPlan`` for each part, all
else as it was.
"""

from __future__ import annotations

import functools
import importlib
import linecache
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .blocks import BlockPlan, Bypassed, FusedForward, child, is_exported, present, run_block


class Program(NamedTuple):
    """A forward whose parts are ``self._part_0(x, residual)`` and so on.

    source: of a function ``forward``.
    names: its globals, as (name, module, attribute of it or "").
    parts: what ``_part_0``, ... run.
    """

    source: str
    names: tuple[tuple[str, str, str], ...]
    parts: tuple[BlockPlan, ...]


class PartsPlan(NamedTuple):
    """How a block runs in parts.

    usual: what it runs.
    quiet: what it runs while ``quieted`` are in eval mode; None: as ever.
    quieted: the children that return their input in eval mode (dropout, drop path), by dotted name.
    inputs: how many tensors its forward takes first; given anything else, its own forward runs.
    calls: the children that are called, by dotted name.
    bypassed, frozen: as in a ``BlockPlan``; also what is called in one place and not in another.
    reason: why the block as a whole is not one plan.
    """

    usual: Program
    quiet: Program | BlockPlan | None
    quieted: tuple[str, ...]
    inputs: int
    calls: tuple[str, ...]
    bypassed: tuple[Bypassed, ...]
    reason: str
    frozen: bool

    @property
    def norms(self) -> int:
        """How many of its BatchNorms run fused."""
        return sum(len(p.branch) + (p.shortcut is not None) for p in self.usual.parts)


def _part(plan: BlockPlan) -> Callable[..., Tensor]:
    def run(block: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_block(block, plan, x, residual)

    return run


@functools.cache
def _function(source: str, names: tuple[tuple[str, str, str], ...]) -> Callable[..., Tensor]:
    known = {}
    for name, module, attribute in names:
        value = importlib.import_module(module)
        for part in attribute.split(".") if attribute else ():
            value = getattr(value, part)
        known[name] = value
    file = f"<fused_res forward {len(linecache.cache)}>"  # a name that tracebacks find it by
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), known)
    return known["forward"]


def methods(plan: PartsPlan, original: type[nn.Module]) -> dict[str, Callable]:
    """What a class of blocks with this plan has; its forward has the original's signature."""

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        return FusedParts.forward(self, *args, **kwargs)

    found = {"forward": forward, "_usual": _function(*plan.usual[:2])}
    found |= {f"_part_{i}": _part(part) for i, part in enumerate(plan.usual.parts)}
    if isinstance(plan.quiet, Program):
        found["_quiet"] = _function(*plan.quiet[:2])
        found |= {f"_quiet_part_{i}": _part(part) for i, part in enumerate(plan.quiet.parts)}
    elif plan.quiet is not None:
        found["_quiet"] = lambda block, x, *_: run_block(block, plan.quiet, x)
    return found


class FusedParts(FusedForward):
    """Mixin in front of a block's own class: runs its ``PartsPlan`` where that does the same as its
    forward."""

    plan: PartsPlan

    def _bypasses_safely(self) -> bool:
        there = all(present(self, name) is not None for name in self.plan.calls)
        return there and super()._bypasses_safely()

    def forward(self, *args, **kwargs):
        plan = self.plan
        plain = kwargs or len(args) < plan.inputs
        plain = plain or not all(isinstance(x, Tensor) for x in args[: plan.inputs])
        if plain or is_exported() or not self._bypasses_safely() or self._promotes(args[0]):
            return super(FusedForward, self).forward(*args, **kwargs)
        if plan.quiet is not None and not any(child(self, n).training for n in plan.quieted):
            return self._quiet(*args)
        return self._usual(*args)
