"""bn_act in Triton, on GPUs and in Triton's interpreter: what forward (``bn_act_fwd.py``) and
backward (``bn_act_bwd.py``) share. The same op as ``csrc/cpu/bn_act.cpp``.

A tensor is ``runs`` of ``inner`` contiguous elements: channels_last has N*H*W runs of C channels,
NCHW has N*C runs of H*W elements of one channel. Tiles are [R, G, 8]: R runs, G bytes of the mask
and their 8 bits. Values per channel are [1, G, 8] (channels_last) or one number (NCHW).

Training is three launches each way: sums of chunks of rows, their merge in a fixed order, and one
pass over the elements; or a single launch where one program can sum a whole channel. Sums are of
x - shift in float32 over a few elements, a batch. Batches are added in two float32 numbers: the sum
and what rounding it has lost. So neither a large mean nor a large tensor costs digits (Chan, Golub
and LeVeque, 1983; Ogita, Rump and Oishi, 2005), and float64, which most GPUs have few units for, is
left to the end of a program. No atomics: every result is bitwise the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div

# Kernels are not compiled again where one of these numbers is 1 or a multiple of 16.
COUNTS = ("rows", "chunk", "chunks", "chunks2", "chunk_values", "values")

# --- device functions


@triton.jit
def sum_all(t):
    """Over all elements, in a fixed order; [1, 1, 1]."""
    t = tl.sum(t, axis=2, keep_dims=True)
    t = tl.sum(t, axis=1, keep_dims=True)
    return tl.sum(t, axis=0, keep_dims=True)


@triton.jit
def add_batch(high, low, value):
    """high + low + value: the sum, rounded, and what rounding it has lost until now. Knuth's
    two-sum finds a loss exactly, whichever of its operands is larger."""
    total = high + value
    rest = total - high
    return total, low + ((high - (total - rest)) + (value - rest))


@triton.jit
def in_float64(high, low):
    """high + low. Where high is infinite or NaN, low is NaN and high is the sum."""
    return high.to(tl.float64) + tl.where(low == low, low, 0.0).to(tl.float64)


@triton.jit
def columns(G: tl.constexpr):
    """0 .. 8*G - 1 as [1, G, 8]."""
    return (tl.arange(0, G)[:, None] * 8 + tl.arange(0, 8)[None, :])[None]


@triton.jit
def block_channels(block, CHANNELS_LAST: tl.constexpr, G: tl.constexpr):
    """The channels of a block: [1, G, 8], or [1, 1, 1] in NCHW."""
    if CHANNELS_LAST:  # noqa: SIM108  (the compiler types both arms of an expression)
        c = block * (8 * G) + columns(G)
    else:
        c = block + tl.zeros([1, 1, 1], tl.int32)
    return c


@triton.jit
def mask_byte(run, i0, inner, G: tl.constexpr):
    """Where the mask has the elements of a tile: [R, G, 1]."""
    return run.to(tl.int64) * ((inner + 7) // 8) + i0 // 8 + tl.arange(0, G)[None, :, None]


@triton.jit
def in_mask(row_ok, i0, inner, G: tl.constexpr):
    return row_ok & (i0 + 8 * tl.arange(0, G)[None, :, None] < inner)


@triton.jit
def load_channel(p, c, ok, missing: tl.constexpr):
    """A per-channel tensor in float64; ``missing`` where it is None."""
    if p is None:  # what follows a return is compiled too
        value = tl.full(c.shape, missing, tl.float64)
    else:
        value = tl.load(p + c, mask=ok, other=missing).to(tl.float32).to(tl.float64)
    return value


@triton.jit
def load_affine(p, c, ok, channels):
    return (
        tl.load(p + c, mask=ok, other=0),
        tl.load(p + channels + c, mask=ok, other=0),
        tl.load(p + 2 * channels + c, mask=ok, other=0),
    )


@triton.jit
def store_affine(p, center, scale, shift, c, ok, channels):
    """Three rows of a [., channels] float32 table."""
    tl.store(p + c, center.to(tl.float32), mask=ok)
    tl.store(p + channels + c, scale.to(tl.float32), mask=ok)
    tl.store(p + 2 * channels + c, shift.to(tl.float32), mask=ok)


@triton.jit
def program_tile(runs, channels, inner, CHANNELS_LAST: tl.constexpr, R: tl.constexpr,
                 G: tl.constexpr):  # fmt: skip
    """A program's tile in a pass over the elements: runs [R, 1, 1] and whether they exist, first
    element, channels and whether they exist. Grid (blocks of R runs * blocks of 8*G elements): one
    axis, because the others end at 65535."""
    per_run = tl.cdiv(inner, 8 * G)
    run = (tl.program_id(0) // per_run).to(tl.int64) * R + tl.arange(0, R)[:, None, None]
    row_ok = run < runs
    i0 = tl.program_id(0) % per_run * (8 * G)
    if CHANNELS_LAST:
        c = i0 + columns(G)
        in_table = c < channels
    else:
        c = (run % channels).to(tl.int32)
        in_table = row_ok
    return run, row_ok, i0, c, in_table


# --- how the work is cut up


class Config(NamedTuple):
    """elements: of a tile; unroll: tiles of a batch, 0 where nothing is summed."""

    elements: int
    unroll: int
    warps: int


CONFIGS = {  # by kernel: _bn_act_<key>_kernel
    "fwd_statistics": Config(1024, 4, 4),
    "fwd_apply": Config(2048, 0, 4),
    "fwd_small": Config(2048, 2, 8),
    "bwd_sums": Config(1024, 2, 4),
    # with 2048 elements Triton 3.6 takes 161 to 194 registers a thread
    "bwd_gradients": Config(1024, 0, 4),
    "bwd_reapply": Config(1024, 0, 4),
    "bwd_small": Config(2048, 2, 8),
}
PROGRAMS = 512  # that sum chunks: the same on every GPU, so the results are too
SMALL_VALUES = 4096  # per channel, at most, for a single launch
SMALL_ELEMENTS = 2**19
MERGE = {"K": 64, "B": 16}  # chunks and channels merged at a time
MERGE_WARPS = 4


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Geometry(NamedTuple):
    runs: int
    inner: int
    channels: int
    channels_last: bool

    @staticmethod
    def of(x: Tensor) -> Geometry:
        """Of a dense tensor."""
        n, c, h, w = x.shape
        if h * w == 1 or not x.is_contiguous():
            return Geometry(n * h * w, c, c, True)
        return Geometry(n * c, h * w, c, False)

    @property
    def rows(self) -> int:
        """Pixels (channels_last) or images (NCHW): sums are over chunks of them."""
        return self.runs if self.channels_last else self.runs // self.channels

    @property
    def row_values(self) -> int:
        """Values of a channel in a row."""
        return 1 if self.channels_last else self.inner

    @property
    def values(self) -> int:
        """Values of a channel."""
        return self.runs * self.inner // self.channels

    @property
    def mask_bytes(self) -> int:
        """Of a run."""
        return ceil_div(self.inner, 8)

    @property
    def small(self) -> bool:
        return self.values <= SMALL_VALUES and self.runs * self.inner <= SMALL_ELEMENTS

    def tile(self, config: Config, most_bytes: int) -> dict[str, int]:
        """R and G: at most ``most_bytes`` bytes of a mask wide, the other elements in rows. Where
        the kernel sums, a batch is DOWN tiles in rows, ACROSS tiles in a run."""
        g = min(_power_of_2(self.mask_bytes), most_bytes)
        elements = config.elements
        if self.inner % 8 and not (config.unroll and self.channels_last):
            elements //= 2  # runs that are not whole vectors are addressed element by element
        tile = {"R": max(1, elements // (8 * g)), "G": g}
        if config.unroll:
            widths = 1 if self.channels_last else ceil_div(self.inner, 8 * g)
            tile["ACROSS"] = min(config.unroll, widths)
            tile["DOWN"] = config.unroll // tile["ACROSS"]
        return tile

    def sum_tile(self, config: Config) -> dict[str, int]:
        """Of a kernel that sums chunks."""
        return self.tile(config, 16)

    def pass_tile(self, config: Config) -> dict[str, int]:
        """Of a pass over the elements."""
        return self.tile(config, 128)

    def small_tile(self, config: Config) -> dict[str, int]:
        """Of a single launch, whose programs have all values of their channels."""
        tile = self.tile(config, 1 if self.channels_last else 128)
        if not self.channels_last:
            tile["DOWN"] = 1  # a second spills on sm_100
        return tile

    def pass_grid(self, tile: dict[str, int]) -> tuple[int]:
        return (ceil_div(self.runs, tile["R"]) * ceil_div(self.inner, 8 * tile["G"]),)

    def merge_grid(self) -> tuple[int]:
        return (ceil_div(self.channels, MERGE["B"]),)

    def blocks(self, tile: dict[str, int]) -> int:
        """Blocks of channels, as the sums take them."""
        return ceil_div(self.channels, 8 * tile["G"]) if self.channels_last else self.channels

    def chunks(self, tile: dict[str, int]) -> tuple[int, int]:
        """Rows of a chunk, and how many chunks there are."""
        step = tile["R"] * tile["DOWN"]
        steps = ceil_div(self.rows, step)
        chunk = ceil_div(steps, max(1, min(PROGRAMS // self.blocks(tile), steps))) * step
        return chunk, ceil_div(self.rows, chunk)


def dense(x: Tensor) -> Tensor:
    """x, copied where it is neither contiguous nor channels_last."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def dense_like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t laid out as x, which is dense."""
    if t is None:
        return None
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return t.contiguous(memory_format=layout)
