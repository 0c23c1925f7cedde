"""Convolution + BatchNorm + residual + ReLU in one launch, in Triton, for inference.

``conv_tiles.py`` says how a convolution is cut into tiles. The descriptor kernel takes convolutions
whose tensors can be read in boxes, the pointer kernel any. BatchNorm's scale and shift are computed
where they are applied: nothing is kept between calls that a change of the parameters could make
wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.reference import ACTS, Act, ConvNorm, Norm

from . import conv_tiles, launch
from .conv_tiles import (
    Config,
    Problem,
    box_convolve,
    channels_last,
    count_boxes,
    describe_filters,
    describe_pairs,
    describe_pixels,
    gather_convolve,
    is_boxed,
    is_exact,
    output_size,
    ranked,
    rounding,
    tile_box,
    tiled_size,
)
from .launch import INTERPRETED, ceil_div

# Kernels are not compiled again where one of these numbers is 1 or a multiple of 16.
COUNTS = ("N", "H", "W", "P", "Q", "H2", "W2", "pixels", "tiles")

# --- device functions


@triton.jit
def _channel(p, k, ok, missing: tl.constexpr):
    """A per-channel tensor in float32; ``missing`` where it is None."""
    if p is None:  # what follows a return is compiled too
        value = tl.full(k.shape, missing, tl.float32)
    else:
        value = tl.load(p + k, mask=ok, other=missing).to(tl.float32)
    return value


@triton.jit
def _affine(bias, mean, var, weight, shift, eps, k, ok):
    """scale and offset of a BatchNorm with running statistics of a convolution with a bias. In
    float64 they made no result better."""
    scale = tl.full(k.shape, 1.0, tl.float32)
    if var is not None:
        std = tl.sqrt_rn(_channel(var, k, ok, 1.0) + eps)
        scale = tl.div_rn(_channel(weight, k, ok, 1.0), std)
    center = _channel(mean, k, ok, 0.0) - _channel(bias, k, ok, 0.0)
    return scale[:, None], (_channel(shift, k, ok, 0.0) - center * scale)[:, None]


@triton.jit
def _epilogue(z, other, ACT: tl.constexpr):
    """ReLU and add; ACT as in ACTS."""
    if ACT == 2:
        z = tl.where(z <= 0, 0.0, z)  # NaN passes, as torch.relu lets it
    if other is not None:
        z += other.to(tl.float32)
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, z)
    return z


# --- kernels


@triton.jit(do_not_specialize=COUNTS)
def _conv_bn_act_fwd_descriptor_kernel(x, w, y, residual, bias, mean, var, weight, shift, eps, x2,
                                       w2, bias2, mean2, var2, weight2, shift2, eps2, N, P, Q, K,
                                       channels, channels2, tiles, R: tl.constexpr, S: tl.constexpr,
                                       PAIRED: tl.constexpr, PAD_H: tl.constexpr,
                                       PAD_W: tl.constexpr, DIL_H: tl.constexpr,
                                       DIL_W: tl.constexpr, ACT: tl.constexpr, IMAGES: tl.constexpr,
                                       TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
                                       BK: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """x, w, y, x2, w2 are descriptors, the rest pointers. ``residual`` is (N, P, Q, K); x2 is what
    the shortcut's 1x1 convolution w2 reads at each pixel. Grid: any; a program goes from tile to
    tile. Tiles of the same pixels are neighbours: all but one find them in the L2 cache.
    """
    M: tl.constexpr = IMAGES * TH * TW
    across = tl.cdiv(Q, TW)
    down = tl.cdiv(P, TH)
    k_tiles = tl.cdiv(K, BN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        k0 = tile % k_tiles * BN
        box = tile // k_tiles
        q0 = box % across * TW
        p0 = box // across % down * TH
        n0 = box // across // down * IMAGES
        k = k0 + tl.arange(0, BN)
        ok = k < K
        other = None
        if residual is not None:  # asked for here, not waited for until after the loop
            i = tl.arange(0, M)
            n = n0 + i // (TH * TW)
            p = p0 + i // TW % TH
            q = q0 + i % TW
            both = ((n < N) & (p < P) & (q < Q))[None, :] & ok[:, None]
            pixel = (n.to(tl.int64) * P + p) * Q + q
            other = tl.load(residual + (pixel[None, :] * K + k[:, None]), mask=both, other=0)
        scale, offset = _affine(bias, mean, var, weight, shift, eps, k, ok)
        if x2 is not None:
            scale2, offset2 = _affine(bias2, mean2, var2, weight2, shift2, eps2, k, ok)
            z = box_convolve(x2, w2, n0, p0, q0, k0, channels2, 1, 1, False, 0, 0, 1, 1, IMAGES,
                             TH, TW, BN, BK, INTERPRETED)  # fmt: skip
            other = (z * scale2 + offset2).to(y.dtype)  # rounded as by PyTorch: half the registers
        z = box_convolve(x, w, n0, p0, q0, k0, channels, R, S, PAIRED, PAD_H, PAD_W, DIL_H, DIL_W,
                         IMAGES, TH, TW, BN, BK, INTERPRETED)  # fmt: skip
        z = _epilogue(z * scale + offset, other, ACT)
        y.store([n0, p0, q0, k0], z.to(y.dtype).T.reshape(IMAGES, TH, TW, BN))


@triton.jit(do_not_specialize=COUNTS)
def _conv_bn_act_fwd_pointer_kernel(x, w, y, residual, bias, mean, var, weight, shift, eps, x2, w2,
                                    bias2, mean2, var2, weight2, shift2, eps2, P, Q, K, row, pixels,
                                    H, W, C, depth, H2, W2, C2, groups, R: tl.constexpr,
                                    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
                                    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
                                    DIL_W: tl.constexpr, WHOLE: tl.constexpr,
                                    STRIDE2_H: tl.constexpr, STRIDE2_W: tl.constexpr,
                                    WHOLE2: tl.constexpr, ACT: tl.constexpr, M: tl.constexpr,
                                    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
                                    INTERPRETED: tl.constexpr):  # fmt: skip
    """As the descriptor kernel, for pointers to NHWC tensors and K channels of each group. ``row``:
    how many channels y has, of which these may be the last. Grid (tiles)."""
    k_tiles = tl.cdiv(K, BN)
    tile = tl.program_id(0)
    group = tile // k_tiles % groups
    k = tile % k_tiles * BN + tl.arange(0, BN)
    ok = k < K
    k += group * K
    # int64 where there are so many pixels
    m = (tile // k_tiles // groups).to(pixels.dtype) * M + tl.arange(0, M)
    inside = m < pixels
    n = m // Q // P
    p = (m // Q % P).to(tl.int32)
    q = (m % Q).to(tl.int32)
    m = m.to(tl.int64)
    both = inside[None, :] & ok[:, None]
    other = None
    if residual is not None:
        at = m[None, :] * (groups * K) + k[:, None]
        other = tl.load(residual + at, mask=both, other=0)
    if x2 is not None:
        z = gather_convolve(x2, w2, n, p, q, inside, k, ok, 0, H2, W2, C2, C2, 1, 1, STRIDE2_H,
                            STRIDE2_W, 0, 0, 1, 1, WHOLE2, M, BN, BK, PRECISION,
                            INTERPRETED)  # fmt: skip
        scale2, offset2 = _affine(bias2, mean2, var2, weight2, shift2, eps2, k, ok)
        other = (z * scale2 + offset2).to(y.dtype.element_ty)
    z = gather_convolve(x, w, n, p, q, inside, k, ok, group * depth, H, W, C, depth, R, S,
                        STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, WHOLE, M, BN, BK,
                        PRECISION, INTERPRETED)  # fmt: skip
    scale, offset = _affine(bias, mean, var, weight, shift, eps, k, ok)
    z = _epilogue(z * scale + offset, other, ACT)
    tl.store(y + (m[None, :] * row + k[:, None]), z.to(y.dtype.element_ty), mask=both)


# --- launches


def _is_pixelwise(conv: ConvNorm) -> bool:
    """Whether it reads one pixel for one."""
    return conv.groups == 1 and conv.weight.shape[2:] == (1, 1) and tuple(conv.padding) == (0, 0)


def _shares_launch(conv: ConvNorm, shortcut: ConvNorm | None) -> bool:
    """Whether the shortcut's convolution runs in the same launch."""
    return shortcut is not None and conv.groups == 1 and _is_pixelwise(shortcut)


