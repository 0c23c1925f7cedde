"""The backward pass of bn_act in Triton. ``bn_act.py`` says how tensors are cut up."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.reference import ACTS

from . import bn_act, launch
from .bn_act import (
    COUNTS,
    Geometry,
    add_batch,
    block_channels,
    columns,
    dense,
    dense_like,
    in_float64,
    in_mask,
    load_affine,
    load_channel,
    mask_byte,
    program_tile,
    sum_all,
)

# --- device functions


@triton.jit
def _gradient(dy, mask, run, row_ok, i0, inner, at, ok, ACT: tl.constexpr, G: tl.constexpr):
    """dy, and dy where the ReLU let it through."""
    raw = tl.load(dy + at, mask=ok, other=0).to(tl.float32)
    g = raw
    if ACT != 0:
        ok8 = in_mask(row_ok, i0, inner, G)
        byte = tl.load(mask + mask_byte(run, i0, inner, G), mask=ok8, other=0).to(tl.int32)
        g = tl.where(((byte >> tl.arange(0, 8)[None, None, :]) & 1) != 0, raw, 0.0)
    return raw, g


@triton.jit
def _over_rows(high, low, CHANNELS_LAST: tl.constexpr):
    """Sums of a block's channels, in float64."""
    if CHANNELS_LAST:
        total = tl.sum(in_float64(high, low), axis=0, keep_dims=True)
    else:
        total = sum_all(in_float64(high, low))
    return total


@triton.jit
def _gradient_sums(dy, x, residual, mask, mean, mean2, lo, hi, block, channels, inner,
                   CHANNELS_LAST: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr,
                   R: tl.constexpr, G: tl.constexpr, DOWN: tl.constexpr,
                   ACROSS: tl.constexpr):  # fmt: skip
    """Sums of g and g * (x - mean), float64, and of the residual's BatchNorm; of a block of
    channels over rows lo to hi."""
    r = tl.arange(0, R)[:, None, None]
    e = columns(G)
    s = tl.zeros([R, G, 8], tl.float32)
    sx, s2, sx2 = s, s, s
    lost, lost_x, lost2, lost_x2 = s, s, s, s
    for row in range(lo, hi, R * DOWN):
        end = inner
        if CHANNELS_LAST:
            end = 1  # the columns are the block's channels
        for i0 in range(0, end, 8 * G * ACROSS):
            t = tl.zeros([R, G, 8], tl.float32)
            tx = tl.zeros([R, G, 8], tl.float32)
            t2 = tl.zeros([R, G, 8], tl.float32)
            tx2 = tl.zeros([R, G, 8], tl.float32)
            for j in tl.static_range(DOWN * ACROSS):
                row_here = row + j // ACROSS * R + r
                row_ok = row_here < hi
                run = row_here.to(tl.int64)
                begin = block * (8 * G)
                if not CHANNELS_LAST:
                    run = run * channels + block
                    begin = i0 + j % ACROSS * (8 * G)
                i = begin + e
                ok = row_ok & (i < inner)
                at = run * inner + i
                raw, g = _gradient(dy, mask, run, row_ok, begin, inner, at, ok, ACT, G)
                value = tl.load(x + at, mask=ok, other=0).to(tl.float32)
                t += g
                tx += tl.where(ok, g * (value - mean), 0)
                if SECOND:  # a ReLU before the add does not touch the residual's gradient
                    g2 = g
                    if ACT == 2:
                        g2 = raw
                    value = tl.load(residual + at, mask=ok, other=0).to(tl.float32)
                    t2 += g2
                    tx2 += tl.where(ok, g2 * (value - mean2), 0)
            s, lost = add_batch(s, lost, t)
            sx, lost_x = add_batch(sx, lost_x, tx)
            if SECOND:
                s2, lost2 = add_batch(s2, lost2, t2)
                sx2, lost_x2 = add_batch(sx2, lost_x2, tx2)
    s, sx = _over_rows(s, lost, CHANNELS_LAST), _over_rows(sx, lost_x, CHANNELS_LAST)
    s2, sx2 = _over_rows(s2, lost2, CHANNELS_LAST), _over_rows(sx2, lost_x2, CHANNELS_LAST)
    return s, sx, s2, sx2


