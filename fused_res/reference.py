"""The specification of every fused op and block, in plain PyTorch.

Tests and benchmarks compare the fused ops with these functions. A fused op that cannot serve a call
(a transform, a dtype, a device) runs them instead. Nothing here knows of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import all_gather, all_reduce

Act = Literal["relu", "relu_before_add", "none"]
ACTS = ("none", "relu", "relu_before_add")  # in the order of csrc's enum Act
Kind = Literal["basic", "bottleneck", "single", "plain"]
Skip = Literal["identity", "projection", "concat"]
ReluPlacement = Literal["after", "before", "none"]
KINDS, SKIPS, RELUS = map(get_args, (Kind, Skip, ReluPlacement))


class Norm(NamedTuple):
    """The arguments of one ``F.batch_norm``.

    running_mean, running_var: (C,), or None in training.
    weight, bias: (C,), or None for 1 and 0.
    training: whether to normalise by the batch, and to update the running statistics in place.
    momentum: the share of the batch in the new running statistics.
    eps: added to the variance.

    Examples:
        >>> norm = Norm(torch.zeros(64), torch.ones(64), training=True)
        >>> torch.nn.functional.batch_norm(torch.randn(8, 64, 32, 32), *norm).shape
        torch.Size([8, 64, 32, 32])
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def bn_act(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = "relu",
    batch_norm: Callable[..., Tensor] = F.batch_norm,
) -> Tensor:
    """BatchNorm (Ioffe and Szegedy, 2015), the add of a residual and ReLU, in PyTorch's own ops.

    Args:
        x: (N, C, H, W), of any floating-point dtype.
        norm: the BatchNorm of ``x``. In training its running statistics are updated in place.
        residual: (N, C, H, W), added to the normalised ``x``; optional.
        residual_norm: the BatchNorm of ``residual`` (in a projection shortcut); optional.
        act: ``relu`` after the add, ``relu_before_add``, or ``none``.
        batch_norm: a function to run in place of ``F.batch_norm``.

    Returns:
        Tensor: (N, C, H, W), of the dtype of ``x``.

    Raises:
        ValueError: ``norm.training`` with a single value per channel.
        RuntimeError: the shapes or dtypes do not fit together.

    Examples:
        >>> x = torch.randn(8, 64, 32, 32)
        >>> bn_act(x, Norm(training=True), residual=x).shape
        torch.Size([8, 64, 32, 32])
    """
    y = batch_norm(x, *norm)
    if residual is not None and residual_norm is not None:
        residual = batch_norm(residual, *residual_norm)
    if act == "relu_before_add":
        y = F.relu(y)
    if residual is not None:
        y = y + residual
    return F.relu(y) if act == "relu" else y


def _over_channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def moments(x: Tensor) -> Tensor:
    """Mean, sum of squared deviations and number of values of each channel.

    Args:
        x: (N, C, H, W), of any floating-point dtype.

    Returns:
        Tensor: (3, C), float64; zeros for an empty ``x``.

    Examples:
        >>> moments(torch.ones(2, 1, 3, 3)).flatten().tolist()
        [1.0, 0.0, 18.0]
    """
    x, dims, count = x.double(), (0, 2, 3), x.numel() // x.size(1)
    mean = x.sum(dims) / max(count, 1)
    m2 = (x - _over_channels(mean)).square().sum(dims)
    return torch.stack((mean, m2, torch.full_like(mean, count)))


