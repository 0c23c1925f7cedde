"""Chooses how a plan runs: by kept steps, for inference, in one op, or stage by stage."""

from __future__ import annotations

from torch import Tensor, nn

from ..dispatch import first_use
from ..fuse.plan import BlockPlan
from ..ops.res_block import Eager
from . import inference, training
from .own_forward import note


def run_segment(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Runs a segment of a block; arguments as of ``run_block``."""
    y = run_block(block, plan, x, residual)
    if isinstance(y, Eager):
        return training.run_stages(block, plan, x, residual, "eager")
    return y


def run_block(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None = None
) -> Tensor | Eager:
    """Runs a block, or a segment of it. Each norm is fused with the add and ReLU that follow it.
    Nothing is done, and the result is ``Eager``, where dispatch takes PyTorch's ops for all of it.

    Args:
        residual: the input of the shortcut; default: ``x``.
    """
    kept = inference.kept_for(block, plan, x, residual)
    if kept is not None:
        adds_x = residual is None and plan.skip != "none"
        return inference.run_kept(kept, x, x if adds_x else residual)
    note(block, x)
    first_use.caller = id(block)
    convs = inference.convolutions_of(block, plan, x, residual)
    if convs is not None:
        return inference.run(block, plan, convs, x, residual)
    y = training.run_whole(block, plan, x) if residual is None else None
    return training.run_stages(block, plan, x, residual, block.backend) if y is None else y
