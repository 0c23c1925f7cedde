"""Packed weights, and the fingerprint that tells when they must be made again.

On a CPU a convolution runs on packed weights: multiplied by BatchNorm's scale and laid out for its
kernel. They are kept outside of the modules, so no ``state_dict``, copy or pickle has them. They
live as long as the weight. Each use compares a fingerprint of the tensors that they were made from:

- addresses and version counters, which most in-place changes increase;
- the number of optimizer steps, because PyTorch's fused optimizers leave version counters alone;
- samples of the values, because changes through ``.data`` leave version counters alone too.

Another thread may write to the weights meanwhile. So the fingerprint is taken before the weights
are read, and packed weights are kept only if it is the same afterwards. On a GPU nothing is kept:
kernels read the parameters themselves.
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


# By storage: torch.utils.swap_tensors refuses tensors that have a weak reference.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def scale_and_shift(conv: ConvNorm) -> tuple[Tensor | None, Tensor | None]:
    """A convolution's bias and BatchNorm as ``scale * y + shift``, each (K,), float64, or None for
    1 and 0."""
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


# The number of optimizer steps and of calls of ``refresh``. None: no fingerprint was taken yet, so
# a program without fused blocks has no hook on its optimizers.
_changes: int | None = None


def _count_change(*_) -> None:
    global _changes
    _changes += 1


def _count_changes() -> None:
    global _changes
    _changes = 0
    register_optimizer_step_post_hook(_count_change)


def forget_weights() -> None:
    """Changes every fingerprint, so that packed weights are made again at their next use."""
    if _changes is not None:
        _count_change()


def fingerprint(tensors: list[Tensor]) -> tuple:
    """A tuple that changes when ``tensors`` may have changed. No inference tensors."""
    if STATUS["cpu"] is not None:  # nothing is packed without CPU kernels
        return (object(),)
    if _changes is None:
        _count_changes()
    if not tensors:
        return (_changes,)
    return _changes, torch.ops.fused_res.fingerprint(tensors), *[t._version for t in tensors]


def packed_weights(
    conv: ConvNorm, kind: tuple, make: Callable[[], Any], second: ConvNorm | None = None
) -> Any:
    """``make()``, or its earlier result if the tensors are unchanged.

    Args:
        conv, second: the convolutions that ``make`` reads.
        kind: a hashable key of the result: everything that it depends on beside the tensors.
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
        return value  # another thread has changed the weights
    others = [k for k in tuple(of_storage) if k[0] == where and k != kind]
    for old in others[: max(len(others) + 1 - MOST_PER_WEIGHT, 0)]:
        of_storage.pop(old, None)
    of_storage[kind] = _Packed(now, value)
    return value