def merged(partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the ``moments`` of several batches, in a fixed order (Chan, Golub and LeVeque, 1983).

    Args:
        partial: (batches, ..., 3, C), float64.

    Returns:
        tuple: mean, sum of squared deviations and number of values, each (..., C), float64.

    Examples:
        >>> x = torch.randn(8, 64, 32, 32)
        >>> mean, m2, count = merged(torch.stack([moments(x[:2]), moments(x[2:])]))
        >>> torch.allclose(m2 / count, x.double().var((0, 2, 3), correction=0))
        True
    """
    means, m2s, counts = partial.unbind(-2)
    count = counts.sum(0)
    mean = (means * (counts / count)).sum(0)
    return mean, (m2s + counts * (means - mean).square()).sum(0), count


@torch.no_grad()
def update_running_statistics(norm: Norm, mean: Tensor, m2: Tensor, count: Tensor) -> None:
    """Updates the running statistics of ``norm`` in place, as ``F.batch_norm`` does in training.

    Args:
        norm: nothing is done if it has no running statistics.
        mean, m2, count: the results of ``merged``, each (C,), float64.

    Examples:
        >>> norm = Norm(torch.zeros(1), torch.ones(1), momentum=0.5)
        >>> update_running_statistics(norm, *merged(moments(torch.ones(2, 1, 3, 3))[None]))
        >>> norm.running_mean, norm.running_var
        (tensor([0.5000]), tensor([0.5000]))
    """
    if norm.running_mean is None:
        return
    for running, new in ((norm.running_mean, mean), (norm.running_var, m2 / (count - 1))):
        running.copy_(torch.lerp(running.double(), new, norm.momentum))


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: dist.ProcessGroup,
) -> Tensor:
    """BatchNorm by the statistics of all processes of a group, as ``nn.SyncBatchNorm`` in training.

    The forward pass has one all_gather, the backward pass one all_reduce.

    Args:
        x: (N, C, H, W), the batch of this process, of any floating-point dtype.
        running_mean, running_var, weight, bias, momentum, eps: as in ``Norm``.
        training: ignored; the statistics are always those of the batches.
        group: the processes.

    Returns:
        Tensor: (N, C, H, W), of the dtype of ``x``.

    Examples:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.randn(8, 64, 32, 32)
        >>> sync_batch_norm(x, None, None, group=dist.group.WORLD).shape
        torch.Size([8, 64, 32, 32])
    """
    dtype, x = x.dtype, x.double()  # once: the backward of each conversion rounds the gradient
    mean, m2, count = merged(all_gather(moments(x), group))
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps)
    update_running_statistics(norm, mean, m2, count)
    scale = (m2 / count + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = (x - _over_channels(mean)) * _over_channels(scale)
    return (y if bias is None else y + _over_channels(bias)).to(dtype)


class ConvNorm(NamedTuple):
    """The arguments of one ``F.conv2d`` without its input, and the BatchNorm of its output.

    weight: (K, C / groups, R, S).
    bias: (K,), or None.
    stride, padding, dilation: pairs, vertical and horizontal.
    norm: K channels; None: no BatchNorm.

    Examples:
        >>> weight = torch.randn(128, 64, 3, 3)
        >>> conv = ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, Norm(training=True))
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    norm: Norm | None


# A stage that the input goes through; None: the input is added itself; False: nothing is added.
Shortcut = ConvNorm | Literal[False] | None


def conv_bn_act(
    x: Tensor,
    conv: ConvNorm,
    residual: Tensor | None = None,
    shortcut: ConvNorm | None = None,
    concat: bool = False,
    act: Act = "relu",
    bn_act: Callable[..., Tensor] = bn_act,
) -> Tensor:
    """Convolution, BatchNorm, the add of a residual and ReLU, in PyTorch's own ops.

    Args:
        x: (N, C, H, W), of any floating-point dtype.
        conv: the convolution, from ``x`` to (N, K, P, Q), and its BatchNorm, if it has one.
        residual: (N, K, P, Q) to add; optional.
        shortcut: a convolution and BatchNorm that ``residual`` goes through before it is added (a
            projection shortcut); then ``residual`` has any size that gives (N, K, P, Q). Optional.
        concat: put ``residual``, (N, any, P, Q), before the channels instead of adding it.
        act: ``relu`` after the add or concatenation, ``relu_before_add``, or ``none``.
        bn_act: a function to run in place of ``reference.bn_act``.

    Returns:
        Tensor: (N, K, P, Q), of the dtype of ``x``; with ``concat`` the channels of ``residual``
            more.

    Raises:
        ValueError: a BatchNorm in training gets a single value per channel.
        RuntimeError: the shapes or dtypes do not fit together.

    Examples:
        >>> x, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
        >>> conv = ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, Norm(training=True))
        >>> conv_bn_act(x, conv, residual=x).shape
        torch.Size([8, 64, 32, 32])
    """
    y = F.conv2d(x, *conv[:-1])
    norm, second = conv.norm, None
    if shortcut is not None:
        residual, second = F.conv2d(residual, *shortcut[:-1]), shortcut.norm
        if norm is None and second is not None:
            residual, second = bn_act(residual, second, act="none"), None
    if norm is not None and not concat:
        return bn_act(y, norm, residual, second, act)
    if norm is not None:
        y = bn_act(y, norm, act="none")
    if act == "relu_before_add":
        y = F.relu(y)
    if residual is not None:
        y = torch.cat((residual, y), 1) if concat else y + residual
    return F.relu(y) if act == "relu" else y


