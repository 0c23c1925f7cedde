"""``bn_act`` by the statistics of all processes of a group: ``nn.SyncBatchNorm`` + residual add +
ReLU.

Forward: mean, sum of squared deviations and number of values in each process, one all_gather, then
``bn_act``'s pass over the elements. Backward: ``bn_act``'s sums, one all_reduce, then its pass over
the elements. The residual's BatchNorm shares both collectives. As in PyTorch, batches may differ in
size or be empty, and a process computes the parameters' gradients of its own batch:
DistributedDataParallel averages them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

from .. import reference
from ..collectives import all_gather, all_reduce
from ..dispatch.backends import choose
from ..reference import ACTS, Act, Norm
from .bn_act import _check, _dense_like, _fwd, _op, is_nchw, laid_out, unpack_mask

_STATISTICS = {
    "": torch.ops.fused_res.bn_act_statistics.default,
    "triton": torch.ops.fused_res.bn_act_statistics_triton.default,
}


class _Call(NamedTuple):
    """The arguments of a call, without the tensors that may need gradients."""

    norm: Norm
    residual_norm: Norm | None
    act: Act
    group: dist.ProcessGroup
    backend: str


def _moments(x: Tensor, backend: str) -> Tensor:
    if x.numel() == 0:
        return reference.moments(x)
    return _STATISTICS["triton" if backend == "triton" else ""](x)


def _frozen(norm: Norm, mean: Tensor, var: Tensor, dtype: torch.dtype) -> Norm:
    """``norm`` with given statistics in the kernels' dtype; the bias makes up for the rounding of
    the mean."""
    rounded = mean.to(dtype)
    weight = torch.ones_like(rounded) if norm.weight is None else norm.weight.to(dtype)
    bias = (rounded - mean) * (var + norm.eps).rsqrt() * weight
    if norm.bias is not None:
        bias = bias + norm.bias
    return Norm(rounded, var.to(dtype), weight, bias.to(dtype), False, 0.0, norm.eps)


def _fwd_sync(x: Tensor, residual: Tensor | None, call: _Call, save_mask: bool):
    """y, mask and stats of ``bn_act_fwd``, and x's share of all processes' values, (C,)."""
    norms = [n for n in (call.norm, call.residual_norm) if n is not None]
    local = torch.stack([_moments(t, call.backend) for t in (x, residual)[: len(norms)]])
    means, m2s, counts = reference.merged(all_gather(local, call.group))
    share = local[0, 2] / counts[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frozen = []
    for norm, mean, m2, count in zip(norms, means, m2s, counts, strict=True):
        reference.update_running_statistics(norm, mean, m2, count)
        frozen.append(_frozen(norm, mean, m2 / count, dtype))
    if x.numel() == 0:
        return _dense_like(x), x.new_empty(0), x.new_empty(0), share
    second = frozen[1] if len(frozen) == 2 else None
    return *_fwd(x, frozen[0], residual, second, call.act, save_mask, call.backend), share


def _bwd_sync(call: _Call, dy, x, weight, residual, residual_weight, stats, mask, share, need):
    """``bn_act_bwd``, with its sums reduced over the processes between its two passes.

    need: whether x, the residual (where its gradient is not dy) and the parameters need gradients.
    """
    second = call.residual_norm is not None
    need_x, need_residual, need_parameters = need
    reduces = need_x or (second and need_residual)
    weights = [weight, residual_weight] if second else [weight]
    if x.numel() == 0:
        if reduces:
            all_reduce(x.new_zeros((len(weights), 2, x.size(1)), dtype=torch.float64), call.group)
        zeros = [None if w is None else torch.zeros_like(w) for w in (weight, residual_weight)]
        return dy, zeros[0], zeros[0], dy, zeros[1], zeros[1]

    # in the statistics' dtype, and never None: the gradients of the weights are the sums
    w = [torch.ones_like(stats[0]) if w is None else w.to(stats.dtype) for w in weights]
    run = partial(
        _op(call.backend, 1), dy, x, w[0], True, residual, second, w[1] if second else None, second,
        stats, mask, ACTS.index(call.act),
    )  # fmt: skip
    dweight = dbias = dresidual_weight = dresidual_bias = sums = None
    if reduces or need_parameters:
        _, dweight, dbias, _, dresidual_weight, dresidual_bias = run(False, False, True)
    if reduces:
        local = [dbias, dweight, dresidual_bias, dresidual_weight][: 2 * len(w)]
        sums = all_reduce(torch.stack(local).double(), call.group) * share
        sums[1::2] /= stats[1 : 2 * len(w) : 2]  # of g * (x - mean)
    dx = dresidual = None
    if need_x or need_residual:
        dx, _, _, dresidual, _, _ = run(need_x, need_residual, False, sums)
    return dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias


def _differentiable_bwd(call: _Call, dy, x, weight, residual, residual_weight, mask):
    """The backward pass in PyTorch's ops, for a second derivative. The mask is a constant."""

    def of(norm, g, x, weight):
        unused = x.new_empty(0, dtype=torch.float64)
        return reference.batch_norm_bwd(g, x, weight, unused, unused, True, norm.eps, call.group)

    g = dy if call.act == "none" or x.numel() == 0 else dy * unpack_mask(mask, x)
    dresidual = g if call.act == "relu" else dy
    main = of(call.norm, g, x, weight)
    if call.residual_norm is None:
        return *main, dresidual, None, None
    return *main, *of(call.residual_norm, dresidual, residual, residual_weight)


