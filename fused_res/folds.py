"""What is derived from a convolution's weight and its BatchNorm, and when it must be made again.

On a CPU a convolution runs on a weight multiplied by BatchNorm's scale and laid out for its kernel.
That copy is kept outside the modules, so no ``state_dict``, copy or pickle has it, and lives as
long as the weight does. Each use compares a stamp of all it was made from: addresses, version
counters (every in-place change counts up), and samples of the values, because a change through
``.data`` does not count. On a GPU nothing is kept: kernels read the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .ops import library
from .reference import ConvNorm

library.define("stamp(Tensor[] tensors) -> int")

MOST_PER_WEIGHT = 4  # BatchNorms that share a convolution, dtypes under autocast


class _Fold(NamedTuple):
    stamp: tuple
    value: Any


# Of a weight's storage: torch.utils.swap_tensors refuses tensors that have a weak reference.
_folds: WeakIdKeyDictionary = WeakIdKeyDictionary()


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


def _stamp(tensors: list[Tensor], eps: tuple) -> tuple | None:
    """Changes whenever what is made of ``tensors`` may; None where that cannot be told."""
    if any(t.is_inference() for t in tensors):  # these have no version counter
        return None
    versions = [t._version for t in tensors]
    return eps, *versions, torch.ops.fused_res.stamp(tensors)


def folded(
    conv: ConvNorm, kind: tuple, make: Callable[[], Any], second: ConvNorm | None = None
) -> Any:
    """``make()``, or what it made before if nothing has changed that it is made of.

    Args:
        conv, second: what it is made of.
        kind: what is made, hashable: with everything that matters beside their tensors.
    """
    convs = (conv,) if second is None else (conv, second)
    tensors = [t for c in convs for t in _tensors(c)]
    stamp = _stamp(tensors, tuple(None if c.norm is None else c.norm.eps for c in convs))
    if stamp is None:
        return make()
    where = conv.weight.data_ptr()
    kind = (where, kind, *map(id, tensors))
    of_storage = _folds.setdefault(conv.weight.untyped_storage(), {})
    kept = of_storage.get(kind)
    if kept is None or kept.stamp != stamp:
        with torch.no_grad():
            kept = _Fold(stamp, make())
        others = [k for k in tuple(of_storage) if k[0] == where and k != kind]
        for old in others[: len(others) + 1 - MOST_PER_WEIGHT]:
            of_storage.pop(old, None)
        of_storage[kind] = kept
    return kept.value
