"""Runs a plan: the path is chosen here."""

from __future__ import annotations

from torch import Tensor, nn

from ..fuse.plan import BlockPlan
from . import inference, training


def run_block(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """A block, or a segment of it, its norms fused with the add and ReLU that follow them.

    Args:
        residual: the input of the shortcut; default: ``x``.
    """
    kept = inference.kept_for(block, plan, x, residual)
    if kept is not None:
        adds_x = residual is None and plan.skip != "none"
        return inference.run_kept(kept, x, x if adds_x else residual)
    convs = inference.convolutions_of(block, plan, x, residual)
    if convs is not None:
        return inference.run(block, plan, convs, x, residual)
    y = training.run_whole(block, plan, x) if residual is None else None
    return training.run_stages(block, plan, x, residual) if y is None else y
