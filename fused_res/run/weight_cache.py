"""Weights as kernels take them, and when they must be made again.

On a CPU a convolution runs on packed weights: multiplied by BatchNorm's scale and laid out for its
kernel. They are kept outside of the modules, so no ``state_dict``, copy or pickle has them, and
live as long as the weight does. Each use compares a fingerprint of all that they were made from:
addresses, version counters (which most in-place changes count up), how many steps optimizers have
made (PyTorch's fused ones do not count) and samples of the values (nor do changes through
``.data``). Another thread may write to the weights meanwhile: the fingerprint is taken before they
are read, and what was made of them is kept only if it is the same afterwards. On a GPU nothing is
kept: kernels read the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..dispatch.backends import STATUS
from ..ops import library
from ..reference import ConvNorm

library.define("fingerprint(Tensor[] tensors) -> int")

MOST_PER_WEIGHT = 4  # BatchNorms that share a convolution, dtypes under autocast


class _Packed(NamedTuple):
    fingerprint: tuple
    value: Any


# Of a weight's storage: torch.utils.swap_tensors refuses tensors that have a weak reference.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def scale_and_shift(conv: ConvNorm) -> tuple[Tensor | None, Tensor | None]:
    """BatchNorm after a convolution with a bias as ``scale * y + shift``: (K,) each, float64;
    None for 1 and 0."""
    bias = None if conv.bias is None else conv.bias.double()
    if conv.norm is None:
        return None, bias
    mean, var, weight, beta, _, _, eps = conv.norm
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -scale * (mean.double() if bias is None else mean.double() - bias)
    return scale, shift if beta is None else shift + beta.double()


def _tensors(conv: ConvNorm) -> list[Tensor]:
    return [t for t in (conv.weight, conv.bias, *(conv.norm or ())[:4]) if t is not None]


# Changes that tensors do not show: optimizers' steps, and what users tell. None: nothing has a
# fingerprint yet, and programs without fused blocks have no hook on their optimizers.
_changes: int | None = None


def _count_change(*_) -> None:
    global _changes
    _changes += 1


def _count_changes() -> None:
    global _changes
    _changes = 0
    register_optimizer_step_post_hook(_count_change)


def forget_weights() -> None:
    """Makes all packed weights new, and all that was made from them, when they are used next."""
    if _changes is not None:
        _count_change()


def fingerprint(tensors: list[Tensor]) -> tuple:
    """Changes whenever what is made of ``tensors``, which are no inference tensors, may."""
    if STATUS["cpu"] is not None:  # nothing is packed without the library
        return (object(),)
    if _changes is None:
        _count_changes()
    if not tensors:
        return (_changes,)
    return _changes, torch.ops.fused_res.fingerprint(tensors), *[t._version for t in tensors]


def packed_weights(
    conv: ConvNorm, kind: tuple, make: Callable[[], Any], second: ConvNorm | None = None
) -> Any:
    """``make()``, or what it made before if nothing has changed that it is made of.

    Args:
        conv, second: what it is made of.
        kind: what is made, hashable: with everything that matters beside their tensors.
    """
    convs = (conv,) if second is None else (conv, second)
    tensors = [t for c in convs for t in _tensors(c)]
    if any(t.is_inference() for t in tensors):  # these have no version counter
        return make()
    eps = [None if c.norm is None else c.norm.eps for c in convs]
    now = *eps, *fingerprint(tensors)
    where = conv.weight.data_ptr()
    kind = (where, kind, *map(id, tensors))
    of_storage = _packed.setdefault(conv.weight.untyped_storage(), {})
    kept = of_storage.get(kind)
    if kept is not None and kept.fingerprint == now:
        return kept.value
    with torch.no_grad():
        value = make()
    if (*eps, *fingerprint(tensors)) != now:
        return value  # of weights that another thread writes
    others = [k for k in tuple(of_storage) if k[0] == where and k != kind]
    for old in others[: max(len(others) + 1 - MOST_PER_WEIGHT, 0)]:
        of_storage.pop(old, None)
    of_storage[kind] = _Packed(now, value)
    return value