def res_block(
    x: Tensor,
    branch: list[ConvNorm],
    shortcut: Shortcut = None,
    act: Act = "relu",
    bn_act: Callable[..., Tensor] = bn_act,
) -> Tensor:
    """A residual block (He et al., 2016, https://arxiv.org/abs/1512.03385), in PyTorch's own ops.

    Args:
        x: (N, C, H, W), of any floating-point dtype.
        branch: convolutions with a BatchNorm each; a ReLU follows each but the last.
        shortcut: the convolution and BatchNorm of a projection shortcut. None: ``x`` itself is
            added. False: nothing is added.
        act: ``relu`` after the add, ``relu_before_add``, or ``none``.
        bn_act: a function to run in place of ``reference.bn_act``.

    Returns:
        Tensor: (N, K, P, Q), the size of the branch's output, of the dtype of ``x``.

    Raises:
        ValueError: a BatchNorm in training gets a single value per channel.
        RuntimeError: the shapes or dtypes do not fit together.

    Examples:
        >>> x, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
        >>> stage = ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, Norm(training=True))
        >>> res_block(x, [stage, stage]).shape
        torch.Size([8, 64, 32, 32])
    """

    def convolve(stage: ConvNorm, x: Tensor) -> Tensor:
        return F.conv2d(x, *stage[:-1])

    z = x
    for stage in branch[:-1]:
        z = bn_act(convolve(stage, z), stage.norm)
    residual, norm = None if shortcut is False else x, None
    if shortcut:
        residual, norm = convolve(shortcut, x), shortcut.norm
    return bn_act(convolve(branch[-1], z), branch[-1].norm, residual, norm, act)


