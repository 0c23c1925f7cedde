"""A convolution of a residual block in training, in Triton, with an epilogue for the BatchNorm next
to it.

``convolve`` also gives the statistics of its output. ``input_gradient`` also applies the ReLU
before the convolution and computes the sums of the BatchNorm there, or adds another gradient. Each
saves a pass over memory. ``conv_tiles.py`` says how a convolution is cut into tiles. An input's
gradient is a convolution too, with the filters transposed and the taps in reverse; with a stride of
s it is s * s convolutions, each with a phase of the taps and for every s-th pixel.

A program keeps its sums of all its tiles, so as many sums are merged as there are programs, in a
fixed order: on one GPU every result is bitwise the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.reference import ConvNorm

from . import conv_tiles, launch
from .conv_tiles import (
    CONFIGS,
    WIDEST,
    Config,
    Problem,
    box_convolve,
    channels_last,
    count_boxes,
    describe_filters,
    describe_pairs,
    describe_pixels,
    fitted,
    gather_convolve,
    is_boxed,
    is_exact,
    output_size,
    rounding,
    tile_box,
    tiled_size,
)
from .launch import INTERPRETED, ceil_div

# Kernels are not compiled again where one of these numbers is 1 or a multiple of 16.
COUNTS = ("N", "H", "W", "P", "Q", "pixels", "tiles", "image", "row", "column", "first")
# The epilogue of a tile.
NOTHING, STATISTICS, RELU, ADD = range(4)
ROWS = {NOTHING: 0, STATISTICS: 3, RELU: 2, ADD: 0}  # of a program's sums

# --- device functions


@triton.jit
def _epilogue(z, dtype, pixel, inside, count, k, ok, bias, a, stats, other, mask, s0, s1, origin,
              seen, K, EPILOGUE: tl.constexpr):  # fmt: skip
    """z [M, BN] in dtype, and the sums of the program's tiles so far: of deviations from origin,
    the first tile's mean, their squares, and how many (STATISTICS); of g and of g * (a - mean)
    (RELU)."""
    both = inside[:, None] & ok[None, :]
    at = pixel[:, None] * K + k[None, :]
    if bias is not None:
        z += tl.load(bias + k, mask=ok, other=0).to(tl.float32)[None, :]
    if EPILOGUE == 3:
        value = tl.load(other + at, mask=both, other=0).to(tl.float32)
        if mask is not None:
            byte = tl.load(mask + (pixel[:, None] * ((K + 7) // 8) + (k // 8)[None, :]), mask=both,
                           other=0)  # fmt: skip
            value = tl.where((byte.to(tl.int32) >> (k % 8)[None, :]) & 1 != 0, value, 0.0)
        z += value
    out = z.to(dtype)
    if EPILOGUE == 1:
        value = out.to(tl.float32)
        n = count.to(tl.float32)
        if seen == 0:
            origin = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / n
        d = tl.where(inside[:, None], value - origin[None, :], 0.0)
        s0 += tl.sum(d, 0)
        s1 += tl.sum(d * d, 0)
        seen += n
    if EPILOGUE == 2:
        value = tl.load(a + at, mask=both, other=0).to(tl.float32)
        mean = tl.load(stats + k, mask=ok, other=0)[None, :]
        center = tl.load(stats + 2 * K + k, mask=ok, other=0)[None, :]
        scale = tl.load(stats + 3 * K + k, mask=ok, other=0)[None, :]
        shift = tl.load(stats + 4 * K + k, mask=ok, other=0)[None, :]
        positive = ((value - center) * scale + shift <= 0) == 0  # as bn_act's pass: NaN passes
        g = tl.where(inside[:, None] & positive, out.to(tl.float32), 0.0)
        out = g.to(dtype)
        s0 += tl.sum(g, 0)
        s1 += tl.sum(g * (value - mean), 0)
    return out, s0, s1, origin, seen


@triton.jit
def _store_sums(partial, s0, s1, origin, seen, k, ok, K, k_tiles, EPILOGUE: tl.constexpr):
    """A program's sums, for the merge: of the statistics mean, sum of squared deviations and how
    many."""
    if EPILOGUE == 1 or EPILOGUE == 2:
        ROWS: tl.constexpr = 3 if EPILOGUE == 1 else 2
        row = partial + (tl.program_id(0) // k_tiles).to(tl.int64) * (ROWS * K)
        if EPILOGUE == 1:
            off = s0 / seen
            s1 -= off * s0
            s0 = origin + off
            s1 = tl.where(s1 < 0, 0.0, s1)  # NaN stays NaN
        tl.store(row + k, s0, mask=ok)
        tl.store(row + K + k, s1, mask=ok)
        if EPILOGUE == 1:
            tl.store(row + 2 * K + k, seen + tl.zeros(k.shape, tl.float32), mask=ok)


# --- kernels


@triton.jit(do_not_specialize=COUNTS)
def _training_convolution_fwd_bwd_descriptor_kernel(
    x, w, y, partial, bias, a, stats, other, mask, N, P, Q, K, channels, tiles, image, row, column,
    first, R: tl.constexpr, S: tl.constexpr, PAIRED: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, EPILOGUE: tl.constexpr,
    IMAGES: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INTERPRETED: tl.constexpr):  # fmt: skip
    """x, w, y are descriptors, the rest pointers. Pixel (n, p, q) is y's n * image + p * row +
    q * column + first. Grid: any multiple of the tiles of K, so that a program's tiles are all of
    the same channels."""
    M: tl.constexpr = IMAGES * TH * TW
    across = tl.cdiv(Q, TW)
    down = tl.cdiv(P, TH)
    k_tiles = tl.cdiv(K, BN)
    k0 = tl.program_id(0) % k_tiles * BN
    k = k0 + tl.arange(0, BN)
    ok = k < K
    s0 = tl.zeros([BN], tl.float32)
    s1 = tl.zeros([BN], tl.float32)
    origin = tl.zeros([BN], tl.float32)
    seen = 0.0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        box = tile // k_tiles
        q0 = box % across * TW
        p0 = box // across % down * TH
        n0 = box // across // down * IMAGES
        z = box_convolve(x, w, n0, p0, q0, k0, channels, R, S, PAIRED, PAD_H, PAD_W, DIL_H, DIL_W,
                         IMAGES, TH, TW, BN, BK, INTERPRETED)  # fmt: skip
        i = tl.arange(0, M)
        n = n0 + i // (TH * TW)
        p = p0 + i // TW % TH
        q = q0 + i % TW
        inside = (n < N) & (p < P) & (q < Q)
        count = tl.minimum(IMAGES, N - n0) * tl.minimum(TH, P - p0) * tl.minimum(TW, Q - q0)
        pixel = n.to(tl.int64) * image + p.to(tl.int64) * row + q * column + first
        out, s0, s1, origin, seen = _epilogue(
            z.T, y.dtype, pixel, inside, count, k, ok, bias, a, stats, other, mask, s0, s1, origin,
            seen, K, EPILOGUE)  # fmt: skip
        y.store([n0, p0, q0, k0], out.reshape(IMAGES, TH, TW, BN))
    _store_sums(partial, s0, s1, origin, seen, k, ok, K, k_tiles, EPILOGUE)


@triton.jit(do_not_specialize=COUNTS)
def _training_convolution_fwd_bwd_pointer_kernel(
    x, w, y, partial, bias, a, stats, other, mask, P, Q, K, pixels, tiles, H, W, C, image, row,
    column, first, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    WHOLE: tl.constexpr, EPILOGUE: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """As the descriptor kernel, for pointers to NHWC tensors."""
    k_tiles = tl.cdiv(K, BN)
    k = tl.program_id(0) % k_tiles * BN + tl.arange(0, BN)
    ok = k < K
    s0 = tl.zeros([BN], tl.float32)
    s1 = tl.zeros([BN], tl.float32)
    origin = tl.zeros([BN], tl.float32)
    seen = 0.0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # int64 where there are so many pixels
        m0 = (tile // k_tiles).to(pixels.dtype) * M
        m = m0 + tl.arange(0, M)
        inside = m < pixels
        count = tl.minimum(M, pixels - m0)
        n = m // Q // P
        p = (m // Q % P).to(tl.int32)
        q = (m % Q).to(tl.int32)
        z = gather_convolve(x, w, n, p, q, inside, k, ok, 0, H, W, C, C, R, S, STRIDE_H, STRIDE_W,
                            PAD_H, PAD_W, DIL_H, DIL_W, WHOLE, M, BN, BK, PRECISION,
                            INTERPRETED)  # fmt: skip
        pixel = n.to(tl.int64) * image + p.to(tl.int64) * row + q * column + first
        out, s0, s1, origin, seen = _epilogue(
            z.T, y.dtype.element_ty, pixel, inside, count, k, ok, bias, a, stats, other, mask, s0,
            s1, origin, seen, K, EPILOGUE)  # fmt: skip
        both = inside[:, None] & ok[None, :]
        tl.store(y + (pixel[:, None] * K + k[None, :]), out, mask=both)
    _store_sums(partial, s0, s1, origin, seen, k, ok, K, k_tiles, EPILOGUE)


# --- launches


class Phase(NamedTuple):
    """A convolution that makes the pixels (first + step * i) of y, rows and columns."""

    weight: Tensor  # (channels of y, channels of x, R, S), channels_last
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    first: tuple[int, int]
    step: tuple[int, int]
    size: tuple[int, int]

    @property
    def pixelwise(self) -> bool:
        return self.weight.shape[2:] == (1, 1) and self.padding == (0, 0)


class Epilogue(NamedTuple):
    """The epilogue of the tiles, and the tensors that it reads."""

    kind: int = NOTHING
    bias: Tensor | None = None
    a: Tensor | None = None
    stats: Tensor | None = None
    other: Tensor | None = None
    mask: Tensor | None = None

    def arguments(self) -> dict:
        """As kernels take it."""
        kind, *tensors = self
        return dict(zip(self._fields[1:], tensors, strict=True)) | {"EPILOGUE": kind}


def _kind(x: Tensor, y: Tensor, phase: Phase) -> str:
    """Of the kernel that takes a phase, as in ``conv_bn_act``."""
    if is_exact(x.dtype):
        return "exact"
    stride = (1, 1) if phase.pixelwise else phase.stride
    fits = (
        conv_tiles.gpu(x.device)[1]
        and y.size(1) * y.element_size() % 16 == 0
        and is_boxed(x)
        and is_boxed(phase.weight)
        and (stride == (1, 1) or (stride == (2, 2) and x.size(2) % 2 == x.size(3) % 2 == 0))
    )
    return "descriptor" if fits else "pointer"


def _problem(x: Tensor, y: Tensor, phase: Phase, epilogue: int) -> Problem:
    k, c, r, s = phase.weight.shape
    n, (p, q) = x.size(0), phase.size
    flat = phase.pixelwise and phase.stride == phase.step == (1, 1) and n * p * q < 2**31 - 2**16
    return Problem(
        _kind(x, y, phase), n, c, k, p, q, r * s, 1, flat, 0, epilogue in (RELU, ADD),
        x.element_size(), conv_tiles.gpu(x.device)[0],
    )  # fmt: skip


def _ranked(problem: Problem) -> list[Config]:
    """The configurations of a phase, best guess first."""
    # float32 gathered for the widest tiles spills on sm_80, where sums are kept beside it
    narrow = problem.kind == "pointer" and problem.itemsize == 4
    most = WIDEST // 2 if narrow else WIDEST
    return [config for config in conv_tiles.ranked(problem) if most >= config.M * config.BN]


def _grid(problem: Problem, config: Config) -> tuple[int, int, int]:
    """Tiles, programs, and how many of these share the channels of one: tiles of K are neighbours,
    and a program stays with its own."""
    size = tiled_size(problem)
    if problem.kind == "descriptor":
        boxes = count_boxes(*size, tile_box(*size, config.M))
    else:
        boxes = ceil_div(problem.N * problem.P * problem.Q, config.M)
    k_tiles = ceil_div(problem.K, config.BN)
    most = max(1, config.programs * problem.multiprocessors // k_tiles)
    return boxes * k_tiles, min(boxes, most) * k_tiles, min(boxes, most)


class _Launch(NamedTuple):
    """A launch that makes a phase of y. partial: the programs' sums, or None."""

    x: Tensor
    y: Tensor
    phase: Phase
    epilogue: Epilogue
    partial: Tensor | None
    problem: Problem
    config: Config

    def run(self) -> None:
        if self.problem.kind == "descriptor":
            self._run_descriptor()
        else:
            self._run_pointer()

    def _arguments(self) -> dict:
        """What both kernels take."""
        phase, config = self.phase, self.config
        k, _, r, s = phase.weight.shape
        return {
            "partial": self.partial, **self.epilogue.arguments(), "K": k, "R": r, "S": s,
            "PAD_H": phase.padding[0], "PAD_W": phase.padding[1], "DIL_H": phase.dilation[0],
            "DIL_W": phase.dilation[1], "BN": config.BN, "BK": config.BK,
            "INTERPRETED": INTERPRETED, "warps": config.warps,
            "stages": conv_tiles.stages(config, self.x.device),
        }  # fmt: skip

    def _pixels(self) -> dict[str, int]:
        """Where y has the phase's pixels."""
        phase, width = self.phase, self.y.size(3)
        return {
            "image": self.y.size(2) * width, "row": phase.step[0] * width, "column": phase.step[1],
            "first": phase.first[0] * width + phase.first[1],
        }  # fmt: skip

    def _run_pointer(self) -> None:
        x, phase, config = self.x, self.phase, self.config
        tiles, programs, _ = _grid(self.problem, config)
        n, c, h, w = x.shape
        p, q = phase.size
        launch.run(
            _training_convolution_fwd_bwd_pointer_kernel, (programs,), x=x, w=phase.weight,
            y=self.y, P=p, Q=q, pixels=n * p * q, tiles=tiles, H=h, W=w, C=c, **self._pixels(),
            STRIDE_H=phase.stride[0], STRIDE_W=phase.stride[1], WHOLE=c % config.BK == 0,
            M=config.M, PRECISION="ieee" if config.kind == "exact" else "tf32", **self._arguments(),
        )  # fmt: skip

    def _run_descriptor(self) -> None:
        x, y, phase, config = self.x, self.y, self.phase, self.config
        tiles, programs, _ = _grid(self.problem, config)
        k, c = phase.weight.shape[:2]
        size = tiled_size(self.problem)
        box = images, rows, columns = tile_box(*size, config.M)
        rounded = rounding(x.dtype)
        paired = not phase.pixelwise and phase.stride == (2, 2)
        if paired:
            pixels = describe_pairs(x, [images, rows, 1, columns, config.BK], **rounded)
        else:
            shape = size if phase.pixelwise else (x.size(0), *x.shape[2:])
            pixels = describe_pixels(x, c, phase.stride, shape, [*box, config.BK], **rounded)
        out = y[:, :, phase.first[0] :: phase.step[0], phase.first[1] :: phase.step[1]]
        flat = {"image": 0, "row": 0, "column": 1, "first": 0}
        launch.run(
            _training_convolution_fwd_bwd_descriptor_kernel, (programs,), x=pixels,
            w=describe_filters(phase.weight, config),
            y=describe_pixels(out, k, phase.step, size, [*box, config.BN], image=y.shape[2:]),
            N=size[0], P=size[1], Q=size[2], channels=c, tiles=tiles,
            **(flat if self.problem.flat else self._pixels()), PAIRED=paired, IMAGES=images,
            TH=rows, TW=columns, **self._arguments(),
        )  # fmt: skip


