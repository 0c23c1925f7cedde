"""The rules of ``auto`` on a CPU, for calls that the user has not timed.

Every threshold has its measured reason beside it. Times are from an AMD EPYC with AVX-512 or AVX2,
2 cores (``benchmarks/results``).

C++ makes the decisions that need sizes only it knows:

- ``csrc/cpu/training_convolution.cpp``: which convolutions of a block in training are native.
- ``csrc/cpu/direct.cpp``, ``winograd.cpp``, ``res_chain.cpp``: how threads divide the work.
- ``csrc/cpu/bn_act.cpp``: stores past the cache, and huge pages, for large outputs.
- ``csrc/cpu/cores.cpp``, ``team.h``: the number of threads that share a small map.
"""

from __future__ import annotations

import torch

from . import backends

# --- direct or Winograd

# Reading a weight takes as long as multiplying so many tiles by it. Measured: 2 to 6, for 64 to 256
# channels and maps of 6x6 to 14x14.
TILES_OF_WEIGHT = 5
# With fewer channels the transforms of 4x4 tiles cost more than the tiles save.
LEAST_CHANNELS_OF_TILE_4 = 32
# A convolution by itself has at least so many tiles. Fewer tiles of 2 do not fill the registers.
# Fewer tiles of 4 gain under a tenth (14x14, batch 1, 256 channels), with three times the error.
LEAST_TILES = {4: 24, 2: 12}


