"""Convolution + BatchNorm + residual + ReLU for inference, as one kernel: the op ``conv_bn_act``.

``reference.conv_bn_act`` is the specification. With gradients, ATen runs the convolution and
``bn_act`` the rest.

An *implementation* is one way to run a call; a backend has one or more, and
``fused_res.dispatch.inference_conv`` picks one:

- ``triton``: ``kernels/conv_bn_act.py``;
- ``cudnn``, ``onednn``: a convolution of cuDNN or oneDNN, the rest in its epilogue;
- ``conv_halo``: ``csrc/cuda/conv_halo.cu``;
- ``direct``: ``csrc/cpu/direct.cpp``;
- ``winograd2``, ``winograd4``: ``csrc/cpu/winograd.cpp``;
- ``bn_act``: ATen's convolution, then the op ``bn_act``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import env, reference
from ..dispatch import first_use, inference_conv
from ..dispatch.backends import DTYPES, asked_for, choose, named, why_not_tensors
from ..dispatch.inference_conv import FLOAT32_ALONE, IMPLEMENTATIONS, register
from ..reference import ACTS, Act, ConvNorm, Norm
from ..run.weight_cache import packed_weights, scale_and_shift
from . import conv_halo, direct, library, winograd  # noqa: F401  define the ops that run here
from .bn_act import _check_norm, bn_act_norms
from .convolutions import convolution, nhwc

# The lists have an entry for each convolution, the shortcut's last.
# parameters: the convolution's weight and bias, the BatchNorm's weight, bias, running mean and
# running variance (None: no BatchNorm).
# integers: stride, padding and dilation (2 each) and groups. eps: the BatchNorm's.
library.define(
    "conv_bn_act(Tensor x, Tensor?[] parameters, int[] integers, float[] eps, Tensor? residual, "
    "bool concat, int act, str backend) -> Tensor"
)
_PARAMETERS, _INTEGERS = 6, 7
PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may define its own convolution


class Call(NamedTuple):
    """The arguments of one call; the choice of an implementation depends on nothing else."""

    x: Tensor
    conv: ConvNorm
    residual: Tensor | None = None
    shortcut: ConvNorm | None = None
    concat: bool = False
    act: Act = "relu"


def _channels_last(t: Tensor) -> bool:
    """Whether PyTorch's convolutions read a tensor as channels_last."""
    return t.stride(1) == 1 and t.size(1) > 1 and not t.is_contiguous()


def _layout(call: Call) -> torch.memory_format:
    """The memory format of the output: the one that PyTorch gives it."""
    last = _channels_last(call.x) or _channels_last(call.conv.weight)
    if call.concat:  # torch.cat makes NCHW of a mixture
        last = last and _channels_last(call.residual)
    return torch.channels_last if last else torch.contiguous_format


def out_shape(x: Tensor, conv: ConvNorm) -> tuple[int, int, int, int]:
    """(N, K, P, Q) of a convolution of ``x``."""
    n, _, h, w = x.shape
    k, _, r, s = conv.weight.shape
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    return (
        n,
        k,
        (h + 2 * ph - dh * (r - 1) - 1) // sh + 1,
        (w + 2 * pw - dw * (s - 1) - 1) // sw + 1,
    )


# --- implementations. Each prepares a function of x and the residual from a call. The function runs
# calls of the same dtype and sizes, while the convolutions' parameters stay unchanged.

Run = Callable[[Tensor, Tensor | None], Tensor]


