"""Blocks that run their own forward, because dispatch takes PyTorch's ops for all of it.

Such a block must cost no more than one that was never fused. So nothing else is asked: a block's
own forward is right whatever has changed.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..dispatch import backends, first_use, inference_conv
from .guards import last_guard

# block -> the facts of calls for which PyTorch's ops were chosen
_left: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()
_MOST_LEFT = 64
_CPU = torch.device("cpu")


def _facts(block: nn.Module, x: Tensor) -> tuple:
    modes = torch.is_autocast_enabled(x.device.type), torch.is_grad_enabled(), block.training
    return x.shape, x.stride(), x.dtype, x.device, modes, inference_conv.state()


_is_distributed = dist.is_initialized if dist.is_available() else bool


def _is_synchronized(block: nn.Module) -> bool:
    """Whether it has a SyncBatchNorm, whose own forward cannot run on a CPU."""
    return any(type(m) is nn.SyncBatchNorm for m in block.modules())


def runs_own_forward(block: nn.Module, x: object) -> bool:
    """Whether PyTorch's ops run the block, as the backend that is named or dispatch says.

    A block asks this in every call, before all else. So it calls as little as it can.
    """
    name = block.backend or backends.current
    if name == "eager" or not isinstance(x, Tensor):
        return not (_is_distributed() and _is_synchronized(block))
    if name != "auto":
        return False
    if x.is_cpu and x.dtype not in backends.FUSED_ON_CPU:
        return not (_is_distributed() and _is_synchronized(block))
    if not first_use.covers(x) or torch.compiler.is_compiling():
        return False
    found = _left.get(block)
    return found is not None and _facts(block, x) in found


class Input(NamedTuple):
    """The facts of a call that decide what runs a block.

    autocast: the dtype of autocast; None: it is not active.
    chained: the block ran in one call with those beside it.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    grad: bool
    training: bool
    autocast: torch.dtype | None
    chained: bool


def note(block: nn.Module, x: Tensor, chained: bool = False) -> None:
    """Remembers the facts of a block's input, for ``fused_res.report``. Its guard has them; where
    kept steps run, the guard has these instead."""
    guard = None if torch.compiler.is_compiling() else last_guard(block)
    if guard is None or x.is_meta:
        return
    device, autocast = _CPU if x.is_cpu else x.device, None
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    guard.ran = None
    guard.input = (x.shape, x.stride(), x.dtype, device, torch.is_grad_enabled(), block.training,
                   autocast, chained)  # fmt: skip


def last_input(block: nn.Module) -> Input | None:
    """The facts of a block's last input; None: it was not called since its guard was made."""
    guard = last_guard(block)
    if guard is None:
        return None
    if guard.ran is not None:
        return Input(*guard.ran[:3], _CPU, False, False, None, False)
    return None if guard.input is None else Input(*guard.input)


def leave(block: nn.Module, x: Tensor) -> None:
    """From now on the block runs its own forward for inputs like x."""
    note(block, x)
    found = _left.setdefault(block, set())
    if len(found) >= _MOST_LEFT:
        found.clear()
    found.add(_facts(block, x))
