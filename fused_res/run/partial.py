"""A partial plan as methods of a block's class: its programs, and the segments that they call."""

from __future__ import annotations

import linecache
from collections.abc import Callable

from torch import Tensor, nn

from ..fuse.plan import BlockPlan, PartialPlan, Program
from .block import run_block


def _segment(plan: BlockPlan) -> Callable[..., Tensor]:
    def run(block: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_block(block, plan, x, residual)

    return run


def _function(program: Program) -> Callable[..., Tensor]:
    known = dict(program.names)
    file = f"<fused_res forward {hash(program.source):x}>"  # a name that tracebacks find it by
    linecache.cache[file] = len(program.source), None, program.source.splitlines(True), file
    exec(compile(program.source, file, "exec"), known)
    return known["forward"]


def methods(plan: PartialPlan) -> dict[str, Callable]:
    """The methods that a class of blocks with this plan has, by name."""
    found = {"_usual": _function(plan.usual)}
    found |= {f"_segment_{i}": _segment(part) for i, part in enumerate(plan.usual.segments)}
    if isinstance(plan.quiet, Program):
        found["_quiet"] = _function(plan.quiet)
        segments = enumerate(plan.quiet.segments)
        found |= {f"_quiet_segment_{i}": _segment(part) for i, part in segments}
    elif plan.quiet is not None:
        found["_quiet"] = lambda block, x, *_: run_block(block, plan.quiet, x)
    return found
