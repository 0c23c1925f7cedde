"""Blocks that run their own forward, because dispatch takes PyTorch's ops for all of it.

Such a block must cost no more than one that was never fused. So nothing else is asked: a block's
own forward is right whatever has changed.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import backends, first_use, inference_conv

# block -> the facts of calls for which PyTorch's ops were chosen
_left: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()
_MOST_LEFT = 64
_CPU = torch.device("cpu")


def _facts(block: nn.Module, x: Tensor) -> tuple:
    modes = torch.is_autocast_enabled(x.device.type), torch.is_grad_enabled(), block.training
    return x.shape, x.stride(), x.dtype, x.device, modes, inference_conv.state()


def runs_own_forward(block: nn.Module, x: Tensor) -> bool:
    """Whether PyTorch's ops run the block, as the backend that is named or dispatch says."""
    if torch.compiler.is_compiling():
        return False
    name = block.backend or backends.named()
    if name != "auto":
        return name == "eager"
    # A device is a new object each time, which costs more than all else here.
    device_type = "cpu" if x.is_cpu else x.device.type
    never = backends.never_fused(device_type, x.dtype)
    if never or device_type not in first_use.DEVICE_TYPES:
        return never
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


# block -> the fields of its last input: they change in place, which costs less than another entry
_inputs: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def note(block: nn.Module, x: Tensor, chained: bool = False) -> None:
    """Remembers the facts of a block's input, for ``fused_res.report``."""
    if torch.compiler.is_compiling():
        return
    fields = _inputs.get(block)
    if fields is None:
        fields = _inputs[block] = []
    device, autocast = _CPU if x.is_cpu else x.device, None
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    fields[:] = (x.shape, x.stride(), x.dtype, device, torch.is_grad_enabled(), block.training,
                 autocast, chained)  # fmt: skip


def last_input(block: nn.Module) -> Input | None:
    fields = _inputs.get(block)
    return Input(*fields) if fields else None


def leave(block: nn.Module, x: Tensor) -> None:
    """From now on the block runs its own forward for inputs like x."""
    note(block, x)
    found = _left.setdefault(block, set())
    if len(found) >= _MOST_LEFT:
        found.clear()
    found.add(_facts(block, x))