def _kind(x: Tensor, conv: ConvNorm, residual, shortcut, concat: bool) -> str:
    """Of the kernel that takes a call."""
    if is_exact(x.dtype):
        return "exact"
    before = residual.size(1) if concat else 0  # channels of y
    described = [x, conv.weight] + ([] if shortcut is None else [residual, shortcut.weight])
    stride = (1, 1) if _is_pixelwise(conv) else tuple(conv.stride)
    fits = (
        conv_tiles.gpu(x.device)[1]
        and conv.groups == 1
        and all(channels * x.element_size() % 16 == 0 for channels in (before, len(conv.weight)))
        and all(map(is_boxed, described))
        # in steps of 2 the rows and columns of an image must come in pairs
        and (stride == (1, 1) or (stride == (2, 2) and x.size(2) % 2 == x.size(3) % 2 == 0))
    )
    return "descriptor" if fits else "pointer"


def _problem(x, conv, residual, shortcut, concat) -> Problem:
    if not _shares_launch(conv, shortcut):
        shortcut = None
    k, c, r, s = conv.weight.shape
    n, (p, q) = x.size(0), output_size(x, conv)
    strides = [tuple(stage.stride) for stage in (conv, shortcut) if stage is not None]
    return Problem(
        _kind(x, conv, residual, shortcut, concat),
        n,
        c,
        k,
        p,
        q,
        r * s,
        conv.groups,
        # coordinates are int32
        _is_pixelwise(conv) and set(strides) == {(1, 1)} and n * p * q < 2**31 - 2**16,
        0 if shortcut is None else shortcut.weight.size(1),
        residual is not None and shortcut is None and not concat,
        x.element_size(),
        conv_tiles.gpu(x.device)[0],
    )