@triton.jit
def _finish_backward(s, sx, count, c, ok, weight, stats, dweight, dbias, channels,
                     TRAINING: tl.constexpr):  # fmt: skip
    """dweight, dbias; returns center, scale, slope, offset of
    dx = scale * g - (offset + slope * (x - center))."""
    mean = tl.load(stats + c, mask=ok, other=0)
    invstd = tl.load(stats + channels + c, mask=ok, other=0).to(tl.float64)
    if dweight is not None:
        dtype = dweight.dtype.element_ty
        tl.store(dweight + c, (sx * invstd).to(tl.float32).to(dtype), mask=ok)
        tl.store(dbias + c, s.to(tl.float32).to(dtype), mask=ok)
    scale = load_channel(weight, c, ok, 1.0) * invstd
    slope = tl.zeros(c.shape, tl.float64)
    offset = tl.zeros(c.shape, tl.float64)
    if TRAINING:
        slope = scale * invstd * invstd * sx / count
        offset = scale * s / count
    return mean, scale.to(tl.float32), slope.to(tl.float32), offset.to(tl.float32)


@triton.jit
def _input_gradients(dy, x, residual, mask, dx, dresidual, run, row_ok, i0, inner, center, scale,
                     slope, offset, center2, scale2, slope2, offset2, TRAINING: tl.constexpr,
                     TRAINING2: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr,
                     G: tl.constexpr):  # fmt: skip
    """dx and dresidual of a tile, those that are not None; as _apply."""
    i = i0 + columns(G)
    ok = row_ok & (i < inner)
    at = run.to(tl.int64) * inner + i
    raw, g = _gradient(dy, mask, run, row_ok, i0, inner, at, ok, ACT, G)
    if dx is not None:
        d = scale * g
        if TRAINING:
            value = tl.load(x + at, mask=ok, other=0).to(tl.float32)
            d -= offset + slope * (value - center)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=ok)
    if dresidual is not None:
        d = g
        if ACT == 2:
            d = raw
        if SECOND:
            d = scale2 * d
            if TRAINING2:
                value = tl.load(residual + at, mask=ok, other=0).to(tl.float32)
                d -= offset2 + slope2 * (value - center2)
        tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_bwd_sums_kernel(dy, x, residual, mask, stats, partial, rows, chunk, channels, inner,
                            CHANNELS_LAST: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr,
                            R: tl.constexpr, G: tl.constexpr, DOWN: tl.constexpr,
                            ACROSS: tl.constexpr):  # fmt: skip
    """partial[chunk] = sums of g, g*(x-mean), and of the second norm's. Grid (blocks of channels,
    chunks)."""
    block = tl.program_id(0)
    k = tl.program_id(1)
    lo = k * chunk
    hi = tl.minimum(lo + chunk, rows)
    c = block_channels(block, CHANNELS_LAST, G)
    ok = c < channels
    mean = tl.load(stats + c, mask=ok, other=0)
    mean2 = mean
    if SECOND:
        mean2 = tl.load(stats + 2 * channels + c, mask=ok, other=0)
    s, sx, s2, sx2 = _gradient_sums(
        dy, x, residual, mask, mean, mean2, lo, hi, block, channels, inner, CHANNELS_LAST, SECOND,
        ACT, R, G, DOWN, ACROSS)  # fmt: skip
    SUMS: tl.constexpr = 4 if SECOND else 2
    out = partial + k.to(tl.int64) * SUMS * channels
    tl.store(out + c, s, mask=ok)
    tl.store(out + channels + c, sx, mask=ok)
    if SECOND:
        tl.store(out + 2 * channels + c, s2, mask=ok)
        tl.store(out + 3 * channels + c, sx2, mask=ok)


@triton.jit
def _add_chunks(partial, chunks, row, c, ok, channels, SUMS: tl.constexpr, K: tl.constexpr):
    k = tl.arange(0, K)[:, None]
    total = tl.zeros(c.shape, tl.float64)
    for first in range(0, chunks, K):
        at = ((first + k).to(tl.int64) * SUMS + row) * channels + c[None, :]
        part = tl.load(partial + at, mask=(first + k < chunks) & ok[None, :], other=0)
        total += tl.sum(part.to(tl.float64), 0)
    return total