def expected_tile(
    shape: tuple[int, int, int, int], weight: tuple[int, ...], tiles: list[int], in_chain: bool
) -> int:
    """The cheapest of Winograd's tile sizes and a direct convolution, by multiplications and reads
    of the weight.

    Args:
        shape: (N, C, H, W) of the input; the output has the same height and width.
        weight: (K, C, R, S).
        tiles: the sizes that can run, 2 or 4, and 0 for a direct convolution. The first wins a tie.
        in_chain: whether the convolution is one of a chain. Each thread reads all weights there;
            elsewhere the threads share them.
    """
    n, channels, height, width = shape
    out_channels, _, *kernel = weight
    readers = torch.get_num_threads() if in_chain else 1

    def count(tile: int) -> int:
        step = tile or 1
        return n * -(-height // step) * -(-width // step)

    def cost(tile: int) -> float:
        points = (tile + 2) ** 2 if tile else kernel[0] * kernel[1]
        return points * (count(tile) / readers + TILES_OF_WEIGHT)

    narrow = min(channels, out_channels) < LEAST_CHANNELS_OF_TILE_4
    able = [tile for tile in tiles if tile != 4 or not narrow]
    if not in_chain:
        able = [tile for tile in able if count(tile) >= LEAST_TILES.get(tile, 0)]
    return min(able, key=cost)


# --- native or oneDNN, for one convolution

# A direct convolution of at most so many multiplications is native, because a call of oneDNN costs
# 30 us more. oneDNN's kernels are 2 to 24 % faster than the native ones with AVX-512, 1.2 to 2.3
# times as fast with AVX2, and up to 4 times as fast as plain code.
MOST_DIRECT, MOST_DIRECT_1X1, MOST_DIRECT_AVX2 = 7e7, 1.2e8, 4e6
# A direct 3x3 convolution of an image (3 or 4 channels) takes 1.1 to 1.4 times as long as oneDNN's
# from 3e6 multiplications on, and 0.8 to 0.85 times up to 1.8e6. 7x7 ones are equal.
IMAGE_CHANNELS, MOST_DIRECT_OF_IMAGE = 4, 2e6
# glibc maps larger outputs anew in each call, which costs oneDNN more time than its kernels save.
MAPPED_BYTES = 32 << 20


def expected_convolution(key, able: list[str]) -> str:
    """The implementation of ``conv_bn_act`` that the rules expect to win.

    Args:
        key: an ``inference_conv.Key``.
        able: names of the implementations that can run the call; oneDNN is the first.
    """
    n, channels, height, width = key.shape
    out_channels, _, *kernel = key.weight
    tiles = [tile for tile in (2, 4) if f"winograd{tile}" in able]
    if tiles:
        tile = expected_tile(key.shape, key.weight, [0, *tiles], in_chain=False)
        if tile:
            return f"winograd{tile}"
    if "direct" not in able:
        return able[0]
    pixels = n * height * width // (key.stride[0] * key.stride[1])
    work = pixels * out_channels * channels * kernel[0] * kernel[1]
    point = kernel == [1, 1]
    # after a 1x1 convolution oneDNN adds a residual in a separate pass
    adds = point and key.residual in ("add", "shortcut")
    mapped = 4 * pixels * out_channels > MAPPED_BYTES
    most, most_avx2 = MOST_DIRECT_1X1 if point else MOST_DIRECT, MOST_DIRECT_AVX2
    if channels <= IMAGE_CHANNELS:
        most = most_avx2 = MOST_DIRECT_OF_IMAGE
    wins = {
        "avx512": work < most or adds or mapped,
        "avx2": work < most_avx2 or (point and mapped),
        "plain": False,
    }
    # With many channels oneDNN's NHWC kernels have up to three times the error of PyTorch's NCHW
    # kernels.
    return "direct" if wins[backends.cpu_isa()] or not key.channels_last else able[0]


# --- chains

# Each thread reads all weights; with more channels the threads wait for memory. Maps that do not
# fit into a core's cache gain nothing from a chain.
MOST_CHANNELS_OF_CHAIN, MOST_BYTES_OF_CHAIN = 128, 1 << 20


def chain_pays(channels: int, pixels: int) -> bool:
    """Whether a chain pays for a block of at most ``channels``, on maps of ``pixels``."""
    return channels <= MOST_CHANNELS_OF_CHAIN and 12 * channels * pixels <= MOST_BYTES_OF_CHAIN


# --- a BatchNorm with nothing after it, in training

# Forward and backward in float32, channels_last, bn_act is 0.71 to 1.13 times as fast as PyTorch's
# ops with 256 to 2048 channels at 0.8 million elements, 0.95 to 1.5 times at 1.6 to 13 million, and
# 1.05 to 1.36 times with 32 and 64 channels.
MOST_CHANNELS_OF_BARE_NORM, LEAST_ELEMENTS_OF_BARE_NORM = 128, 1 << 20


def bare_norm_pays(x: torch.Tensor) -> bool:
    """Whether ``bn_act`` pays for a BatchNorm with nothing after it, in training."""
    return not (
        x.is_cpu
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.size(1) > MOST_CHANNELS_OF_BARE_NORM
        and x.numel() < LEAST_ELEMENTS_OF_BARE_NORM
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


# --- convolution, BatchNorm and ReLU outside of blocks

# In inference, on NCHW images of 1 to 4 channels, or of one channel in any layout, a fused call
# takes 1.1 to 2.7 times as long as PyTorch's ops: ATen's convolution reads NCHW faster than the
# direct kernel. In channels_last it takes 0.55 to 1.01 times as long.
# In training the fixed 70 us of a call are 3 to 37 % at 1024 and 4096 pixels; from 8192 on a call
# takes 0.38 to 1.0 times as long.
LEAST_PIXELS_OF_STEM = 2**13


def stem_pays(x: torch.Tensor) -> bool:
    """Whether fused ops pay for convolution, BatchNorm and ReLU outside of blocks on images x."""
    if not x.is_cpu or x.dim() != 4:
        return True
    if torch.is_grad_enabled():
        if torch.compiler.is_compiling():  # the number of images may be any
            return True
        return x.size(0) * x.size(2) * x.size(3) >= LEAST_PIXELS_OF_STEM
    return x.stride(1) == 1


# --- a whole block in one call, in training

# Elements of the input up to which one call pays where oneDNN runs the convolutions. One call takes
# 0.98 to 0.99 of the time up to 2 million elements and 1.03 at 6 million: one autograd node keeps
# all saved tensors until its backward pass is over, and a node for each stage frees them one by
# one. With native convolutions, which only this op has, one call takes two thirds of the time.
MOST_ELEMENTS_OF_BLOCK = 2**22


def whole_block_pays(elements: int, recomputes: bool, is_bare: bool) -> bool:
    """Whether one call pays for a block where oneDNN runs the convolutions.

    Args:
        elements: of the input.
        recomputes: whether the backward pass computes the last convolution again.
        is_bare: whether the block is one convolution and a BatchNorm with nothing after it;
            PyTorch's own ops are as fast then.
    """
    return (recomputes or elements <= MOST_ELEMENTS_OF_BLOCK) and not is_bare