def _parameters(conv: ConvNorm | None, suffix: str = "") -> dict:
    """A convolution's bias and BatchNorm, as kernels take them."""
    norm = Norm() if conv is None or conv.norm is None else conv.norm
    tensors = {
        "bias": None if conv is None else conv.bias,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "weight": norm.weight,
        "shift": norm.bias,
    }
    found = {f"{name}{suffix}": launch.contiguous(t) for name, t in tensors.items()}
    return found | {f"eps{suffix}": norm.eps}


class _Launch(NamedTuple):
    """A launch. y: the last of an output's ``channels``; residual: what is added, or what the
    shortcut's convolution reads."""

    x: Tensor
    conv: ConvNorm
    y: Tensor
    channels: int
    residual: Tensor | None
    shortcut: ConvNorm | None
    act: Act
    problem: Problem
    config: Config

    def run(self) -> None:
        if self.config.kind == "descriptor":
            self._run_descriptor()
        else:
            self._run_pointer()

    def _arguments(self) -> dict:
        """What both kernels take."""
        config, conv, (r, s) = self.config, self.conv, self.conv.weight.shape[2:]
        return {
            "residual": self.residual if self.shortcut is None else None,
            **_parameters(conv),
            **_parameters(self.shortcut, "2"),
            "R": r, "S": s, "PAD_H": conv.padding[0], "PAD_W": conv.padding[1],
            "DIL_H": conv.dilation[0], "DIL_W": conv.dilation[1], "ACT": ACTS.index(self.act),
            "BN": config.BN, "BK": config.BK, "INTERPRETED": INTERPRETED, "warps": config.warps,
            "stages": conv_tiles.stages(config, self.x.device),
        }  # fmt: skip

    def _run_descriptor(self) -> None:
        conv, shortcut, problem, config = self.conv, self.shortcut, self.problem, self.config
        size = tiled_size(problem)
        images, rows, columns = box = tile_box(*size, config.M)
        n, c, h, w = self.x.shape
        block = [*box, config.BK]
        rounded = rounding(self.x.dtype)  # of what is multiplied, not of y
        paired = not _is_pixelwise(conv) and tuple(conv.stride) == (2, 2)
        if paired:
            x = describe_pairs(self.x, [images, rows, 1, columns, config.BK], **rounded)
        else:
            pixels = size if _is_pixelwise(conv) else (n, h, w)
            x = describe_pixels(self.x, c, conv.stride, pixels, block, **rounded)
        x2 = w2 = None
        if shortcut is not None:
            x2 = describe_pixels(self.residual, problem.C2, shortcut.stride, size, block, **rounded)
            w2 = describe_filters(channels_last(shortcut.weight), config)
        tiles = count_boxes(*size, box) * ceil_div(problem.K, config.BN)
        launch.run(
            _conv_bn_act_fwd_descriptor_kernel,
            (min(tiles, config.programs * problem.multiprocessors),), x=x,
            w=describe_filters(channels_last(conv.weight), config),
            y=describe_pixels(self.y, self.channels, (1, 1), size, [*box, config.BN]), x2=x2, w2=w2,
            N=size[0], P=size[1], Q=size[2], K=problem.K, channels=problem.C, channels2=problem.C2,
            tiles=tiles, PAIRED=paired, IMAGES=images, TH=rows, TW=columns, **self._arguments(),
        )  # fmt: skip

    def _run_pointer(self) -> None:
        conv, shortcut, problem, config = self.conv, self.shortcut, self.problem, self.config
        k, depth = conv.weight.shape[:2]
        c, h, w = self.x.shape[1:]
        x2 = w2 = None
        c2 = h2 = w2_columns = 0
        stride2 = (1, 1)
        if shortcut is not None:
            x2, w2, stride2 = self.residual, channels_last(shortcut.weight), shortcut.stride
            c2, h2, w2_columns = x2.shape[1:]
        pixels = problem.N * problem.P * problem.Q
        each = k // conv.groups
        tiles = ceil_div(pixels, config.M) * conv.groups * ceil_div(each, config.BN)
        launch.run(
            _conv_bn_act_fwd_pointer_kernel, (tiles,), x=self.x, w=channels_last(conv.weight),
            y=self.y, x2=x2, w2=w2, P=problem.P, Q=problem.Q, K=each, row=self.channels,
            pixels=pixels, H=h, W=w, C=c, depth=depth, H2=h2, W2=w2_columns, C2=c2,
            groups=conv.groups, STRIDE_H=conv.stride[0], STRIDE_W=conv.stride[1],
            STRIDE2_H=stride2[0], STRIDE2_W=stride2[1], WHOLE=depth % config.BK == 0,
            WHOLE2=c2 % config.BK == 0, M=config.M,
            PRECISION="ieee" if config.kind == "exact" else "tf32", **self._arguments(),
        )  # fmt: skip


