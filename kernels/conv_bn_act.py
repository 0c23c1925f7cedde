"""Convolution + BatchNorm + residual + ReLU in one launch, in Triton, for inference.

Implicit GEMM: a tile is BN channels of the output by M of its pixels, summed over the taps of the
filter and the channels of the input. ``conv_descriptor`` loads boxes of the NHWC tensors through
tensor descriptors (TMA on NVIDIA GPUs since Hopper): what of a box is outside of the image is
zeros, so there are no masks and no im2col. ``conv_pointer`` gathers elements, and takes any
convolution. BatchNorm's scale and shift are computed where they are applied: nothing is kept
between calls that a change of the parameters could make wrong.

Filters are the first operand of the products: Triton 3.9 takes a box of several rows from shared
memory as the second only, and a thread has few rows' scales and many columns'. With the pixels
first a tile of 128x128 took 195 registers instead of 117.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_res.dispatch.shipped_timings import MOST_SHAPES
from fused_res.reference import ACTS, Act, ConvNorm, Norm

from .bn_act import _WARP, _channels, _on
from .bn_act import options as _options

# Numbers that a kernel is not compiled anew for where they are 1 or multiples of 16.
COUNTS = ("N", "H", "W", "P", "Q", "H2", "W2", "pixels", "tiles")

# --- pieces


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
def _finish(z, other, ACT: tl.constexpr):
    """ReLU and add; ACT as in ACTS."""
    if ACT == 2:
        z = tl.where(z <= 0, 0.0, z)  # NaN passes, as torch.relu lets it
    if other is not None:
        z += other.to(tl.float32)
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def _dot(filters, pixels, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which makes garbage of bfloat16
        filters = filters.to(tl.float32)
        pixels = pixels.to(tl.float32)
    return tl.dot(filters, pixels, acc, input_precision=PRECISION)


# --- tensor descriptors


@triton.jit
def _box_convolve(x, w, n, p, q, k, channels, R: tl.constexpr, S: tl.constexpr,
                  PAIRED: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
                  DIL_H: tl.constexpr, DIL_W: tl.constexpr, IMAGES: tl.constexpr,
                  TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  INTERPRETED: tl.constexpr):  # fmt: skip
    """The convolution's tile [BN, IMAGES * TH * TW] from channel k, image n, pixel (p, q) on."""
    M: tl.constexpr = IMAGES * TH * TW
    acc = tl.zeros([BN, M], tl.float32)
    c = 0
    r = 0
    s = 0
    for i in range(R * S * (channels // BK)):
        h = r * DIL_H - PAD_H
        v = s * DIL_W - PAD_W
        if PAIRED:  # (N, H / 2, 2, W / 2, 2 * C)
            box = x.load([n, p + (h >> 1), h & 1, q + (v >> 1), (v & 1) * channels + c])
        else:
            box = x.load([n, p + h, q + v, c])
        acc = _dot(w.load([k, i * BK]), box.reshape(M, BK).T, acc, "tf32", INTERPRETED)
        c += BK
        if R * S > 1:
            s += tl.where(c == channels, 1, 0)
            c = tl.where(c == channels, 0, c)
            r += tl.where(s == S, 1, 0)
            s = tl.where(s == S, 0, s)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def conv_descriptor(x, w, y, residual, bias, mean, var, weight, shift, eps, x2, w2, bias2, mean2,
                    var2, weight2, shift2, eps2, N, P, Q, K, channels, channels2, tiles,
                    R: tl.constexpr, S: tl.constexpr, PAIRED: tl.constexpr, PAD_H: tl.constexpr,
                    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
                    ACT: tl.constexpr, IMAGES: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr,
                    INTERPRETED: tl.constexpr):  # fmt: skip
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
            z = _box_convolve(x2, w2, n0, p0, q0, k0, channels2, 1, 1, False, 0, 0, 1, 1, IMAGES,
                              TH, TW, BN, BK, INTERPRETED)  # fmt: skip
            other = (z * scale2 + offset2).to(y.dtype)  # rounded as by PyTorch: half the registers
        z = _box_convolve(x, w, n0, p0, q0, k0, channels, R, S, PAIRED, PAD_H, PAD_W, DIL_H, DIL_W,
                          IMAGES, TH, TW, BN, BK, INTERPRETED)  # fmt: skip
        z = _finish(z * scale + offset, other, ACT)
        y.store([n0, p0, q0, k0], z.to(y.dtype).T.reshape(IMAGES, TH, TW, BN))


# --- pointers


@triton.jit
def _gather_convolve(x, w, n, p, q, inside, k, ok, first, H, W, C, depth, R: tl.constexpr,
                     S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
                     PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
                     DIL_W: tl.constexpr, WHOLE: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
                     BK: tl.constexpr, PRECISION: tl.constexpr,
                     INTERPRETED: tl.constexpr):  # fmt: skip
    """The convolution at pixels (n, p, q) [M], of ``depth`` channels from the first of C on, for
    output channels k [BN]. WHOLE: depth is a multiple of BK, so a step has one tap."""
    top = p * STRIDE_H - PAD_H
    left = q * STRIDE_W - PAD_W
    pixels = x + ((n.to(tl.int64) * H + top) * W + left) * C + first
    filters = w + k.to(tl.int64) * (R * S * depth)
    acc = tl.zeros([BN, M], tl.float32)
    for start in range(0, R * S * depth, BK):
        i = start + tl.arange(0, BK)
        if WHOLE:  # noqa: SIM108  (the compiler types both arms of an expression)
            tap = start // depth + tl.zeros([BK], tl.int32)
        else:
            tap = i // depth
        r = tap // S * DIL_H
        s = tap % S * DIL_W
        h = top[None, :] + r[:, None]
        v = left[None, :] + s[:, None]
        known = i < R * S * depth
        in_image = (h >= 0) & (h < H) & (v >= 0) & (v < W) & inside[None, :] & known[:, None]
        at = (r.to(tl.int64) * W + s) * C + (i - tap * depth)
        a = tl.load(filters[:, None] + i[None, :], mask=ok[:, None] & known[None, :], other=0)
        b = tl.load(pixels[None, :] + at[:, None], mask=in_image, other=0)
        acc = _dot(a, b, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def conv_pointer(x, w, y, residual, bias, mean, var, weight, shift, eps, x2, w2, bias2, mean2, var2,
                 weight2, shift2, eps2, P, Q, K, row, pixels, H, W, C, depth, H2, W2, C2, groups,
                 R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
                 PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
                 DIL_W: tl.constexpr, WHOLE: tl.constexpr, STRIDE2_H: tl.constexpr,
                 STRIDE2_W: tl.constexpr, WHOLE2: tl.constexpr, ACT: tl.constexpr, M: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
                 INTERPRETED: tl.constexpr):  # fmt: skip
    """As conv_descriptor, for pointers to NHWC tensors and K channels of each group. ``row``: how
    many channels y has, of which these may be the last. Grid (tiles)."""
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
        z = _gather_convolve(x2, w2, n, p, q, inside, k, ok, 0, H2, W2, C2, C2, 1, 1, STRIDE2_H,
                             STRIDE2_W, 0, 0, 1, 1, WHOLE2, M, BN, BK, PRECISION,
                             INTERPRETED)  # fmt: skip
        scale2, offset2 = _affine(bias2, mean2, var2, weight2, shift2, eps2, k, ok)
        other = (z * scale2 + offset2).to(y.dtype.element_ty)
    z = _gather_convolve(x, w, n, p, q, inside, k, ok, group * depth, H, W, C, depth, R, S,
                         STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, WHOLE, M, BN, BK,
                         PRECISION, INTERPRETED)  # fmt: skip
    scale, offset = _affine(bias, mean, var, weight, shift, eps, k, ok)
    z = _finish(z * scale + offset, other, ACT)
    tl.store(y + (m[None, :] * row + k[:, None]), z.to(y.dtype.element_ty), mask=both)


# --- configurations


class Config(NamedTuple):
    """kind: of kernel, and ``exact`` for float32 without tensor cores. M: pixels of a tile; BN:
    output channels; BK: input channels of a step where elements have 2 bytes. programs: that a
    multiprocessor holds at a time, where no shortcut takes their registers."""

    kind: str
    M: int
    BN: int
    BK: int
    warps: int
    stages: int
    programs: int


# By registers and shared memory (benchmarks/kernels.md): none was timed on a GPU.
CONFIGS = (
    Config("descriptor", 256, 128, 64, 8, 3, 1),
    Config("descriptor", 128, 128, 64, 8, 4, 1),
    Config("descriptor", 128, 128, 64, 8, 2, 2),
    Config("descriptor", 256, 64, 64, 8, 2, 2),
    Config("descriptor", 128, 64, 64, 4, 2, 3),
    Config("descriptor", 64, 64, 64, 4, 4, 3),
    Config("pointer", 128, 128, 32, 8, 3, 1),
    Config("pointer", 128, 64, 32, 8, 3, 2),
    Config("pointer", 64, 64, 32, 4, 3, 3),
    Config("exact", 64, 64, 16, 8, 2, 2),
)
# Tiles of more products spill where those of a shortcut are added, or float32.
WIDEST = 128 * 128
INTERPRETED = not isinstance(conv_pointer, triton.JITFunction)
MULTIPROCESSORS = 3  # of the interpreter and the report: a few tiles are several rounds
# Else the tensor cores cut float32 off. Triton 3.6 has no such field.
ROUND = {"round_f32_to_tf32": True}
if INTERPRETED or "round_f32_to_tf32" not in TensorDescriptor.__dataclass_fields__:
    ROUND = {}


class Problem(NamedTuple):
    """What a configuration is picked for."""

    kind: str  # of the kernel
    N: int
    C: int
    K: int
    P: int
    Q: int
    taps: int
    groups: int
    flat: bool  # all pixels are one row
    C2: int  # channels that the shortcut of the same launch sums over, or 0
    residual: bool
    itemsize: int
    multiprocessors: int


@functools.cache
def _gpu(device: torch.device) -> tuple[int, bool]:
    """Its multiprocessors, and whether descriptors are for it: it has TMA and 227 KB of shared
    memory a block (the GeForce GPUs after Hopper have 99)."""
    if INTERPRETED or device.type == "meta":
        return MULTIPROCESSORS, True
    if device.type != "cuda":
        return torch.xpu.get_device_properties(device).gpu_subslice_count, False
    count = torch.cuda.get_device_properties(device).multi_processor_count
    major, _ = torch.cuda.get_device_capability(device)
    return count, not torch.version.hip and major in (9, 10)


def _exact(dtype: torch.dtype) -> bool:
    """Whether products of float32 are not to be rounded, as PyTorch has it for convolutions."""
    if dtype != torch.float32 or torch.version.hip:
        return dtype == torch.float32
    conv = getattr(torch.backends.cudnn, "conv", None)  # none before PyTorch 2.9
    tf32 = torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"
    return not tf32


def _pixelwise(conv: ConvNorm) -> bool:
    """Whether it reads one pixel for one."""
    return conv.groups == 1 and conv.weight.shape[2:] == (1, 1) and tuple(conv.padding) == (0, 0)


def _folds(conv: ConvNorm, shortcut: ConvNorm | None) -> bool:
    return shortcut is not None and conv.groups == 1 and _pixelwise(shortcut)


def _output(x: Tensor, conv: ConvNorm) -> tuple[int, int]:
    """Rows and columns of the convolution."""
    return tuple(
        (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, padding, dilation in zip(
            x.shape[2:], conv.weight.shape[2:], *conv[2:5], strict=True
        )
    )


def _boxed(t: Tensor) -> bool:
    """Whether it can be taken in boxes: of 16 channels at least, and where descriptors ask for
    multiples of 16 bytes."""
    return t.size(1) % 16 == 0 and t.data_ptr() % 16 == 0


def _kind(x: Tensor, conv: ConvNorm, residual, shortcut, concat: bool) -> str:
    """Of the kernel that takes a call."""
    if _exact(x.dtype):
        return "exact"
    before = residual.size(1) if concat else 0  # channels of y
    described = [x, conv.weight] + ([] if shortcut is None else [residual, shortcut.weight])
    stride = (1, 1) if _pixelwise(conv) else tuple(conv.stride)
    fits = (
        _gpu(x.device)[1]
        and conv.groups == 1
        and all(channels * x.element_size() % 16 == 0 for channels in (before, len(conv.weight)))
        and all(map(_boxed, described))
        # in steps of 2 the rows and columns of an image must come in pairs
        and (stride == (1, 1) or (stride == (2, 2) and x.size(2) % 2 == x.size(3) % 2 == 0))
    )
    return "descriptor" if fits else "pointer"


def _problem(x, conv, residual, shortcut, concat) -> Problem:
    if not _folds(conv, shortcut):
        shortcut = None
    k, c, r, s = conv.weight.shape
    n, (p, q) = x.size(0), _output(x, conv)
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
        _pixelwise(conv) and set(strides) == {(1, 1)} and n * p * q < 2**31 - 2**16,
        0 if shortcut is None else shortcut.weight.size(1),
        residual is not None and shortcut is None and not concat,
        x.element_size(),
        _gpu(x.device)[0],
    )


@functools.lru_cache(maxsize=MOST_SHAPES)
def _box(n: int, p: int, q: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile: the powers of 2 of which the fewest cover the output.
    Those of 28x28 are 4x4 of several images; of equals, the one with the fewest images."""
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (a * b), a, b) for a in sizes for b in sizes if a * b <= pixels]
    return min(boxes, key=lambda box: (_boxes(n, p, q, box), box[0], abs(box[1] - box[2])))


def _boxes(n: int, p: int, q: int, box: tuple[int, int, int]) -> int:
    return _ceil_div(n, box[0]) * _ceil_div(p, box[1]) * _ceil_div(q, box[2])


def _size(problem: Problem) -> tuple[int, int, int]:
    """Images, rows and columns of the output as the kernel takes them."""
    n, p, q = problem.N, problem.P, problem.Q
    return (1, 1, n * p * q) if problem.flat or problem.kind != "descriptor" else (n, p, q)


def _cost(problem: Problem, config: Config) -> float:
    """Clocks of the busiest multiprocessor, with an H100's figures: 2048 products of 2 bytes a
    clock, 28 bytes from the L2 cache, 14 from memory, 500 clocks until the first of a tile come."""
    size = _size(problem)
    boxes = _boxes(*size, _box(*size, config.M))
    columns = problem.groups * _ceil_div(problem.K // problem.groups, config.BN)
    tiles = _ceil_div(boxes * columns, problem.multiprocessors)
    depth = problem.taps * _ceil_div(problem.C, config.BK) * config.BK + problem.C2
    products = config.M * config.BN * depth * problem.itemsize / (2 * 2048)
    loads = (config.M + config.BN) * depth * problem.itemsize / 28
    moved = config.M * config.BN * problem.itemsize * (1 + problem.residual) / 14
    return tiles * (max(products, loads) + moved) + _ceil_div(tiles, config.programs) * 500


def _fitted(problem: Problem, config: Config) -> Config:
    """The configuration for the problem's channels and elements."""
    channels = problem.K // problem.groups
    bk = config.BK * 2 // problem.itemsize
    if problem.kind == "descriptor":
        common = math.gcd(problem.C, problem.C2)  # a step is of one tap
        return config._replace(BK=min(bk, common & -common))
    depth = triton.next_power_of_2(problem.taps * problem.C)
    bn = max(16, min(config.BN, triton.next_power_of_2(channels)))
    return config._replace(BN=bn, BK=max(16, min(bk, depth)))


@functools.lru_cache(maxsize=MOST_SHAPES)
def _ranked(problem: Problem) -> list[Config]:
    narrow = problem.C2 > 0 or problem.itemsize == 4
    fitted = {
        _fitted(problem, config)
        for config in CONFIGS
        if config.kind == problem.kind and not (narrow and config.M * config.BN > WIDEST)
    }
    return sorted(fitted, key=lambda config: (_cost(problem, config), config))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- launches


def _launch(kernel, grid: tuple[int, ...], *args, warps: int, stages: int, **constants) -> None:
    kernel[grid](*args, **constants, **_options(warps, _WARP), num_stages=stages)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _parameters(conv: ConvNorm | None) -> tuple:
    """bias, mean, var, weight, shift and eps of the kernels."""
    if conv is None:
        return None, None, None, None, None, 0.0
    norm = Norm() if conv.norm is None else conv.norm
    tensors = (conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return *(_channels(t) for t in tensors), norm.eps


def _describe_filters(weight: Tensor, config: Config) -> TensorDescriptor:
    k, c, r, s = weight.shape
    rounding = ROUND if weight.dtype == torch.float32 else {}
    block = [config.BN, config.BK]
    return TensorDescriptor(weight, [k, r * s * c], [r * s * c, 1], block, **rounding)


def _describe_pixels(t: Tensor, channels: int, stride, size, block, image=None, **rounding):
    """Every stride-th pixel of NHWC memory of ``channels``, of which t may be a slice, and of
    images of ``image`` rows and columns, t's if None; t's own strides may be anything in dimensions
    of size 1."""
    c = t.size(1)
    h, w = image or t.shape[2:]
    strides = [h * w * channels, stride[0] * w * channels, stride[1] * channels, 1]
    return TensorDescriptor(t, [*size, c], strides, block, **rounding)


def _describe_pairs(x: Tensor, block, **rounding):
    """(N, H / 2, 2, W / 2, 2 * C): the rows and columns of an image in pairs."""
    n, c, h, w = x.shape
    strides = [h * w * c, 2 * w * c, w * c, 2 * c, 1]
    return TensorDescriptor(x, [n, h // 2, 2, w // 2, 2 * c], strides, block, **rounding)


def _launch_descriptor(x, conv, y, channels, residual, shortcut, act, problem, config) -> None:
    """y: the last of an output's ``channels``."""
    size = _size(problem)
    images, rows, columns = box = _box(*size, config.M)
    weight = _channels_last(conv.weight)
    n, c, h, w = x.shape
    rounding = ROUND if x.dtype == torch.float32 else {}  # of what is multiplied, not of y
    paired = not _pixelwise(conv) and tuple(conv.stride) == (2, 2)
    if paired:
        x = _describe_pairs(x, [images, rows, 1, columns, config.BK], **rounding)
    else:
        pixels = size if _pixelwise(conv) else (n, h, w)
        x = _describe_pixels(x, c, conv.stride, pixels, [*box, config.BK], **rounding)
    x2 = w2 = None
    if shortcut is not None:
        block = [*box, config.BK]
        x2 = _describe_pixels(residual, problem.C2, shortcut.stride, size, block, **rounding)
        w2, residual = _describe_filters(_channels_last(shortcut.weight), config), None
    tiles = _boxes(*size, box) * _ceil_div(problem.K, config.BN)
    _launch(
        conv_descriptor, (min(tiles, config.programs * problem.multiprocessors),),
        x, _describe_filters(weight, config),
        _describe_pixels(y, channels, (1, 1), size, [*box, config.BN]), residual,
        *_parameters(conv), x2, w2, *_parameters(shortcut), *size, problem.K, problem.C, problem.C2,
        tiles, warps=config.warps, stages=config.stages, R=weight.size(2), S=weight.size(3),
        PAIRED=paired, PAD_H=conv.padding[0], PAD_W=conv.padding[1], DIL_H=conv.dilation[0],
        DIL_W=conv.dilation[1], ACT=ACTS.index(act), IMAGES=images, TH=rows, TW=columns,
        BN=config.BN, BK=config.BK, INTERPRETED=INTERPRETED,
    )  # fmt: skip


def _launch_pointer(x, conv, y, channels, residual, shortcut, act, problem, config) -> None:
    k, depth, r, s = conv.weight.shape
    c, h, w = x.shape[1:]
    x2 = filters2 = None
    c2 = h2 = w2 = 0
    stride2 = (1, 1)
    if shortcut is not None:
        x2, filters2, residual = residual, _channels_last(shortcut.weight), None
        c2, h2, w2 = x2.shape[1:]
        stride2 = shortcut.stride
    pixels = problem.N * problem.P * problem.Q
    each = k // conv.groups
    tiles = _ceil_div(pixels, config.M) * conv.groups * _ceil_div(each, config.BN)
    _launch(
        conv_pointer, (tiles,), x, _channels_last(conv.weight), y, residual, *_parameters(conv), x2,
        filters2, *_parameters(shortcut), problem.P, problem.Q, each, channels, pixels, h, w, c,
        depth, h2, w2, c2, conv.groups, warps=config.warps, stages=config.stages, R=r, S=s,
        STRIDE_H=conv.stride[0], STRIDE_W=conv.stride[1], PAD_H=conv.padding[0],
        PAD_W=conv.padding[1], DIL_H=conv.dilation[0], DIL_W=conv.dilation[1],
        STRIDE2_H=stride2[0], STRIDE2_W=stride2[1], WHOLE=depth % config.BK == 0,
        WHOLE2=c2 % config.BK == 0, ACT=ACTS.index(act), M=config.M, BN=config.BN, BK=config.BK,
        PRECISION="ieee" if config.kind == "exact" else "tf32", INTERPRETED=INTERPRETED,
    )  # fmt: skip


# --- the op: see reference.conv_bn_act


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
    return list(_ranked(_problem(x, conv, residual, shortcut, concat)))


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
    if shortcut is not None and not _folds(conv, shortcut):
        residual, shortcut = forward(residual, shortcut, act="none"), None
    x = _channels_last(x)
    if residual is not None and not concat:
        residual = _channels_last(residual)
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
            config = _ranked(problem)[0]
        launch = _launch_descriptor if config.kind == "descriptor" else _launch_pointer
        with _on(x):
            launch(x, conv, out, y.size(1), residual, shortcut, act, problem, config)
    return y