@triton.jit
def _store_table(table, center, scale, slope, offset, c, ok, channels):
    tl.store(table + c, center, mask=ok)
    tl.store(table + channels + c, scale, mask=ok)
    tl.store(table + 2 * channels + c, slope, mask=ok)
    tl.store(table + 3 * channels + c, offset, mask=ok)


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_bwd_merge_kernel(partial, chunks, values, weight, weight2, stats, dweight, dbias,
                             dweight2, dbias2, table, channels, TRAINING: tl.constexpr,
                             TRAINING2: tl.constexpr, SECOND: tl.constexpr, K: tl.constexpr,
                             B: tl.constexpr):  # fmt: skip
    """Adds up the chunks: gradients of the parameters, and the table of
    _bn_act_bwd_gradients_kernel. With no chunks only the table. Grid (blocks of B channels)."""
    c = tl.program_id(0) * B + tl.arange(0, B)
    ok = c < channels
    count = values.to(tl.float64)
    SUMS: tl.constexpr = 4 if SECOND else 2
    s = _add_chunks(partial, chunks, 0, c, ok, channels, SUMS, K)
    sx = _add_chunks(partial, chunks, 1, c, ok, channels, SUMS, K)
    center, scale, slope, offset = _finish_backward(
        s, sx, count, c, ok, weight, stats, dweight, dbias, channels, TRAINING)  # fmt: skip
    _store_table(table, center, scale, slope, offset, c, ok, channels)
    if SECOND:
        s = _add_chunks(partial, chunks, 2, c, ok, channels, SUMS, K)
        sx = _add_chunks(partial, chunks, 3, c, ok, channels, SUMS, K)
        center, scale, slope, offset = _finish_backward(
            s, sx, count, c, ok, weight2, stats + 2 * channels, dweight2, dbias2, channels,
            TRAINING2)  # fmt: skip
        _store_table(table + 4 * channels, center, scale, slope, offset, c, ok, channels)


@triton.jit
def _load_table(table, c, ok, channels):
    return (
        tl.load(table + c, mask=ok, other=0),
        tl.load(table + channels + c, mask=ok, other=0),
        tl.load(table + 2 * channels + c, mask=ok, other=0),
        tl.load(table + 3 * channels + c, mask=ok, other=0),
    )


@triton.jit
def _bn_act_bwd_gradients_kernel(dy, x, residual, mask, dx, dresidual, table, runs, channels, inner,
                                 CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr,
                                 TRAINING2: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr,
                                 R: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """dx and dresidual. Grid as of program_tile."""
    run, row_ok, i0, c, in_table = program_tile(runs, channels, inner, CHANNELS_LAST, R, G)
    center, scale, slope, offset = _load_table(table, c, in_table, channels)
    center2, scale2, slope2, offset2 = center, scale, slope, offset
    if SECOND:
        center2, scale2, slope2, offset2 = _load_table(table + 4 * channels, c, in_table, channels)
    _input_gradients(dy, x, residual, mask, dx, dresidual, run, row_ok, i0, inner, center, scale,
                     slope, offset, center2, scale2, slope2, offset2, TRAINING, TRAINING2, SECOND,
                     ACT, G)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_bwd_small_kernel(dy, x, residual, mask, dx, dresidual, weight, weight2, stats, dweight,
                             dbias, dweight2, dbias2, rows, values, channels, inner,
                             CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr,
                             TRAINING2: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr,
                             R: tl.constexpr, G: tl.constexpr, DOWN: tl.constexpr,
                             ACROSS: tl.constexpr):  # fmt: skip
    """All of the backward pass for one block of channels. Grid (blocks of channels)."""
    block = tl.program_id(0)
    lo = tl.zeros([], tl.int32)
    hi = lo + rows
    c = block_channels(block, CHANNELS_LAST, G)
    known = c < channels
    count = values.to(tl.float64)
    mean = tl.load(stats + c, mask=known, other=0)
    mean2 = mean
    if SECOND:
        mean2 = tl.load(stats + 2 * channels + c, mask=known, other=0)
    s, sx, s2, sx2 = _gradient_sums(
        dy, x, residual, mask, mean, mean2, lo, hi, block, channels, inner, CHANNELS_LAST, SECOND,
        ACT, R, G, DOWN, ACROSS)  # fmt: skip
    center, scale, slope, offset = _finish_backward(
        s, sx, count, c, known, weight, stats, dweight, dbias, channels, TRAINING)  # fmt: skip
    center2, scale2, slope2, offset2 = center, scale, slope, offset
    if SECOND:
        center2, scale2, slope2, offset2 = _finish_backward(
            s2, sx2, count, c, known, weight2, stats + 2 * channels, dweight2, dbias2, channels,
            TRAINING2)  # fmt: skip
    for row in range(0, rows, R):
        r = row + tl.arange(0, R)[:, None, None]
        if CHANNELS_LAST:
            _input_gradients(dy, x, residual, mask, dx, dresidual, r, r < rows, block * (8 * G),
                             inner, center, scale, slope, offset, center2, scale2, slope2, offset2,
                             TRAINING, TRAINING2, SECOND, ACT, G)  # fmt: skip
        else:
            for i0 in range(0, inner, 8 * G):
                _input_gradients(dy, x, residual, mask, dx, dresidual, r * channels + block,
                                 r < rows, i0, inner, center, scale, slope, offset, center2, scale2,
                                 slope2, offset2, TRAINING, TRAINING2, SECOND, ACT,
                                 G)  # fmt: skip


@triton.jit
def _bn_act_bwd_reapply_kernel(dy, x, dx, y, table, affine, runs, channels, inner,
                               CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr, R: tl.constexpr,
                               G: tl.constexpr):  # fmt: skip
    """dx, where dy is past the ReLU already, and y once more, those that are not None. dx may be
    dy. Grid as of program_tile."""
    run, row_ok, i0, c, in_table = program_tile(runs, channels, inner, CHANNELS_LAST, R, G)
    i = i0 + columns(G)
    ok = row_ok & (i < inner)
    at = run.to(tl.int64) * inner + i
    value = tl.load(x + at, mask=ok, other=0).to(tl.float32)
    if dx is not None:
        g = tl.load(dy + at, mask=ok, other=0).to(tl.float32)
        center, scale, slope, offset = _load_table(table, c, in_table, channels)
        d = scale * g
        if TRAINING:
            d -= offset + slope * (value - center)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=ok)
    if y is not None:
        center, scale, shift = load_affine(affine, c, in_table, channels)
        v = (value - center) * scale + shift
        tl.store(y + at, tl.where(v <= 0, 0.0, v).to(y.dtype.element_ty), mask=ok)