# --- the op


def why_not(
    x: Tensor,
    conv: ConvNorm,
    residual: Tensor | None = None,
    shortcut: ConvNorm | None = None,
    concat: bool = False,
    act: Act = "relu",
) -> str | None:
    """What of a call the kernels cannot take; None where they can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}"
    for stage in (conv, shortcut):
        if stage is not None and stage.norm is not None and stage.norm.training:
            return "a norm is in training mode"
    return None


def candidates(
    x: Tensor,
    conv: ConvNorm,
    residual: Tensor | None = None,
    shortcut: ConvNorm | None = None,
    concat: bool = False,
    act: Act = "relu",
) -> list[Config]:
    """The configurations that this call can run in, best guess first."""
    return list(ranked(_problem(x, conv, residual, shortcut, concat)))


def forward(
    x: Tensor,
    conv: ConvNorm,
    residual: Tensor | None = None,
    shortcut: ConvNorm | None = None,
    concat: bool = False,
    act: Act = "relu",
    config: Config | None = None,
) -> Tensor:
    """``reference.conv_bn_act`` for norms that are not in training mode; y is channels_last.

    Args:
        config: one of ``candidates`` of this call; default: the first.
    """
    if shortcut is not None and not _shares_launch(conv, shortcut):
        residual, shortcut = forward(residual, shortcut, act="none"), None
    x = channels_last(x)
    if residual is not None and not concat:
        residual = channels_last(residual)
    problem = _problem(x, conv, residual, shortcut, concat)
    before = residual.size(1) if concat else 0
    y = torch.empty(
        (problem.N, before + problem.K, problem.P, problem.Q),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    out = y
    if concat:
        head, out = y[:, :before], y[:, before:]
        if act == "relu":
            torch.clamp_min(residual, 0, out=head)
        else:
            head.copy_(residual)
        residual = None
    if out.numel() > 0:
        if config is None:
            config = ranked(problem)[0]
        with launch.on_device(x):
            _Launch(x, conv, out, y.size(1), residual, shortcut, act, problem, config).run()
    return y