def _folded(conv: ConvNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias with the BatchNorm folded in."""
    scale, shift = scale_and_shift(conv)
    weight = conv.weight.double()
    if scale is not None:
        weight = weight * scale.view(-1, 1, 1, 1)
    if shift is None:
        shift = weight.new_zeros(weight.size(0))
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), shift.to(dtype)


def _apply_rest(z: Tensor, residual: Tensor | None, concat: bool, act: str) -> Tensor:
    """The residual and the ReLU in PyTorch's ops, after convolution and BatchNorm; overwrites
    ``z``."""
    if act == "relu_before_add":
        z = z.relu_()
    if residual is not None:
        z = torch.cat((residual, z), 1) if concat else z.add_(residual)
    return z.relu_() if act == "relu" else z


def _shortcut(call: Call, prepare: Callable[[Call], Run]) -> Run | None:
    if call.shortcut is None:
        return None
    return prepare(Call(call.residual, call.shortcut, act="none"))


def _onednn(call: Call) -> Run:
    x, conv, residual, _, concat, act = call
    sizes = [tuple(conv.padding), tuple(conv.stride), tuple(conv.dilation), conv.groups]

    def pack():
        _check(call)
        weight, bias = _folded(conv, x.dtype)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, x.shape)
        return packed, bias

    weight, bias = packed_weights(conv, ("onednn", x.shape, *sizes), pack)
    shortcut = _shortcut(call, _onednn)
    # oneDNN's ReLU makes 0 of NaN. Its add has no kernel for some grouped convolutions.
    apart = residual is None or concat or act == "relu_before_add" or conv.groups > 1
    shape = out_shape(x, conv)
    ops = torch.ops.mkldnn

    def run(x, residual):
        x = nhwc(x)
        if shortcut is not None:
            residual = shortcut(residual, None)
        if apart:
            z = ops._convolution_pointwise(x, weight, bias, *sizes, "none", [], "")
            return _apply_rest(z, residual, concat, act)
        if residual.shape != shape:
            raise ValueError("residual does not have the output's shape")
        rest = weight, bias, *sizes, "add", 1.0, None, [], None
        if shortcut is None:
            y = ops._convolution_pointwise.binary(x, nhwc(residual), *rest)
        else:
            y = ops._convolution_pointwise_.binary(residual, x, *rest)
        return y.relu_() if act == "relu" else y

    return run


def _onednn_why_not(call: Call) -> str | None:
    if call.x.dtype != torch.float32:
        return FLOAT32_ALONE
    usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return None if usable else "oneDNN is not there, or switched off"


def _role(call: Call) -> str:
    return "concat" if call.concat else "none" if call.residual is None else "add"


def _winograd(tile: int, call: Call) -> Run:
    conv = call.conv

    def pack():
        _check(call)
        scale, shift = scale_and_shift(conv)
        u = torch.ops.fused_res.winograd_weight(conv.weight, scale, tile)
        return u, None if shift is None else shift.float()

    packed = packed_weights(conv, ("winograd", tile), pack)
    run = convolution(*packed, tile, conv.weight.size(0), call.act, _role(call), conv.padding)
    shortcut = _shortcut(call, _onednn)
    return run if shortcut is None else lambda x, residual: run(x, shortcut(residual, None))


def _winograd_why_not(tile: int, call: Call) -> str | None:
    conv, limit = call.conv, env.settings.winograd
    if call.x.dtype != torch.float32:
        return FLOAT32_ALONE
    if tile > limit:
        return f"FUSED_RES_WINOGRAD={limit}"
    if conv.weight.shape[2:] != (3, 3) or conv.groups != 1:
        return "the convolution is not a 3x3 of one group"
    if tuple(conv.stride) != (1, 1) or tuple(conv.dilation) != (1, 1):
        return "the convolution has a stride or dilation"
    if conv.weight.size(0) % 8 or conv.weight.size(1) % 8:
        return "its channels are not in eights"
    if min(call.x.shape[2:]) < 3:
        return "the map is smaller than a tile"
    return None if call.shortcut is None else _onednn_why_not(call)


def _direct(call: Call) -> Run:
    conv, shortcut, before = call.conv, call.shortcut, None
    if shortcut is not None and call.act == "relu_before_add":
        before, shortcut = _shortcut(call, _direct), None
    convs = [conv] if shortcut is None else [conv, shortcut]

    def pack():
        _check(call)
        scales, shifts = zip(*map(scale_and_shift, convs), strict=True)
        u = torch.ops.fused_res.direct_weight([c.weight for c in convs], scales)
        shifts = [s for s in shifts if s is not None]
        return u, sum(shifts).float() if shifts else None

    packed = packed_weights(conv, ("direct",), pack, shortcut)
    sizes = []
    for c in convs:
        sizes += (*c.weight.shape[1:], *c.stride, *c.padding, *c.dilation)
    role = _role(call) if shortcut is None else "convolve"
    run = convolution(*packed, 0, conv.weight.size(0), call.act, role, sizes)
    return run if before is None else lambda x, residual: run(x, before(residual, None))


def _direct_why_not(call: Call) -> str | None:
    if call.x.dtype != torch.float32:
        return FLOAT32_ALONE
    grouped = call.conv.groups != 1 or (call.shortcut is not None and call.shortcut.groups != 1)
    return "the convolution has groups" if grouped else None


def _with_bn_act(call: Call, backend: str | None) -> Tensor:
    """ATen's convolution, then ``bn_act``; has gradients."""

    def bn_act(x, norm, residual=None, residual_norm=None, act="relu"):
        if residual is not None and residual.dtype != x.dtype:  # PyTorch's rules of promotion
            return reference.bn_act(x, norm, residual, residual_norm, act)
        return bn_act_norms(x, norm, residual, residual_norm, act, backend)

    return reference.conv_bn_act(*call, bn_act)


def _bn_act(call: Call) -> Tensor:
    return _with_bn_act(call, "cpu")


def _cudnn(call: Call) -> Tensor:
    x, conv, residual, shortcut, concat, act = call
    if shortcut is not None:
        residual = _cudnn(Call(residual, shortcut, act="none"))
    x = nhwc(x)
    weight, bias = _folded(conv, x.dtype)  # at every call, so that a CUDA graph does it too
    sizes = conv.stride, conv.padding, conv.dilation, conv.groups
    if residual is not None and not concat and act == "relu":
        return torch.cudnn_convolution_add_relu(x, weight, nhwc(residual), 1.0, bias, *sizes)
    if act == "none" or (concat and act == "relu"):
        return _apply_rest(F.conv2d(x, weight, bias, *sizes), residual, concat, act)
    z = torch.cudnn_convolution_relu(x, weight, bias, *sizes)
    return z if residual is None else _apply_rest(z, residual, concat, "none")


def _cudnn_why_not(call: Call) -> str | None:
    usable = torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return None if usable else "cuDNN is not there, or switched off"


def _conv_halo(call: Call) -> Tensor:
    x, conv, residual, _, _, act = call
    if residual is not None:
        residual = nhwc(residual)
    mean, var, *affine = (None,) * 4 if conv.norm is None else conv.norm[:4]
    return torch.ops.fused_res.conv_halo.default(
        nhwc(x), conv.weight.to(x.dtype), conv.bias, mean, var, *affine,
        0.0 if conv.norm is None else conv.norm.eps, residual, ACTS.index(act),
        inference_conv.allows_tf32(),
    )  # fmt: skip


def _conv_halo_why_not(call: Call) -> str | None:
    if call.shortcut is not None or call.concat:
        return "the residual is convolved or concatenated"
    return conv_halo.why_not(call.x, call.conv)


def _triton(call: Call, config=None) -> Tensor:
    from ..kernels import conv_bn_act as kernels

    if config is not None and config not in kernels.candidates(*call):
        config = None  # it reads by tensor descriptors, which cannot take this address
    return kernels.forward(*call, config)


def _triton_configs(call: Call) -> list:
    from ..kernels import conv_bn_act as kernels

    return kernels.candidates(*call)


def _triton_why_not(call: Call) -> str | None:
    from ..kernels import conv_bn_act as kernels

    return kernels.why_not(*call)


def _anew(run: Callable[..., Tensor]) -> Callable[..., Run]:
    """``prepare`` of an implementation that keeps nothing between calls."""

    def prepare(call, *config):
        call = call._replace(x=None, residual=None)
        return lambda x, residual: run(call._replace(x=x, residual=residual), *config)

    return prepare


# The first implementation of a backend is oneDNN's or cuDNN's, if there is one.
inference_conv.register_eager(lambda call: reference.conv_bn_act(*call))
register("onednn", "cpu", _onednn, _onednn_why_not)
register("direct", "cpu", _direct, _direct_why_not)
register("winograd2", "cpu", partial(_winograd, 2), partial(_winograd_why_not, 2))
register("winograd4", "cpu", partial(_winograd, 4), partial(_winograd_why_not, 4))
register("bn_act", "cpu", _anew(_bn_act), lambda call: None)
register("cudnn", "cuda", _anew(_cudnn), _cudnn_why_not)
register("conv_halo", "cuda", _anew(_conv_halo), _conv_halo_why_not)
register("triton", "triton", _anew(_triton), _triton_why_not, _triton_configs)


# --- the op


def _flatten(call: Call) -> tuple[list, list[int], list[float]]:
    parameters, integers, eps = [], [], []
    for conv in (call.conv, call.shortcut):
        if conv is None:
            continue
        weight, bias, stride, padding, dilation, groups, norm = conv
        mean, var, scale, shift, *_, e = (None,) * 4 + (1.0,) if norm is None else norm
        parameters += (weight, bias, scale, shift, mean, var)
        integers += (*stride, *padding, *dilation, groups)
        eps.append(e)
    return parameters, integers, eps


def _stages(parameters, integers, eps) -> list[ConvNorm]:
    stages = []
    for i, e in enumerate(eps):
        weight, bias, scale, shift, mean, var = parameters[_PARAMETERS * i : _PARAMETERS * (i + 1)]
        *sizes, groups = integers[_INTEGERS * i : _INTEGERS * (i + 1)]
        norm = None if mean is None else Norm(mean, var, scale, shift, False, 0.0, e)
        pairs = (tuple(sizes[:2]), tuple(sizes[2:4]), tuple(sizes[4:]))
        stages.append(ConvNorm(weight, bias, *pairs, groups, norm))
    return stages


@torch.library.impl(library, "conv_bn_act", "CompositeExplicitAutograd")
def _(x, parameters, integers, eps, residual, concat, act, backend):
    stages = _stages(parameters, integers, eps)
    shortcut = stages[1] if len(stages) > 1 else None
    return _run(Call(x, stages[0], residual, shortcut, concat, ACTS[act]), backend)


@torch.library.register_fake("fused_res::conv_bn_act", lib=library)
def _(x, parameters, integers, eps, residual, concat, act, backend):
    call = Call(x, _stages(parameters, integers, eps)[0], residual)
    n, k, p, q = out_shape(x, call.conv)
    if concat:
        k = k + residual.size(1)
    return x.new_empty((n, k, p, q)).contiguous(memory_format=_layout(call))


def _run(call: Call, backend: str) -> Tensor:
    return run_as(call, inference_conv.choose(call, backend))


def run_as(call: Call, choice: inference_conv.Candidate) -> Tensor:
    """Runs a call by an implementation that can run it."""
    if choice.implementation == "eager":
        y = reference.conv_bn_act(*call)
    else:
        config = () if choice.config is None else (choice.config,)
        prepare = IMPLEMENTATIONS[choice.implementation].prepare
        y = prepare(call, *config)(call.x, call.residual)
    return y.contiguous(memory_format=_layout(call))


def under_modes(x: Tensor) -> bool:
    """Whether a subclass, transform or mode may see or change the ops that ``x`` goes through."""
    return (
        type(x) not in PLAIN
        or why_not_tensors(x) is not None
        or torch.autograd.forward_ad._current_level >= 0  # the tangents may be the parameters'
        or torch._C._len_torch_dispatch_stack() > 0
        or _autocasts(x)
    )


def fuses_convolutions(x: Tensor, backend: str | None) -> bool:
    """Whether a block calls ``conv_bn_act`` for such tensors, or else ``bn_act``."""
    name = backend or named()
    if name == "eager" or (x.is_cpu and _autocasts(x)):
        return False
    if x.is_cpu and name in ("auto", "cpu"):
        return x.dtype == torch.float32  # for 16 bits the paths of bn_act are faster
    # Inside a compiled graph the op decides when it runs. A GPU without measurements runs bn_act.
    if name != "auto" or torch.compiler.is_compiling():
        return True
    return inference_conv.knows(x.device) or first_use.may_measure(x.device)


def prepared(call: Call, backend: str | None) -> Run | None:
    """A function for calls of these sizes on a CPU, without gradients.

    It is valid while the convolutions' parameters stay unchanged. None: there is no such function,
    and ``conv_bn_act`` runs the call.
    """
    x = call.x
    if not x.is_cpu or x.numel() == 0 or not _channels_last(x):
        return None
    if any(type(t) not in PLAIN for t in _tensors(call)):
        return None
    name = asked_for("conv_bn_act", backend, x, call.residual)
    if name == "eager":
        return None
    implementation = IMPLEMENTATIONS.get(inference_conv.choose(call, name).implementation)
    if implementation is None or implementation.backend != "cpu":
        return None
    return implementation.prepare(call)


def _check_conv(name: str, conv: ConvNorm, of: str, x: Tensor) -> None:
    weight = conv.weight
    for field, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        sizes = getattr(conv, field)
        if len(sizes) != 2 or min(sizes) < least:
            raise ValueError(f"{name}.{field} must be two numbers >= {least}, got {tuple(sizes)}")
    if conv.groups < 1:
        raise ValueError(f"{name}.groups must be at least 1, got {conv.groups}")
    if x.dim() != 4:
        raise ValueError(f"{of} must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.size(1) * conv.groups != x.size(1):
        raise ValueError(
            f"{name}.weight must have shape (K, {x.size(1)} / groups, R, S) for the {x.size(1)} "
            f"channels of {of} and groups={conv.groups}, got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name}.weight must not be empty, got {tuple(weight.shape)}")
    if weight.size(0) % conv.groups:
        raise ValueError(
            f"{name}.groups must divide the {weight.size(0)} output channels, got {conv.groups}"
        )
    for field in ("weight", "bias"):
        t = getattr(conv, field)
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}.{field} must be on {of}'s device, {x.device}, got {t.device}")
        if t is not None and t.dtype != x.dtype and not _autocasts(x):
            raise TypeError(f"{name}.{field} must have {of}'s dtype {x.dtype}, got {t.dtype}")
    if conv.bias is not None and conv.bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}.bias must have shape ({weight.size(0)},), got {tuple(conv.bias.shape)}"
        )
    shape = out_shape(x, conv)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"{of} must be at least as large as the kernel, {tuple(weight.shape[2:])} with "
            f"dilation {tuple(conv.dilation)} and padding {tuple(conv.padding)}, got "
            f"{tuple(x.shape)}"
        )
    if conv.norm is not None:
        if conv.norm.training:
            raise ValueError(f"{name}.norm.training must be False: conv_bn_act is for inference")
        _check_norm(f"{name}.norm", conv.norm, x.new_empty((0, shape[1], 1, 1)))