# --- launches


class NormCall(NamedTuple):
    """What backward needs of a BatchNorm, beside the saved statistics."""

    weight: Tensor | None
    training: bool


class Wanted(NamedTuple):
    """The gradients that are wanted."""

    x: bool = True
    residual: bool = False
    parameters: bool = True


class Call(NamedTuple):
    """A call of ``bn_act_bwd``: see the schema in ``fused_res/ops/bn_act.py``.

    Args:
        stats, mask: what forward returned.
        act: of ``reference.ACTS``, by place.
        sums: to take for those of x, (2, C), (4, C) with a residual_norm, float64; optional.
    """

    dy: Tensor
    x: Tensor
    norm: NormCall
    stats: Tensor
    mask: Tensor
    residual: Tensor | None = None
    residual_norm: NormCall | None = None
    act: int = 1
    wanted: Wanted = Wanted()
    sums: Tensor | None = None

    @property
    def trainings(self) -> dict[str, bool]:
        second = self.residual_norm
        trains2 = second is not None and second.training
        return {"TRAINING": self.norm.training, "TRAINING2": trains2}

    @property
    def needs_sums(self) -> bool:
        first, second = self.trainings.values()
        wanted = self.wanted
        return wanted.parameters or (wanted.x and first) or (wanted.residual and second)


class Gradients(NamedTuple):
    """None where not wanted."""

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None = None
    dresidual_weight: Tensor | None = None
    dresidual_bias: Tensor | None = None


def _parameter_gradients(norm: NormCall | None, wanted: bool) -> list[Tensor | None]:
    if norm is None or norm.weight is None or not wanted:
        return [None, None]
    layout = torch.contiguous_format
    return [torch.empty_like(norm.weight, memory_format=layout) for _ in range(2)]


def _parameters(call: Call, out: Gradients) -> dict:
    """Weights and the parameters' gradients, as kernels take them."""
    second = call.residual_norm
    return {
        "weight": launch.contiguous(call.norm.weight),
        "weight2": None if second is None else launch.contiguous(second.weight),
        "stats": call.stats,
        "dweight": out.dweight,
        "dbias": out.dbias,
        "dweight2": out.dresidual_weight,
        "dbias2": out.dresidual_bias,
    }


def _tensors(call: Call) -> dict:
    """What kernels read of the call's tensors."""
    mask = None if call.act == ACTS.index("none") else call.mask
    return {"dy": call.dy, "x": call.x, "residual": call.residual, "mask": mask}


def _modes(g: Geometry, call: Call) -> dict:
    second = call.residual_norm is not None
    return {"CHANNELS_LAST": g.channels_last, "SECOND": second, "ACT": call.act}


def _run_small(g: Geometry, call: Call, out: Gradients) -> None:
    config = bn_act.CONFIGS["bwd_small"]
    tile = g.small_tile(config)
    launch.run(
        _bn_act_bwd_small_kernel, (g.blocks(tile),), config.warps, **_tensors(call), dx=out.dx,
        dresidual=out.dresidual, **_parameters(call, out), rows=g.rows, values=g.values,
        channels=g.channels, inner=g.inner, **call.trainings, **_modes(g, call), **tile,
    )  # fmt: skip


