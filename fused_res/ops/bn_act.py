"""BatchNorm + residual add + ReLU in one pass: the op ``bn_act``.

Forward: statistics (Welford's merge of tiles, Chan et al. 1979), then one pass that normalises,
adds the residual, applies the ReLU and keeps its sign as one bit an element. Backward: one pass for
the sums, one for the gradients. ``reference.bn_act`` is the specification; ``csrc/cpu/bn_act.cpp``
and ``kernels/bn_act.py`` are implementations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dispatch import first_use
from ..dispatch import norm as norm_dispatch
from ..dispatch.backends import DTYPES, asked_for, is_auto, say, taken_by_auto
from ..dispatch.cpu_rules import bare_norm_pays
from ..reference import ACTS, Act, Norm
from . import library

# mask: uint8 of (runs, ceil(run / 8)). A run is the C channels of a pixel in channels_last, the H*W
# pixels of a channel in NCHW. Bit i % 8 of byte i // 8 is set where element i of the run passed the
# ReLU. The mask is empty without a ReLU and without `save_mask`.
# stats: (5, C), float64 for a float64 x, else float32. Rows: mean, invstd, center, scale, shift;
# the pass over the elements uses the last three. With a residual_norm (7, C): its mean and invstd
# are rows 2 and 3.
_FWD = (
    "(Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, "
    "Tensor? residual, bool residual_norm, Tensor? residual_weight, Tensor? residual_bias, "
    "Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var, bool residual_training, "
    "float residual_momentum, float residual_eps, int act, bool save_mask) -> "
    "(Tensor y, Tensor mask, Tensor stats)"
)
# Gradients that are not needed come back empty. A caller uses dy where dresidual equals it.
# sums: float64 of (2, C), optional: the sums of g and of g * (x - mean), which the op computes
# otherwise. g is dy times the ReLU's mask. With a residual_norm (4, C): the residual's two sums
# come last.
_BWD = (
    "(Tensor dy, Tensor x, Tensor? weight, bool training, Tensor? residual, "
    "bool residual_norm, Tensor? residual_weight, bool residual_training, Tensor stats, "
    "Tensor mask, int act, bool need_x, bool need_residual, bool need_parameters, "
    "Tensor? sums=None) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual, Tensor dresidual_weight, "
    "Tensor dresidual_bias)"
)
# float64 of (3, C): mean, sum of squared deviations and number of values of each channel.
_STATISTICS = "(Tensor x) -> Tensor"
# The C++ libraries implement the ops for their devices. Triton's kernels need separate ops, because
# a device cannot have two implementations of an op.
for _suffix in ("", "_triton"):
    library.define(f"bn_act_fwd{_suffix}{_FWD}")
    library.define(f"bn_act_bwd{_suffix}{_BWD}")
    library.define(f"bn_act_statistics{_suffix}{_STATISTICS}")


@torch.library.impl(library, "bn_act_fwd_triton", "CompositeExplicitAutograd")
def _(*args):
    from ..kernels import bn_act_fwd as kernels

    x, weight, bias, *running, training, momentum, eps, residual, residual_norm = args[:10]
    norm = Norm(*running, weight, bias, training, momentum, eps)
    second = Norm(*args[12:14], *args[10:12], *args[14:17]) if residual_norm else None
    _check(x, norm, residual, second, ACTS[args[17]])
    _check_triton(x)
    return kernels.forward(kernels.Call(x, norm, residual, second, *args[17:]))


@torch.library.impl(library, "bn_act_bwd_triton", "CompositeExplicitAutograd")
def _(dy, x, weight, training, residual, residual_norm, residual_weight, residual_training, stats,
      mask, act, need_x, need_residual, need_parameters, sums=None):  # fmt: skip
    from ..kernels import bn_act_bwd as kernels

    _check_triton(x)
    _check_like("dy", dy, x)
    if residual_norm:
        _check_like("residual", residual, x)
    runs, length = _runs(_dense_like(x))
    if stats.shape != (7 if residual_norm else 5, x.size(1)) or (
        ACTS[act] != "none" and mask.shape != (runs, (length + 7) // 8)
    ):
        raise ValueError("stats and mask must be what bn_act_fwd returned for x")
    shape = (4 if residual_norm else 2, x.size(1))
    if sums is not None and (sums.shape != shape or sums.dtype != torch.float64):
        raise ValueError(f"sums must be float64 of shape {shape}")
    for name, w in (("weight", weight), ("residual_weight", residual_weight)):
        if w is not None and w.shape != x.shape[1:2]:
            raise ValueError(f"{name} must have shape ({x.size(1)},), got {tuple(w.shape)}")
    second = kernels.NormCall(residual_weight, residual_training) if residual_norm else None
    wanted = kernels.Wanted(need_x, need_residual, need_parameters)
    norm = kernels.NormCall(weight, training)
    found = kernels.backward(
        kernels.Call(dy, x, norm, stats, mask, residual, second, act, wanted, sums)
    )
    return tuple(x.new_empty(0) if t is None else t for t in found)


@torch.library.impl(library, "bn_act_statistics_triton", "CompositeExplicitAutograd")
def _(x):
    from ..kernels import bn_act_fwd as kernels

    _check_triton(x)
    return kernels.statistics(x)


def _check_triton(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise TypeError("x must be float32, bfloat16 or float16 in Triton, got torch.float64")


def _dense_like(x: Tensor) -> Tensor:
    """An uninitialised tensor laid out as the kernels lay out their outputs."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def _runs(x: Tensor) -> tuple[int, int]:
    """(number, length) of the contiguous runs of a dense tensor: see ``mask`` above."""
    n, c, h, w = x.shape
    if h * w == 1 or not x.is_contiguous():
        return n * h * w, c
    return n * c, h * w