class _SyncBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, x, weight, bias, residual, residual_weight, residual_bias):
        y, mask, stats, share = _fwd_sync(x, residual, call, True)
        kept = None if call.residual_norm is None else residual
        ctx.save_for_backward(x, weight, kept, residual_weight, stats, mask, share)
        ctx.call, ctx.nchw = call, is_nchw(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        call, need = ctx.call, ctx.needs_input_grad[1:]
        x, weight, residual, residual_weight, stats, mask, share = ctx.saved_tensors
        x = laid_out(x, ctx.nchw)
        passes = call.residual_norm is None and call.act != "relu"  # as in bn_act
        if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
            grads = _differentiable_bwd(call, dy, x, weight, residual, residual_weight, mask)
        else:
            wanted = need[0], need[3] and not passes, need[1] or need[2] or need[4] or need[5]
            saved = x, weight, residual, residual_weight, stats, mask, share
            grads = list(_bwd_sync(call, dy, *saved, wanted))
            for i, w in ((1, weight), (2, weight), (4, residual_weight), (5, residual_weight)):
                grads[i] = None if w is None or not need[i] else grads[i].to(w.dtype)
        grads = [*grads[:3], dy if passes else grads[3], *grads[4:]]
        return None, *(g if needed else None for g, needed in zip(grads, need, strict=True))


def _eager(x, running_mean, running_var, weight, bias, training, momentum, eps, *, group):
    if x.is_cpu:
        norm = running_mean, running_var, weight, bias, training, momentum, eps
        return reference.sync_batch_norm(x, *norm, group=group)
    # PyTorch's SyncBatchNorm takes no CPU tensors
    return SyncBatchNorm.apply(
        x, weight, bias, running_mean, running_var, eps, momentum, group, dist.get_world_size(group)
    )


def sync_bn_act(
    x: Tensor,
    norm: Norm,
    group: dist.ProcessGroup,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = "relu",
    backend: str | None = None,
) -> Tensor:
    """``bn_act`` in training, by the statistics of all processes of a group (as in
    ``nn.SyncBatchNorm``).

    Every process of the group must call it, and backward, for tensors of the same number of
    channels. All processes must choose the same backend, whatever the sizes of their batches. So
    ``auto`` ignores timings here: CPU tensors (but float64) run the fused kernels, CUDA tensors
    PyTorch's SyncBatchNorm.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, NCHW or channels_last; N may be 0.
        norm: x's BatchNorm, with ``training=True``; running statistics are updated in place.
        group: processes with a batch each, of any size.
        residual: (N, C, H, W) of x's dtype and device, added to the normalised x.
        residual_norm: a second BatchNorm, of ``residual``, by the statistics of the same processes.
        act: ``relu`` (after the add), ``relu_before_add``, or ``none``.
        backend: auto, cpu, cuda, triton or eager; default: set by ``fused_res.backend`` or
            ``FUSED_RES_BACKEND``, else auto.

    Returns:
        (N, C, H, W) of x's dtype and memory format.

    Raises:
        ValueError: a shape, device or value does not fit.
        TypeError: a dtype does not fit.
        BackendUnavailable: the backend was named and cannot run this.

    Examples:
        >>> norm = Norm(torch.zeros(64), torch.ones(64), training=True)
        >>> x = torch.randn(8, 64, 14, 14)
        >>> y = sync_bn_act(x, norm, torch.distributed.group.WORLD)  # in each process
    """
    _check(x, norm, residual, residual_norm, act, alone=False)
    backend = choose("bn_act", backend, x, residual, norm.weight, norm.bias, by_shape=False)
    if backend == "eager":
        batch_norm = partial(_eager, group=group)
        return reference.bn_act(x, norm, residual, residual_norm, act, batch_norm)
    call = _Call(norm, residual_norm, act, group, backend)
    second = residual_norm or Norm()
    tensors = x, norm.weight, norm.bias, residual, second.weight, second.bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _SyncBnAct.apply(call, *tensors)
    return _fwd_sync(x, residual, call, False)[0]
