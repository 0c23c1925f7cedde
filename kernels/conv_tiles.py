"""Tiles of convolutions in Triton: what ``conv_bn_act.py`` and ``training_convolution.py`` share.

Implicit GEMM: a tile is BN channels of the output by M of its pixels, summed over the taps of the
filter and the channels of the input. ``box_convolve`` loads boxes of the NHWC tensors through
tensor descriptors (TMA on NVIDIA GPUs since Hopper): the part of a box outside of the image is
zeros, so there are no masks and no im2col. ``gather_convolve`` gathers elements, and takes any
convolution.

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

from fused_res.reference import ConvNorm

from .launch import INTERPRETED, VERSION, ceil_div

# --- device functions


@triton.jit
def _dot(filters, pixels, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which makes garbage of bfloat16
        filters = filters.to(tl.float32)
        pixels = pixels.to(tl.float32)
    return tl.dot(filters, pixels, acc, input_precision=PRECISION)


@triton.jit
def box_convolve(x, w, n, p, q, k, channels, R: tl.constexpr, S: tl.constexpr, PAIRED: tl.constexpr,
                 PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
                 IMAGES: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
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


@triton.jit
def gather_convolve(x, w, n, p, q, inside, k, ok, first, H, W, C, depth, R: tl.constexpr,
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


# Chosen by registers and shared memory (benchmarks/kernels.md); none was timed on a GPU.
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
MOST_PROBLEMS = 512  # remembered
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
def gpu(device: torch.device) -> tuple[int, bool]:
    """Its multiprocessors, and whether descriptors are for it: it has TMA and 227 KB of shared
    memory a block (the GeForce GPUs after Hopper have 99)."""
    if INTERPRETED or device.type == "meta":
        return MULTIPROCESSORS, True
    if device.type != "cuda":
        return torch.xpu.get_device_properties(device).gpu_subslice_count, False
    count = torch.cuda.get_device_properties(device).multi_processor_count
    major, _ = torch.cuda.get_device_capability(device)
    return count, not torch.version.hip and major in (9, 10)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products of float32 are not to be rounded, as PyTorch has it for convolutions."""
    if dtype != torch.float32 or torch.version.hip:
        return dtype == torch.float32
    conv = getattr(torch.backends.cudnn, "conv", None)  # none before PyTorch 2.9
    tf32 = torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"
    return not tf32


def is_boxed(t: Tensor) -> bool:
    """Whether it can be taken in boxes: of 16 channels at least, and where descriptors ask for
    multiples of 16 bytes."""
    return t.size(1) % 16 == 0 and t.data_ptr() % 16 == 0


