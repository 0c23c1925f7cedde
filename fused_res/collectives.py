"""Differentiable collectives. The gradients are those of the sum of all processes' losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group, t = group, t.contiguous()
        gathered = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, t, group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g, ctx.group)[dist.get_rank(ctx.group)], None


def all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``t`` over the processes of ``group``; it has the shape of ``t``."""
    return _AllReduce.apply(t, group)


def all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``t`` of every process of ``group``, in the order of ranks: (processes, *t.shape)."""
    return _AllGather.apply(t, group)