@torch.library.register_fake("fused_res::bn_act_fwd", lib=library)
@torch.library.register_fake("fused_res::bn_act_fwd_triton", lib=library)
def _(x, weight, bias, running_mean, running_var, training, momentum, eps, residual, residual_norm,
      residual_weight, residual_bias, residual_running_mean, residual_running_var,
      residual_training, residual_momentum, residual_eps, act, save_mask):  # fmt: skip
    for t in (weight, bias, running_mean, running_var, residual, residual_weight, residual_bias,
              residual_running_mean, residual_running_var):  # fmt: skip
        if t is not None and t.device != x.device:
            raise ValueError(f"all tensors must be on x's device, {x.device}, got {t.device}")
    y = _dense_like(x)
    runs, length = _runs(y)
    mask_runs = runs if save_mask and act != ACTS.index("none") else 0
    mask = x.new_empty((mask_runs, (length + 7) // 8), dtype=torch.uint8)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = x.new_empty((7 if residual_norm else 5, x.size(1)), dtype=dtype)
    return y, mask, stats


@torch.library.register_fake("fused_res::bn_act_bwd", lib=library)
@torch.library.register_fake("fused_res::bn_act_bwd_triton", lib=library)
def _(dy, x, weight, training, residual, residual_norm, residual_weight, residual_training, stats,
      mask, act, need_x, need_residual, need_parameters, sums=None):  # fmt: skip
    def like_x(wanted):
        return _dense_like(x) if wanted else x.new_empty(0)

    def like_weight(w):
        return torch.empty_like(w) if w is not None and need_parameters else x.new_empty(0)

    if not residual_norm:
        residual_weight = None
    return (
        like_x(need_x), like_weight(weight), like_weight(weight),
        like_x(need_residual), like_weight(residual_weight), like_weight(residual_weight),
    )  # fmt: skip


@torch.library.register_fake("fused_res::bn_act_statistics", lib=library)
@torch.library.register_fake("fused_res::bn_act_statistics_triton", lib=library)
def _(x):
    return x.new_empty((3, x.size(1)), dtype=torch.float64)


def is_nchw(x: Tensor) -> bool:
    """Whether the kernels read a dense tensor as NCHW."""
    return x.is_contiguous()


def laid_out(x: Tensor, nchw: bool) -> Tensor:
    """A saved tensor in the layout it had in the forward pass, which the mask's runs depend on.

    A hook that unpacks saved tensors (``save_on_cpu``) may return other strides.
    """
    if x.is_contiguous() == nchw:
        return x
    return x.contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The ReLU's mask as a bool tensor of ``like``'s shape; ``like`` is the forward pass's x."""
    n, c, h, w = like.shape
    dense = _dense_like(like)
    _, length = _runs(dense)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten(1)[:, :length].bool()
    if h * w == 1 or not dense.is_contiguous():
        return bits.view(n, h, w, c).permute(0, 3, 1, 2)
    return bits.view(n, c, h, w)


def _differentiable_bwd(ctx, dy, x, weight, residual, residual_weight, stats, mask):
    """The backward pass in PyTorch's ops, for a second derivative. The mask is a constant."""
    g = dy if ctx.act == "none" else dy * unpack_mask(mask, x)
    training, eps = ctx.norm
    dx, dweight, dbias = reference.batch_norm_bwd(g, x, weight, stats[0], stats[1], training, eps)
    dresidual = g if ctx.act == "relu" else dy
    dresidual_weight = dresidual_bias = None
    if ctx.residual_norm is not None:
        training, eps = ctx.residual_norm
        dresidual, dresidual_weight, dresidual_bias = reference.batch_norm_bwd(
            dresidual, residual, residual_weight, stats[2], stats[3], training, eps
        )
    return dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias


class _BnAct(torch.autograd.Function):
    # Tensors and numbers are separate arguments: torch.compile traces none inside a tuple (with
    # dynamic=True a momentum is symbolic).
    @staticmethod
    def forward(ctx, x, weight, bias, residual, residual_weight, residual_bias, running_mean,
                running_var, training, momentum, eps, residual_norm, residual_running_mean,
                residual_running_var, residual_training, residual_momentum, residual_eps,
                act, backend):  # fmt: skip
        norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps)
        second = Norm(
            residual_running_mean,
            residual_running_var,
            residual_weight,
            residual_bias,
            residual_training,
            residual_momentum,
            residual_eps,
        )
        second = second if residual_norm else None
        y, mask, stats = _fwd(x, norm, residual, second, act, True, backend)
        kept = residual if residual_norm else None
        ctx.save_for_backward(x, weight, kept, residual_weight, stats, mask)
        ctx.norm, ctx.act, ctx.backend = (training, eps), act, backend
        ctx.nchw = is_nchw(y)
        ctx.residual_norm = (residual_training, residual_eps) if residual_norm else None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, residual, residual_weight, stats, mask = ctx.saved_tensors
        x = laid_out(x, ctx.nchw)
        need = ctx.needs_input_grad
        # the gradient of a plain residual is dy itself, unless a ReLU follows the add
        passes = ctx.residual_norm is None and ctx.act != "relu"
        if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
            grads = _differentiable_bwd(ctx, dy, x, weight, residual, residual_weight, stats, mask)
        else:
            grads = _op(ctx.backend, 1)(
                dy,
                x,
                weight,
                ctx.norm[0],
                residual,
                ctx.residual_norm is not None,
                residual_weight,
                ctx.residual_norm is not None and ctx.residual_norm[0],
                stats,
                mask,
                ACTS.index(ctx.act),
                need[0],
                need[3] and not passes,
                need[1] or need[2] or need[4] or need[5],
            )
        return (
            grads[0] if need[0] else None,
            grads[1] if need[1] else None,
            grads[2] if need[2] else None,
            (dy if passes else grads[3]) if need[3] else None,
            grads[4] if need[4] else None,
            grads[5] if need[5] else None,
            *(None,) * 13,
        )


_OPS = {
    "": (torch.ops.fused_res.bn_act_fwd.default, torch.ops.fused_res.bn_act_bwd.default),
    "triton": (
        torch.ops.fused_res.bn_act_fwd_triton.default,
        torch.ops.fused_res.bn_act_bwd_triton.default,
    ),
}


def _op(backend: str, direction: int):
    return _OPS["triton" if backend == "triton" else ""][direction]


def _no_norm() -> Norm:
    # literals: torch.compile(dynamic=True) makes symbols of the numbers in a global
    return Norm(None, None, None, None, False, 0.0, 1.0)


def _fwd(x, norm, residual, residual_norm, act, save_mask, backend):
    running_mean, running_var, weight, bias, training, momentum, eps = norm
    second = _no_norm() if residual_norm is None else residual_norm
    return _op(backend, 0)(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        residual,
        residual_norm is not None,
        second[2],
        second[3],
        second[0],
        second[1],
        second[4],
        second[5],
        second[6],
        ACTS.index(act),
        save_mask,
    )


_HALVES = (torch.bfloat16, torch.float16)
_CHANNEL_FIELDS = Norm._fields[:4]


def _check_norm(name: str, norm: Norm, x: Tensor, alone: bool = True) -> None:
    prefix = f"{name}." if name else ""
    dtype, device, shape = x.dtype, x.device, x.shape[1:2]
    for field, t in zip(_CHANNEL_FIELDS, norm, strict=False):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(
                f"{prefix}{field} must have shape ({x.size(1)},) to match the {x.size(1)} channels "
                f"of x, got {tuple(t.shape)}"
            )
        if t.device != device:
            raise ValueError(f"{prefix}{field} must be on x's device, {device}, got {t.device}")
        if t.dtype != dtype and not (dtype in _HALVES and t.dtype == torch.float32):
            dtypes = (dtype, torch.float32) if dtype in _HALVES else (dtype,)
            raise TypeError(
                f"{prefix}{field} must be {' or '.join(map(str, dtypes))} with x of {dtype}, "
                f"got {t.dtype}"
            )
    if (norm.weight is None) != (norm.bias is None):
        raise ValueError(f"{prefix}weight and {prefix}bias must both be given or both be None")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{prefix}running_mean and running_var must both be given or both be None")
    if norm.eps < 0 or (norm.training and norm.eps == 0):
        bound = "positive during training" if norm.training else "non-negative"
        raise ValueError(f"{prefix}eps={norm.eps} must be {bound}")
    if norm.training:
        if alone and x.numel() == x.size(1):  # in PyTorch's own words (torch.nn.functional)
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
    elif norm.running_mean is None:
        raise ValueError(f"{prefix}running_mean and running_var must be given when training=False")


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}, got {t.device}")


