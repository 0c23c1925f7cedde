"""The place of a run: a device, and the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # here, because a later import by DDP would keep the process group
from torch import Tensor, nn

from ..cli import UsageError
from ..fuse.modules import norm_of
from ..nn.blocks import FusedForward, FusedPartialForward
from ..ops.sync_bn_act import sync_bn_act


class Place(NamedTuple):
    """A device, and one process of ``world``. With one process its methods change nothing."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def share(self, t: Tensor) -> Tensor:
        """This process's share of a batch; the shares are equal up to one image, in rank order."""
        return t.tensor_split(self.world)[self.rank]

    def sum(self, t: Tensor) -> Tensor:
        if self.world > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. Uses gloo, which does not wait for a GPU."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every process the first one's buffers, among them the running statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


@contextlib.contextmanager
def at(device: str) -> Iterator[Place]:
    """The place for ``--device``; under torchrun with a process group."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not launched():
        yield Place(torch.device(kind))
        return
    local = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        torch.cuda.set_device(local)
    # gloo beside nccl, for tensors on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        yield Place(where, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class SyncBatchNorm(nn.SyncBatchNorm):
    """For norms outside fused blocks: PyTorch's SyncBatchNorm does not run on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.is_cpu):
            return super().forward(x)
        return sync_bn_act(x, norm_of(self), self.process_group or dist.group.WORLD, act="none")


def synchronize_(wrapped: nn.Module) -> None:
    """Makes all processes share the statistics of every BatchNorm of a model.

    The model is wrapped in DistributedDataParallel already, which on a CPU refuses a model with a
    SyncBatchNorm.
    """
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
    fused = set()
    for block in wrapped.modules():
        norms = [m for m in block.modules() if type(m) is nn.SyncBatchNorm]
        whole = not isinstance(block, FusedPartialForward) or block.plan.norms == len(norms)
        if isinstance(block, FusedForward) and whole:
            fused.update(norms)
    for module in wrapped.modules():
        if type(module) is nn.SyncBatchNorm and module not in fused:
            module.__class__ = SyncBatchNorm