def output_size(x: Tensor, conv: ConvNorm) -> tuple[int, int]:
    """Rows and columns of the convolution."""
    return tuple(
        (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, padding, dilation in zip(
            x.shape[2:], conv.weight.shape[2:], *conv[2:5], strict=True
        )
    )


@functools.lru_cache(maxsize=MOST_PROBLEMS)
def tile_box(n: int, p: int, q: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile: the powers of 2 of which the fewest cover the output.
    Those of 28x28 are 4x4 of several images; of equals, the one with the fewest images."""
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (a * b), a, b) for a in sizes for b in sizes if a * b <= pixels]
    return min(boxes, key=lambda box: (count_boxes(n, p, q, box), box[0], abs(box[1] - box[2])))


def count_boxes(n: int, p: int, q: int, box: tuple[int, int, int]) -> int:
    return ceil_div(n, box[0]) * ceil_div(p, box[1]) * ceil_div(q, box[2])


def tiled_size(problem: Problem) -> tuple[int, int, int]:
    """Images, rows and columns of the output as the kernel takes them."""
    n, p, q = problem.N, problem.P, problem.Q
    return (1, 1, n * p * q) if problem.flat or problem.kind != "descriptor" else (n, p, q)


def _cost(problem: Problem, config: Config) -> float:
    """Clocks of the busiest multiprocessor, with an H100's figures: 2048 products of 2 bytes a
    clock, 28 bytes from the L2 cache, 14 from memory, 500 clocks until the first of a tile come."""
    size = tiled_size(problem)
    boxes = count_boxes(*size, tile_box(*size, config.M))
    columns = problem.groups * ceil_div(problem.K // problem.groups, config.BN)
    tiles = ceil_div(boxes * columns, problem.multiprocessors)
    depth = problem.taps * ceil_div(problem.C, config.BK) * config.BK + problem.C2
    products = config.M * config.BN * depth * problem.itemsize / (2 * 2048)
    loads = (config.M + config.BN) * depth * problem.itemsize / 28
    moved = config.M * config.BN * problem.itemsize * (1 + problem.residual) / 14
    return tiles * (max(products, loads) + moved) + ceil_div(tiles, config.programs) * 500


def fitted(problem: Problem, config: Config) -> Config:
    """The configuration for the problem's channels and elements."""
    channels = problem.K // problem.groups
    bk = config.BK * 2 // problem.itemsize
    if problem.kind == "descriptor":
        common = math.gcd(problem.C, problem.C2)  # a step is of one tap
        return config._replace(BK=min(bk, common & -common))
    depth = triton.next_power_of_2(problem.taps * problem.C)
    bn = max(16, min(config.BN, triton.next_power_of_2(channels)))
    return config._replace(BN=bn, BK=max(16, min(bk, depth)))


def pipeline(config: Config, through_async_proxy: bool) -> int:
    """Stages of the pipelined loop of a launch. through_async_proxy: the GPU's tensor cores read
    shared memory themselves, as Hopper's and Blackwell's do.

    Triton 3.6 puts no proxy fence between cp.async and such products: they may read what was there
    before. With one stage it takes no cp.async, and does put one.
    """
    unfenced = VERSION < (3, 9) and through_async_proxy and config.kind == "pointer"
    return 1 if unfenced else config.stages


def stages(config: Config, device: torch.device) -> int:
    """``pipeline`` on a device."""
    return pipeline(config, device.type == "cuda" and gpu(device)[1])


@functools.lru_cache(maxsize=MOST_PROBLEMS)
def ranked(problem: Problem) -> list[Config]:
    """The configurations for a problem, best guess first."""
    narrow = problem.C2 > 0 or problem.itemsize == 4
    found = {
        fitted(problem, config)
        for config in CONFIGS
        if config.kind == problem.kind and not (narrow and config.M * config.BN > WIDEST)
    }
    return sorted(found, key=lambda config: (_cost(problem, config), config))


# --- tensors as kernels take them


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def rounding(dtype: torch.dtype) -> dict:
    """Of descriptors of what is multiplied."""
    return ROUND if dtype == torch.float32 else {}


def describe_filters(weight: Tensor, config: Config) -> TensorDescriptor:
    k, c, r, s = weight.shape
    block = [config.BN, config.BK]
    return TensorDescriptor(weight, [k, r * s * c], [r * s * c, 1], block, **rounding(weight.dtype))


def describe_pixels(t: Tensor, channels: int, stride, size, block, image=None, **rounding):
    """Every stride-th pixel of NHWC memory of ``channels``, of which t may be a slice, and of
    images of ``image`` rows and columns, t's if None; t's own strides may be anything in dimensions
    of size 1."""
    c = t.size(1)
    h, w = image or t.shape[2:]
    strides = [h * w * channels, stride[0] * w * channels, stride[1] * channels, 1]
    return TensorDescriptor(t, [*size, c], strides, block, **rounding)


def describe_pairs(x: Tensor, block, **rounding):
    """(N, H / 2, 2, W / 2, 2 * C): the rows and columns of an image in pairs."""
    n, c, h, w = x.shape
    strides = [h * w * c, 2 * w * c, w * c, 2 * c, 1]
    return TensorDescriptor(x, [n, h // 2, 2, w // 2, 2 * c], strides, block, **rounding)
