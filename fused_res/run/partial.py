"""The methods that run a partial plan: its programs, and the segments that the programs call."""

from __future__ import annotations

import linecache
from collections.abc import Callable

from torch import Tensor, nn

from ..fuse.plan import BlockPlan, PartialPlan, Program
from .block import run_segment


def _segment(plan: BlockPlan) -> Callable[..., Tensor]:
    def run(block: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_segment(block, plan, x, residual)

    return run


def _function(program: Program) -> Callable[..., Tensor]:
    known = dict(program.names)
    file = f"<fused_res forward {hash(program.source):x}>"  # tracebacks look this up
    linecache.cache[file] = len(program.source), None, program.source.splitlines(True), file
    exec(compile(program.source, file, "exec"), known)
    return known["forward"]


def methods(plan: PartialPlan) -> dict[str, Callable]:
    """The methods of a class of blocks with this plan, by name."""
    found = {"_usual": _function(plan.usual)}
    found |= {f"_segment_{i}": _segment(segment) for i, segment in enumerate(plan.usual.segments)}
    if isinstance(plan.quiet, Program):
        found["_quiet"] = _function(plan.quiet)
        segments = enumerate(plan.quiet.segments)
        found |= {f"_quiet_segment_{i}": _segment(segment) for i, segment in segments}
    elif plan.quiet is not None:
        found["_quiet"] = lambda block, x, *_: run_segment(block, plan.quiet, x)
    return found