def _run_sums(g: Geometry, call: Call) -> Tensor:
    """(chunks, 2 or 4, C), in float64; no chunks where no sums are needed."""
    rows = 2 if call.residual_norm is None else 4
    if call.sums is not None:
        return call.sums.contiguous()[None]
    if not call.needs_sums:
        return call.x.new_empty((0, rows, g.channels), dtype=torch.float64)
    config = bn_act.CONFIGS["bwd_sums"]
    tile = g.sum_tile(config)
    chunk, chunks = g.chunks(tile)
    partial = call.x.new_empty((chunks, rows, g.channels), dtype=torch.float64)
    launch.run(
        _bn_act_bwd_sums_kernel, (g.blocks(tile), chunks), config.warps, **_tensors(call),
        stats=call.stats, partial=partial, rows=g.rows, chunk=chunk, channels=g.channels,
        inner=g.inner, **_modes(g, call), **tile,
    )  # fmt: skip
    return partial


def _run_merge(g: Geometry, call: Call, partial: Tensor, out: Gradients) -> Tensor:
    """The table of the pass over the elements: center, scale, slope, offset of each BatchNorm."""
    second = call.residual_norm is not None
    table = call.x.new_empty((8 if second else 4, g.channels), dtype=torch.float32)
    launch.run(
        _bn_act_bwd_merge_kernel, g.merge_grid(), bn_act.MERGE_WARPS, partial=partial,
        chunks=len(partial), values=g.values, **_parameters(call, out), table=table,
        channels=g.channels, SECOND=second, **call.trainings, **bn_act.MERGE,
    )  # fmt: skip
    return table


def _run_gradients(g: Geometry, call: Call, table: Tensor, out: Gradients) -> None:
    config = bn_act.CONFIGS["bwd_gradients"]
    tile = g.pass_tile(config)
    launch.run(
        _bn_act_bwd_gradients_kernel, g.pass_grid(tile), config.warps, **_tensors(call), dx=out.dx,
        dresidual=out.dresidual, table=table, runs=g.runs, channels=g.channels, inner=g.inner,
        **call.trainings, **_modes(g, call), **tile,
    )  # fmt: skip


def backward(call: Call) -> Gradients:
    """``bn_act_bwd``."""
    x = dense(call.x)
    call = call._replace(
        dy=dense_like(call.dy, x), x=x, residual=dense_like(call.residual, x)
    )  # fmt: skip
    g, wanted = Geometry.of(x), call.wanted
    out = Gradients(
        torch.empty_like(x) if wanted.x else None,
        *_parameter_gradients(call.norm, wanted.parameters),
        torch.empty_like(x) if wanted.residual else None,
        *_parameter_gradients(call.residual_norm, wanted.parameters),
    )
    with launch.on_device(x):
        if g.small and call.sums is None:
            _run_small(g, call, out)
            return out
        table = _run_merge(g, call, _run_sums(g, call), out)
        if wanted.x or wanted.residual:
            _run_gradients(g, call, table, out)
    return out


class SumsCall(NamedTuple):
    """The backward pass of a call with a ReLU and no residual whose sums are there.

    Args:
        g: the gradient past the ReLU; becomes dx.
        sums: (chunks, 2, C): sums of g and of g * (x - mean).
        wants_y: whether y is computed once more.
    """

    g: Tensor
    x: Tensor
    norm: NormCall
    stats: Tensor
    sums: Tensor
    wanted: Wanted
    wants_y: bool


def backward_of_sums(call: SumsCall) -> tuple[Gradients, Tensor | None]:
    """The gradients, and y; None where not wanted."""
    x, geometry = call.x, Geometry.of(call.x)
    out = Gradients(
        call.g if call.wanted.x else None, *_parameter_gradients(call.norm, call.wanted.parameters)
    )
    y = torch.empty_like(x) if call.wants_y else None
    config = bn_act.CONFIGS["bwd_reapply"]
    tile = geometry.pass_tile(config)
    whole = Call(call.g, x, call.norm, call.stats, mask=None)
    with launch.on_device(x):
        table = _run_merge(geometry, whole, call.sums, out)
        if call.wanted.x or call.wants_y:
            launch.run(
                _bn_act_bwd_reapply_kernel, geometry.pass_grid(tile), config.warps, dy=call.g, x=x,
                dx=out.dx, y=y, table=table, affine=call.stats[2:], runs=geometry.runs,
                channels=geometry.channels, inner=geometry.inner,
                CHANNELS_LAST=geometry.channels_last, TRAINING=call.norm.training, **tile,
            )  # fmt: skip
    return out, y