def batch_norm_bwd(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one BatchNorm, in differentiable ops: a second derivative can be taken.

    Args:
        g: (N, C, H, W), the gradient of the output.
        x: (N, C, H, W), the input.
        weight: (C,), or None for 1.
        mean, invstd: (C,), the statistics. They are used only if ``training`` is False; in training
            they are computed again from ``x``. Their dtype is the dtype of the arithmetic.
        training: whether the norm used the statistics of its batch.
        eps: added to the variance.
        group: in training, the processes that share their statistics. ``dweight`` and ``dbias`` are
            sums over the values of this process alone.

    Returns:
        tuple: dx, like ``x``; dweight and dbias, (C,), of the dtype of ``weight``, or of ``x``
            without one.

    Examples:
        >>> x, mean, invstd = torch.randn(8, 64, 32, 32), torch.zeros(64), torch.ones(64)
        >>> dx, dweight, dbias = batch_norm_bwd(torch.ones_like(x), x, None, mean, invstd, True, 0)
        >>> dbias[0]
        tensor(8192.)
    """
    dtype = x.dtype
    g, x = g.to(mean.dtype), x.to(mean.dtype)
    dims = (0, 2, 3)
    count = x.numel() // x.size(1)
    if training and group is None:
        mean = x.mean(dims)
        invstd = ((x - _over_channels(mean)).square().mean(dims) + eps).rsqrt()
    elif training:
        mean, m2, count = merged(all_gather(moments(x), group))
        invstd = (m2 / count + eps).rsqrt()
    xhat = (x - _over_channels(mean)) * _over_channels(invstd)
    dbias, dweight = g.sum(dims), (g * xhat).sum(dims)
    dx = g
    if training:
        sums = torch.stack((dbias, dweight))
        of_g, of_gx = (sums if group is None else all_reduce(sums, group)) / count
        dx = g - (_over_channels(of_g) + xhat * _over_channels(of_gx))
    scale = invstd if weight is None else invstd * weight.to(mean.dtype)
    dx = dx * _over_channels(scale)
    parameter_dtype = dtype if weight is None else weight.dtype
    return dx.to(dtype), dweight.to(parameter_dtype), dbias.to(parameter_dtype)


def _completed(
    in_channels, out_channels, stride, kind, skip, groups, dilation, width, relu, dropout
) -> tuple[Skip, ReluPlacement, int]:
    """``skip``, ``relu`` and ``width`` of a ``ResBlock``, with defaults in place of None.

    Raises:
        ValueError: an argument is out of range or two do not fit together.
    """
    positive = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
    for name, value in (positive | {"groups": groups, "dilation": dilation}).items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    fits = in_channels == out_channels and stride == 1
    if skip is None:
        skip = "identity" if fits else "projection"
    if relu is None:
        relu = "none" if skip == "concat" else "before" if kind == "single" else "after"
    known = {"kind": (kind, KINDS), "skip": (skip, SKIPS), "relu": (relu, RELUS)}
    for name, (value, values) in known.items():
        if value not in values:
            raise ValueError(f"{name}={value!r} must be one of: {', '.join(values)}")
    if skip == "identity" and not fits:
        raise ValueError(
            f"skip='identity' needs in_channels == out_channels and stride 1, got "
            f"in_channels={in_channels}, out_channels={out_channels}, stride={stride}"
        )
    if skip == "concat" and stride != 1:
        raise ValueError(f"skip='concat' needs stride=1, got stride={stride}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be at least 0 and under 1")
    if width is None:
        width = max(out_channels // 4, 1) if kind == "bottleneck" else out_channels
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width={width!r} must be an integer of at least 1")
    return skip, relu, width


def _convolutions(
    kind: Kind, in_channels: int, width: int, out_channels: int, stride: int
) -> list[tuple[int, int, int, int]]:
    """Channels in, channels out, kernel size and stride of each convolution of the branch."""
    if kind == "bottleneck":
        return [(in_channels, width, 1, 1), (width, width, 3, stride), (width, out_channels, 1, 1)]
    if kind == "single":
        return [(in_channels, out_channels, 3, stride)]
    return [(in_channels, width, 3, stride), (width, out_channels, 3, 1)]


class ResBlock(nn.Module):
    """A residual block in plain PyTorch: the specification of ``fused_res.FusedResBlock``.

    Basic and bottleneck blocks are those of He et al., 2016 (https://arxiv.org/abs/1512.03385). The
    3x3 convolution has the stride. Children are named as in torchvision:
    ``conv1 bn1 conv2 bn2 [conv3 bn3] [downsample.0 downsample.1]``.

    Args:
        in_channels: channels of the input, (N, in_channels, H, W).
        out_channels: channels of the branch's output. The block's output has as many, and with
            ``skip="concat"`` ``in_channels`` more.
        stride: of the branch's (first) 3x3 convolution, and of the projection.
        kind: ``basic`` (two 3x3), ``bottleneck`` (1x1, 3x3, 1x1), ``single`` (one 3x3) or ``plain``
            (two 3x3 without normalisation).
        skip: ``identity``, ``projection`` (1x1 convolution and, unless plain, BatchNorm) or
            ``concat`` (the output is ``cat((x, branch), dim=1)``). Default: identity where the
            shapes allow it, else projection.
        groups: of the 3x3 convolutions.
        dilation: of the 3x3 convolutions, padded so that the size stays.
        width: channels inside the branch. Default: ``out_channels``; a quarter in a bottleneck.
        bias: whether the convolutions have a bias. Default: in plain blocks alone.
        relu: ``after`` the add, ``before`` it (on the branch), or ``none``. Default: before the add
            in a single block, none with ``skip="concat"``, else after.
        dropout: probability of ``nn.Dropout`` on the last convolution's input
            (Zagoruyko and Komodakis, 2016).
        eps, momentum, affine, track_running_stats: of every ``nn.BatchNorm2d``.
        device, dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels [+ in_channels], H / stride, W / stride), sizes
        rounded up.

    Raises:
        ValueError: an argument is out of range or two do not fit together; the message names them.

    Examples:
        >>> block = ResBlock(64, 128, stride=2)
        >>> block(torch.randn(8, 64, 32, 32)).shape
        torch.Size([8, 128, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        kind: Kind = "basic",
        skip: Skip | None = None,
        groups: int = 1,
        dilation: int = 1,
        width: int | None = None,
        bias: bool | None = None,
        relu: ReluPlacement | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        skip, relu, width = _completed(
            in_channels, out_channels, stride, kind, skip, groups, dilation, width, relu, dropout
        )
        self.kind, self.skip, self.relu_placement = kind, skip, relu
        has_norm = kind != "plain"
        factory = {"device": device, "dtype": dtype}

        def conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
            spread, g = (dilation, groups) if size == 3 else (1, 1)
            if c_in % g or c_out % g:
                raise ValueError(f"groups={g} must divide the 3x3's channels, {c_in} -> {c_out}")
            has_bias = (not has_norm) if bias is None else bias
            padding = spread * (size // 2)
            return nn.Conv2d(c_in, c_out, size, stride, padding, spread, g, has_bias, **factory)

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps, momentum, affine, track_running_stats, **factory)

        convs = _convolutions(kind, in_channels, width, out_channels, stride)
        for i, shape in enumerate(convs, 1):
            setattr(self, f"conv{i}", conv(*shape))
            if has_norm:
                setattr(self, f"bn{i}", norm(shape[1]))
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.downsample = None
        if skip == "projection":
            projection = [conv(in_channels, out_channels, 1, stride)]
            self.downsample = nn.Sequential(
                *projection, *([norm(out_channels)] if has_norm else [])
            )
        self.depth = len(convs)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            last = i == self.depth
            if last and self.dropout is not None:
                out = self.dropout(out)
            out = getattr(self, f"conv{i}")(out)
            if self.kind != "plain":
                out = getattr(self, f"bn{i}")(out)
            if not last or self.relu_placement == "before":
                out = self.relu(out)
        if self.skip == "concat":
            out = torch.cat((x, out), dim=1)
        else:
            out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out) if self.relu_placement == "after" else out

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, skip={self.skip!r}, relu={self.relu_placement!r}"