def _run(
    x: Tensor, y: Tensor, phases: list[Phase], epilogue: Epilogue, config: Config | None
) -> Tensor | None:
    """Makes y; the programs' sums, (programs, rows, channels of y) in float32, or None."""
    jobs = []
    for phase in phases:
        problem = _problem(x, y, phase, epilogue.kind)
        fits = config is not None and config.kind == problem.kind
        jobs.append((phase, problem, fitted(problem, config) if fits else _ranked(problem)[0]))
    programs = [_grid(problem, chosen)[2] for _, problem, chosen in jobs]
    partial = None
    if ROWS[epilogue.kind]:
        shape = (sum(programs), ROWS[epilogue.kind], y.size(1))
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    begin = 0
    with launch.on_device(x):
        for (phase, problem, chosen), count in zip(jobs, programs, strict=True):
            rows = None if partial is None else partial[begin : begin + count]
            _Launch(x, y, phase, epilogue, rows, problem, chosen).run()
            begin += count
    return partial


# --- host functions


def why_not(x: Tensor, conv: ConvNorm) -> str | None:
    """What of a convolution of x the kernels cannot take; None where they can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}"
    if conv.groups != 1:
        return "the convolution has groups"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    if max(conv.stride) > 1 and max(conv.dilation) > 1:
        return "the convolution is dilated and strided"
    return None


def forward_phase(x: Tensor, conv: ConvNorm) -> Phase:
    return Phase(
        channels_last(conv.weight), tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation),
        (0, 0), (1, 1), output_size(x, conv),
    )  # fmt: skip


def gradient_phases(size: tuple[int, int], conv: ConvNorm) -> list[Phase]:
    """The phases of an input's gradient, of ``size`` rows and columns; no phase makes a pixel that
    stays 0."""
    filters = conv.weight.transpose(0, 1)
    steps = tuple(conv.stride)
    phases = []
    for row in range(min(steps[0], size[0])):
        for column in range(min(steps[1], size[1])):
            # Pixel first + step * i is output (first + pad - tap * dilation) / step + i for the
            # taps of which that is whole: from `tap` on in steps of `step`.
            first = row, column
            tap = [(f + pad) % s for f, pad, s in zip(first, conv.padding, steps, strict=True)]
            taken = filters[:, :, tap[0] :: steps[0], tap[1] :: steps[1]]
            if taken.numel() == 0:
                continue
            padding = [
                -((f + pad) // s) for f, pad, s in zip(first, conv.padding, steps, strict=True)
            ]
            out = [-(-(n - f) // s) for n, f, s in zip(size, first, steps, strict=True)]
            dilation = [-d for d in conv.dilation]
            phases.append(
                Phase(channels_last(taken), (1, 1), tuple(padding), tuple(dilation), first, steps,
                     tuple(out))
            )  # fmt: skip
    return phases


def candidates(x: Tensor, channels: int, phase: Phase) -> list[int]:
    """Places in ``CONFIGS`` of what makes a difference for a phase of x that has so many channels,
    best guess first."""
    y = x.new_empty((1, channels, 1, 1))
    problem = _problem(x, y, phase, NOTHING)
    every = enumerate(CONFIGS)
    place = {fitted(problem, c): i for i, c in every if c.kind == problem.kind}
    return [place[config] for config in _ranked(problem)]


def convolve(
    x: Tensor, conv: ConvNorm, statistics: bool, config: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """``F.conv2d`` and the statistics of its output.

    Args:
        x: (N, C, H, W), channels_last; ``why_not`` says nothing against it.
        conv: its norm is not looked at.
        config: default: the best guess.

    Returns:
        (N, K, P, Q), channels_last; (programs, 3, K) in float32: mean, sum of squared deviations
        and how many values, of each program's phase of the output as it was rounded.
    """
    phase = forward_phase(x, conv)
    y = torch.empty(
        (x.size(0), len(conv.weight), *phase.size), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    epilogue = Epilogue(STATISTICS if statistics else NOTHING, conv.bias)
    return y, _run(x, y, [phase], epilogue, config)


def input_gradient(
    dy: Tensor, conv: ConvNorm, size: tuple[int, int],
    epilogue: Epilogue = Epilogue(),  # noqa: B008
    config: Config | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradient of a convolution's input, rounded once, after the epilogue.

    Args:
        dy: (N, K, P, Q), channels_last.
        size: rows and columns of the input.
        epilogue: RELU: multiplied by the mask of the ReLU that made the input, of ``a`` by
            ``stats`` of bn_act. ADD: ``other``, where ``mask``, of bn_act, lets it through, is
            added.
        out: where to; of a convolution in steps only what it reads is written. Default: new, with
            zeros there.

    Returns:
        (N, C, *size), channels_last; RELU: (programs, 2, C) in float32, sums of the gradient and
        of the gradient times (a - mean).
    """
    phases = gradient_phases(size, conv)
    if out is None:
        shape = (dy.size(0), conv.weight.size(1), *size)
        out = torch.empty(
            shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)  # fmt: skip
        if len(phases) < conv.stride[0] * conv.stride[1]:
            out.zero_()
    return out, _run(dy, out, phases, epilogue, config)