def _check(call: Call) -> None:
    x, conv, residual, shortcut, concat, act = call
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if act not in ACTS:
        raise ValueError(f"act={act!r} must be one of: {', '.join(ACTS)}")
    _check_conv("conv", conv, "x", x)
    if residual is None:
        for name, given in (("shortcut", shortcut is not None), ("concat", concat)):
            if given:
                raise ValueError(f"residual must be given with {name}, got None")
        return
    if residual.device != x.device:
        raise ValueError(f"residual must be on x's device, {x.device}, got {residual.device}")
    shape = out_shape(x, conv)
    made = tuple(residual.shape)
    if shortcut is not None:
        if concat:
            raise ValueError("concat must be False with a shortcut, got True")
        _check_conv("shortcut", shortcut, "residual", residual)
        made = out_shape(residual, shortcut)
    fits = len(made) == 4 and (made[0], *made[2:]) == (shape[0], *shape[2:])
    if not fits or (not concat and made[1] != shape[1]):
        channels = "any" if concat else shape[1]
        what = "the shortcut's output" if shortcut is not None else "residual"
        raise ValueError(
            f"{what} must have shape ({shape[0]}, {channels}, {shape[2]}, {shape[3]}), got {made}"
        )


def _tensors(call: Call) -> list[Tensor]:
    parameters, _, _ = _flatten(call)
    return [t for t in (call.x, call.residual, *parameters) if t is not None]


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _autocast(call: Call) -> Call:
    """The call with its convolutions' operands cast as autocast casts them."""
    if not _autocasts(call.x) or call.x.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(call.x.device.type)
    x, residual = call.x.to(dtype), call.residual
    if call.shortcut is not None:
        residual = residual.to(dtype)
    return call._replace(x=x, residual=residual)