def _check(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    act: str,
    alone: bool = True,
) -> None:
    """``alone``: x alone gives the statistics, so it must have more than one value per channel."""
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if act not in ACTS:
        raise ValueError(f"act={act!r} must be one of: {', '.join(ACTS)}")
    _check_norm("", norm, x, alone)
    if residual is not None:
        _check_like("residual", residual, x)
    if residual_norm is not None:
        if residual is None:
            raise ValueError("residual must be given with residual_norm, got None")
        _check_norm("residual_norm", residual_norm, residual, alone)


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = "relu",
    backend: str | None = None,
) -> Tensor:
    """BatchNorm (Ioffe and Szegedy, 2015), residual add and ReLU in one pass, forward and backward.

    The first eight arguments are those of ``torch.nn.functional.batch_norm``.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, NCHW or channels_last.
        running_mean, running_var: (C,), updated in place when training; may be None in training.
        weight, bias: (C,), both or neither; x's dtype, or float32 with a 16-bit x.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; positive in training, not negative otherwise.
        residual: (N, C, H, W) of x's dtype and device, added to the normalised x.
        residual_norm: a second BatchNorm, of ``residual`` (projection shortcut), in the same pass.
        act: ``relu`` (after the add), ``relu_before_add``, or ``none``.
        backend: auto, cpu, cuda, triton or eager; default: set by ``fused_res.backend`` or
            ``FUSED_RES_BACKEND``, else auto.

    Returns:
        (N, C, H, W) of x's dtype and memory format.

    Raises:
        ValueError: a shape, device or value does not fit; training with one value per channel.
        TypeError: a dtype does not fit.
        BackendUnavailable: the backend was named and cannot run this.

    Examples:
        >>> x, bn = torch.randn(8, 64, 14, 14), torch.nn.BatchNorm2d(64)
        >>> stats = bn.running_mean, bn.running_var
        >>> y = bn_act(x, *stats, bn.weight, bn.bias, training=True, residual=x)  # x's shape
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps)
    return bn_act_norms(x, norm, residual, residual_norm, act, backend)


def bn_act_norms(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = "relu",
    backend: str | None = None,
) -> Tensor:
    """``bn_act`` with both BatchNorms as ``Norm`` tuples."""
    if torch.compiler.is_compiling():
        _check(x, norm, residual, residual_norm, act)
        return _run(x, norm, residual, residual_norm, act, backend)
    try:
        return _run(x, norm, residual, residual_norm, act, backend)
    except Exception:
        # The op checks its arguments before it does anything, with short messages. These checks
        # have full messages and take a third of a small call's time, so only a failed call runs
        # them.
        _check(x, norm, residual, residual_norm, act)
        raise


def _wants_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _run(x, norm, residual, residual_norm, act, backend):
    _, _, weight, bias, _, _, _ = norm
    may_choose = is_auto(backend)
    backend = asked_for("bn_act", backend, x, residual, weight, bias)
    if backend == "auto":
        measures = first_use.covers(x) and x.dim() == 4 and x.numel() > 0
        if measures and not torch.compiler.is_compiling():
            backend = norm_dispatch.choose(
                norm_dispatch.Call(x, norm, residual, residual_norm, act)
            )
        else:
            backend = taken_by_auto("bn_act", x)
    bare = may_choose and act == "none" and residual is None and norm.training
    if bare and not bare_norm_pays(x):
        say(f"bn_act of a bare norm of {tuple(x.shape)} runs eager: measured, on a CPU")
        backend = "eager"
    if backend == "eager" or x.numel() == 0:
        _check(x, norm, residual, residual_norm, act)
        return reference.bn_act(x, norm, residual, residual_norm, act)
    second = _no_norm() if residual_norm is None else residual_norm
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad
        or _wants_grad(weight)
        or _wants_grad(bias)
        or _wants_grad(residual)
        or _wants_grad(second.weight)
        or _wants_grad(second.bias)
    )
    if not wants_grad:
        return _fwd(x, norm, residual, residual_norm, act, False, backend)[0]
    return _BnAct.apply(
        x,
        weight,
        bias,
        residual,
        second.weight,
        second.bias,
        norm.running_mean,
        norm.running_var,
        *norm[4:],
        residual_norm is not None,
        second.running_mean,
        second.running_var,
        *second[4:],
        act,
        backend,
    )


norm_dispatch.register(bn_act_norms)
