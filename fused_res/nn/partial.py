"""Blocks of which only parts run fused: what ``fuse_`` makes of those with more in them than
convolutions, BatchNorms, ReLUs and one add (squeeze-and-excitation, pre-activation, ...).

Their forward is written anew, as Python source, from its trace: a ``BlockPlan`` for each part, all
else as it was.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..run.guards import Record
from .blocks import (
    BlockPlan,
    FusedForward,
    Unplanned,
    child,
    is_exported,
    is_for_kernels,
    run_block,
)


class Program(NamedTuple):
    """A forward whose parts are ``self._part_0(x, residual)`` and so on.

    source: of a function ``forward``.
    names: its globals, by name.
    parts: what ``_part_0``, ... run.
    """

    source: str
    names: tuple[tuple[str, object], ...]
    parts: tuple[BlockPlan, ...]


class PartsPlan(NamedTuple):
    """How a block runs in parts.

    usual: what it runs.
    quiet: what it runs while ``quieted`` are in eval mode; None: as ever.
    quieted: the children that return their input in eval mode (dropout, drop path), by dotted name.
    inputs: how many tensors its forward takes first; given anything else, its own forward runs.
    reason: why the block as a whole is not one plan.
    frozen, record: as in a ``BlockPlan``.
    """

    usual: Program
    quiet: Program | BlockPlan | None
    quieted: tuple[str, ...]
    inputs: int
    reason: str
    frozen: bool
    record: Record | None = None

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Unplanned, (self.record.opaque,)

    @property
    def norms(self) -> int:
        """How many of its BatchNorms run fused."""
        return sum(len(p.branch) + (p.shortcut is not None) for p in self.usual.parts)


def _part(plan: BlockPlan) -> Callable[..., Tensor]:
    def run(block: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_block(block, plan, x, residual)

    return run


def _function(program: Program) -> Callable[..., Tensor]:
    known = dict(program.names)
    file = f"<fused_res forward {hash(program.source):x}>"  # a name that tracebacks find it by
    linecache.cache[file] = len(program.source), None, program.source.splitlines(True), file
    exec(compile(program.source, file, "exec"), known)
    return known["forward"]


def methods(plan: PartsPlan) -> dict[str, Callable]:
    """What a class of blocks with this plan has."""
    found = {"_usual": _function(plan.usual)}
    found |= {f"_part_{i}": _part(part) for i, part in enumerate(plan.usual.parts)}
    if isinstance(plan.quiet, Program):
        found["_quiet"] = _function(plan.quiet)
        found |= {f"_quiet_part_{i}": _part(part) for i, part in enumerate(plan.quiet.parts)}
    elif plan.quiet is not None:
        found["_quiet"] = lambda block, x, *_: run_block(block, plan.quiet, x)
    return found


class FusedParts(FusedForward):
    """Mixin in front of a block's own class: runs its ``PartsPlan`` where that does the same as its
    forward."""

    plan: PartsPlan

    def forward(self, *args, **kwargs):
        plan = self.plan
        plain = kwargs or len(args) < plan.inputs
        plain = plain or not all(map(is_for_kernels, args[: plan.inputs]))
        if plain or is_exported() or not self._is_as_recorded() or self._promotes(args[0]):
            return super(FusedForward, self).forward(*args, **kwargs)
        if plan.quiet is not None and not any(child(self, n).training for n in plan.quieted):
            return self._quiet(*args)
        return self._usual(*args)