def conv_bn_act(
    x: Tensor,
    conv: ConvNorm,
    residual: Tensor | None = None,
    shortcut: ConvNorm | None = None,
    concat: bool = False,
    act: Act = "relu",
    backend: str | None = None,
) -> Tensor:
    """Convolution, BatchNorm by its running statistics (Ioffe and Szegedy, 2015), residual add (or
    concatenation) and ReLU.

    Without gradients it is one kernel. With gradients (a frozen BatchNorm), and for 16-bit tensors
    on a CPU, it is ATen's convolution and ``bn_act``.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, NCHW or channels_last.
        conv: weight (K, C / groups, R, S), bias (K,) or None, stride, padding, dilation (pairs),
            groups, and a ``Norm`` with ``training=False``, or None.
        residual: (N, K, P, Q) to add; optional.
        shortcut: the projection shortcut, a convolution and BatchNorm of ``residual``. Its output,
            (N, K, P, Q), is added instead of ``residual``; optional.
        concat: put ``residual``, (N, any, P, Q), before the K channels instead of adding it.
        act: ``relu`` (after the add or concatenation), ``relu_before_add``, or ``none``.
        backend: auto, cpu, cuda, triton or eager; default: set by ``fused_res.backend`` or
            ``FUSED_RES_BACKEND``, else auto.

    Returns:
        (N, K, P, Q) of x's dtype, with ``concat`` more channels, in the memory format PyTorch
            gives it.

    Raises:
        ValueError: a shape, device or value does not fit; a BatchNorm with ``training=True``.
        TypeError: a dtype does not fit.
        BackendUnavailable: the backend was named and cannot run this.

    Examples:
        >>> norm = Norm(torch.zeros(64), torch.ones(64))  # running mean and variance
        >>> conv = ConvNorm(torch.randn(64, 64, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, norm)
        >>> x = torch.randn(8, 64, 14, 14)
        >>> y = conv_bn_act(x, conv, residual=x)  # (8, 64, 14, 14)
    """
    call = Call(x, conv, residual, shortcut, concat, act)
    if torch.compiler.is_compiling():
        _check(call)
        return _dispatch(call, backend)
    try:
        return _dispatch(call, backend)
    except Exception:
        # The kernels check their arguments with short messages. These checks have full messages and
        # take half of a small call's time, so only a failed call runs them.
        _check(call)
        raise


def _dispatch(call: Call, backend: str | None) -> Tensor:
    x, conv, residual, _, concat, act = call
    tensors = _tensors(call)
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    # a compiled graph has symbols for sizes: the op chooses when it runs
    name = "eager"
    if not wants_grad:
        name = (choose if tracing else asked_for)("conv_bn_act", backend, *tensors)
    if not tracing and any(type(t) not in PLAIN for t in tensors):
        return reference.conv_bn_act(*call)
    unseen = conv.weight.dtype != x.dtype or (concat and call.shortcut is not None)
    if name == "eager" or tracing or unseen or not x.is_cpu:
        _check(call)
    if name == "eager" or x.numel() == 0 or (x.is_cpu and _autocasts(x)):
        return _with_bn_act(call, backend)
    call = _autocast(call)
    if residual is not None and call.residual.dtype != call.x.dtype:
        return reference.conv_bn_act(*call)  # PyTorch's rules of promotion
    if tracing:
        lists = _flatten(call)
        return torch.ops.fused_res.conv_bn_act(
            call.x, *lists, call.residual, concat, ACTS.index(act), name
        )
    return _run(call, name)
