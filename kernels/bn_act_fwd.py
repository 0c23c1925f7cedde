"""The forward pass of bn_act in Triton, and its parts: the statistics alone, the pass over the
elements alone. ``bn_act.py`` says how tensors are cut up."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.reference import ACTS, Norm

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
    store_affine,
    sum_all,
)

# --- device functions


@triton.jit
def _median(a, b, c):
    low = tl.minimum(a, b)
    rest = tl.minimum(tl.maximum(a, b), c)
    return tl.maximum(low, rest)


@triton.jit
def _sums_channels_last(x, lo, hi, block, channels, inner, R: tl.constexpr, G: tl.constexpr,
                        DOWN: tl.constexpr):  # fmt: skip
    """For each of a block's 8*G channels a shift, the sum of x - shift over pixels lo to hi, the
    sum of its square, and how many values these are of."""
    r = tl.arange(0, R)[:, None, None]
    e = columns(G)
    s = tl.zeros([R, G, 8], tl.float32)
    q = tl.zeros([R, G, 8], tl.float32)
    lost_s, lost_q = s, q
    second = tl.minimum(lo + 1, hi - 1)
    third = tl.minimum(lo + 2, hi - 1)
    c = block * (8 * G) + e
    in_block = c < channels
    # a shift near the values that one outlier does not move
    shift = _median(
        tl.load(x + lo.to(tl.int64) * inner + c, mask=in_block, other=0).to(tl.float32),
        tl.load(x + second.to(tl.int64) * inner + c, mask=in_block, other=0).to(tl.float32),
        tl.load(x + third.to(tl.int64) * inner + c, mask=in_block, other=0).to(tl.float32),
    )
    for row in range(lo, hi, R * DOWN):
        batch_s = tl.zeros([R, G, 8], tl.float32)
        batch_q = tl.zeros([R, G, 8], tl.float32)
        for j in tl.static_range(DOWN):
            run = row + j * R + r
            ok = (run < hi) & in_block
            value = tl.load(x + run.to(tl.int64) * inner + c, mask=ok, other=0)
            d = tl.where(ok, value.to(tl.float32) - shift, 0)
            batch_s += d
            batch_q += d * d
        s, lost_s = add_batch(s, lost_s, batch_s)
        q, lost_q = add_batch(q, lost_q, batch_q)
    total = tl.sum(in_float64(s, lost_s), axis=0, keep_dims=True)
    square = tl.sum(in_float64(q, lost_q), axis=0, keep_dims=True)
    return shift, total, square, (hi - lo).to(tl.float64)


@triton.jit
def _sums_nchw(x, lo, hi, channel, channels, inner, R: tl.constexpr, G: tl.constexpr,
               DOWN: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """As _sums_channels_last, of one channel of images lo to hi."""
    r = tl.arange(0, R)[:, None, None]
    e = columns(G)
    s = tl.zeros([R, G, 8], tl.float32)
    q = tl.zeros([R, G, 8], tl.float32)
    lost_s, lost_q = s, q
    second = tl.minimum(lo + 1, hi - 1)
    last = inner - 1
    first_run = lo.to(tl.int64) * channels + channel
    shift = _median(
        tl.load(x + first_run * inner).to(tl.float32),
        tl.load(x + (second.to(tl.int64) * channels + channel) * inner + last).to(tl.float32),
        tl.load(x + first_run * inner + last // 2).to(tl.float32),
    )
    for row in range(lo, hi, R * DOWN):
        for i0 in range(0, inner, 8 * G * ACROSS):
            batch_s = tl.zeros([R, G, 8], tl.float32)
            batch_q = tl.zeros([R, G, 8], tl.float32)
            for j in tl.static_range(DOWN * ACROSS):
                image = row + j // ACROSS * R + r
                i = i0 + j % ACROSS * (8 * G) + e
                ok = (image < hi) & (i < inner)
                run = image.to(tl.int64) * channels + channel
                value = tl.load(x + run * inner + i, mask=ok, other=0)
                d = tl.where(ok, value.to(tl.float32) - shift, 0)
                batch_s += d
                batch_q += d * d
            s, lost_s = add_batch(s, lost_s, batch_s)
            q, lost_q = add_batch(q, lost_q, batch_q)
    total, square = sum_all(in_float64(s, lost_s)), sum_all(in_float64(q, lost_q))
    return shift, total, square, (hi - lo).to(tl.float64) * inner


@triton.jit
def _moments(x, lo, hi, block, channels, inner, CHANNELS_LAST: tl.constexpr, R: tl.constexpr,
             G: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """Mean and sum of squared deviations, float64, of a block of channels (channels_last: 8*G of
    them; NCHW: one) over rows (N*H*W, or images) lo to hi."""
    if CHANNELS_LAST:
        shift, total, square, n = _sums_channels_last(x, lo, hi, block, channels, inner, R, G, DOWN)
    else:
        shift, total, square, n = _sums_nchw(x, lo, hi, block, channels, inner, R, G, DOWN, ACROSS)
    # 1 / n by Newton's method: a division in float64 is a call, which spills
    inverse = (1 / n.to(tl.float32)).to(tl.float64)
    inverse = inverse * (2 - n * inverse)
    off = total * (inverse * (2 - n * inverse))
    m2 = square - total * off
    return shift + off, tl.where(m2 < 0, 0.0, m2)  # NaN stays NaN


@triton.jit
def _finish_forward(mean, m2, count, c, ok, weight, bias, running_mean, running_var, momentum, eps,
                    stats, channels, TRAINING: tl.constexpr):  # fmt: skip
    """The affine of the pass over the elements: y = (x - center) * scale + shift, in float64; also
    updates the running statistics and saves mean and invstd."""
    if TRAINING:
        var = m2 / count
        if running_mean is not None:
            old_mean = load_channel(running_mean, c, ok, 0.0)
            old_var = load_channel(running_var, c, ok, 1.0)
            new_mean = old_mean + momentum * (mean - old_mean)
            new_var = old_var + momentum * (m2 / (count - 1) - old_var)
            dtype = running_mean.dtype.element_ty
            tl.store(running_mean + c, new_mean.to(tl.float32).to(dtype), mask=ok)
            tl.store(running_var + c, new_var.to(tl.float32).to(dtype), mask=ok)
    else:
        mean = load_channel(running_mean, c, ok, 0.0)
        var = load_channel(running_var, c, ok, 1.0)
    invstd = 1 / tl.sqrt(var + eps)
    scale = load_channel(weight, c, ok, 1.0) * invstd
    tl.store(stats + c, mean.to(tl.float32), mask=ok)
    tl.store(stats + channels + c, invstd.to(tl.float32), mask=ok)
    # A mean under a standard deviation goes into the shift, which rounds once less than x - mean;
    # a larger one is subtracted first, and the shift takes what rounding it lost.
    center = tl.where(tl.abs(mean) * invstd < 1, 0.0, mean.to(tl.float32).to(tl.float64))
    return center, scale, load_channel(bias, c, ok, 0.0) + (center - mean) * scale


@triton.jit
def _apply(x, residual, y, mask, run, row_ok, i0, inner, center, scale, shift, center2, scale2,
           shift2, RESIDUAL: tl.constexpr, ACT: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """y and mask of a tile: elements i0 on of runs ``run`` [R, 1, 1]. With a second BatchNorm and
    no ReLU in between, shift holds both."""
    i = i0 + columns(G)
    ok = row_ok & (i < inner)
    at = run.to(tl.int64) * inner + i
    v = (tl.load(x + at, mask=ok, other=0).to(tl.float32) - center) * scale + shift
    if RESIDUAL != 0:
        other = tl.load(residual + at, mask=ok, other=0).to(tl.float32)
        if RESIDUAL == 2:
            other = (other - center2) * scale2
            if ACT == 2:
                other += shift2
        if ACT != 2:
            v += other
    if ACT != 0:
        positive = (v <= 0) == 0  # NaN passes, as torch.relu lets it
        v = tl.where(positive, v, 0)
        if mask is not None:
            weight = tl.full([1, 1, 8], 1, tl.int32) << tl.arange(0, 8)[None, None, :]
            byte = tl.sum(tl.where(positive & ok, weight, 0), axis=2, keep_dims=True)
            at8 = mask_byte(run, i0, inner, G)
            tl.store(mask + at8, byte.to(tl.uint8), mask=in_mask(row_ok, i0, inner, G))
        if RESIDUAL != 0 and ACT == 2:
            v += other
    tl.store(y + at, v.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_fwd_statistics_kernel(x, residual, partial, rows, chunk, channels, inner, first_norm,
                                  CHANNELS_LAST: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
                                  DOWN: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """partial[norm, chunk] = mean, m2 of chunk rows; norm 0 is of x, 1 of the residual.

    Grid (blocks of channels, chunks, norms).
    """
    block = tl.program_id(0)
    k = tl.program_id(1)
    norm = first_norm + tl.program_id(2)
    lo = k * chunk
    hi = tl.minimum(lo + chunk, rows)
    if norm == 0:
        mean, m2 = _moments(x, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, DOWN, ACROSS)
    else:
        mean, m2 = _moments(residual, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, DOWN,
                            ACROSS)  # fmt: skip
    row = (norm * tl.num_programs(1) + k).to(tl.int64)
    out = partial + row * 2 * channels
    c = block_channels(block, CHANNELS_LAST, G)
    tl.store(out + c, mean, mask=c < channels)
    tl.store(out + channels + c, m2, mask=c < channels)


@triton.jit
def _chunk(partial, k, chunk_values, count, c, here, channels, ROWS: tl.constexpr):
    """Where chunks k [K, 1] begin for channels c [B], and how many values they have: the third of
    their rows, or what their place says."""
    at = k.to(tl.int64) * (ROWS * channels) + c[None, :]
    if ROWS == 3:
        n = tl.load(partial + at + 2 * channels, mask=here, other=0).to(tl.float64)
    else:
        n = tl.minimum(chunk_values, count - k.to(tl.float64) * chunk_values)
    return at, n


@triton.jit
def _merge(partial, chunks, chunk_values, count, c, ok, channels, ROWS: tl.constexpr,
           K: tl.constexpr):  # fmt: skip
    """Mean and m2 of all chunks of one norm; c is [B]."""
    k = tl.arange(0, K)[:, None]
    mean = tl.zeros(c.shape, tl.float64)
    for first in range(0, chunks, K):
        here = (first + k < chunks) & ok[None, :]
        at, n = _chunk(partial, first + k, chunk_values, count, c, here, channels, ROWS)
        part = tl.load(partial + at, mask=here, other=0).to(tl.float64)
        mean += tl.sum(tl.where(here, part * (n / count), 0), axis=0)
    m2 = tl.zeros(c.shape, tl.float64)
    for first in range(0, chunks, K):
        here = (first + k < chunks) & ok[None, :]
        at, n = _chunk(partial, first + k, chunk_values, count, c, here, channels, ROWS)
        part = tl.load(partial + at, mask=here, other=0).to(tl.float64)
        square = tl.load(partial + at + channels, mask=here, other=0).to(tl.float64)
        off = part - mean[None, :]
        m2 += tl.sum(tl.where(here, square + off * off * n, 0), axis=0)
    return mean, m2


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_fwd_merge_kernel(partial, chunks, partial2, chunks2, chunk_values, values, weight, bias,
                             running_mean, running_var, momentum, eps, weight2, bias2,
                             running_mean2, running_var2, momentum2, eps2, stats, affine, affine2,
                             channels, TRAINING: tl.constexpr, TRAINING2: tl.constexpr,
                             ROWS: tl.constexpr, ROWS2: tl.constexpr, RESIDUAL: tl.constexpr,
                             ACT: tl.constexpr, K: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Merges the chunks of each norm: running statistics, stats (mean, invstd), and center, scale,
    shift of both norms. Grid (blocks of B channels). ``values``: per channel; ``chunk_values``: in
    a chunk of 2 rows.
    """
    c = tl.program_id(0) * B + tl.arange(0, B)
    ok = c < channels
    count = values.to(tl.float64)
    size = chunk_values.to(tl.float64)
    mean = tl.zeros([B], tl.float64)
    m2 = tl.zeros([B], tl.float64)
    if TRAINING:
        mean, m2 = _merge(partial, chunks, size, count, c, ok, channels, ROWS, K)
    center, scale, shift = _finish_forward(
        mean, m2, count, c, ok, weight, bias, running_mean, running_var, momentum, eps, stats,
        channels, TRAINING)  # fmt: skip
    if RESIDUAL == 2:
        if TRAINING2:
            mean, m2 = _merge(partial2, chunks2, size, count, c, ok, channels, ROWS2, K)
        center2, scale2, shift2 = _finish_forward(
            mean, m2, count, c, ok, weight2, bias2, running_mean2, running_var2, momentum2, eps2,
            stats + 2 * channels, channels, TRAINING2)  # fmt: skip
        if ACT != 2:
            shift += shift2
        store_affine(affine2, center2, scale2, shift2, c, ok, channels)
    store_affine(affine, center, scale, shift, c, ok, channels)


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_fwd_moments_kernel(partial, chunks, chunk_values, values, moments, channels,
                               K: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Merges the chunks: mean, m2 and number of values. Grid (blocks of B channels)."""
    c = tl.program_id(0) * B + tl.arange(0, B)
    ok = c < channels
    count = values.to(tl.float64)
    mean, m2 = _merge(partial, chunks, chunk_values.to(tl.float64), count, c, ok, channels, 2, K)
    tl.store(moments + c, mean, mask=ok)
    tl.store(moments + channels + c, m2, mask=ok)
    tl.store(moments + 2 * channels + c, tl.zeros([B], tl.float64) + count, mask=ok)


@triton.jit
def _bn_act_fwd_apply_kernel(x, residual, y, mask, affine, affine2, runs, channels, inner,
                             CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
                             R: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """y and mask. Grid as of program_tile."""
    run, row_ok, i0, c, in_table = program_tile(runs, channels, inner, CHANNELS_LAST, R, G)
    center, scale, shift = load_affine(affine, c, in_table, channels)
    center2, scale2, shift2 = center, scale, shift
    if RESIDUAL == 2:
        center2, scale2, shift2 = load_affine(affine2, c, in_table, channels)
    _apply(x, residual, y, mask, run, row_ok, i0, inner, center, scale, shift, center2, scale2,
           shift2, RESIDUAL, ACT, G)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _bn_act_fwd_small_kernel(x, residual, y, mask, weight, bias, running_mean, running_var,
                             momentum, eps, weight2, bias2, running_mean2, running_var2, momentum2,
                             eps2, stats, affine, rows, values, channels, inner,
                             CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr,
                             TRAINING2: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
                             R: tl.constexpr, G: tl.constexpr, DOWN: tl.constexpr,
                             ACROSS: tl.constexpr):  # fmt: skip
    """All of the forward pass for one block of channels. Grid (blocks of channels)."""
    block = tl.program_id(0)
    lo = tl.zeros([], tl.int32)
    hi = lo + rows
    c = block_channels(block, CHANNELS_LAST, G)
    known = c < channels
    count = values.to(tl.float64)
    mean = tl.zeros(c.shape, tl.float64)
    m2 = tl.zeros(c.shape, tl.float64)
    if TRAINING:
        mean, m2 = _moments(x, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, DOWN, ACROSS)
    center, scale, shift = _finish_forward(
        mean, m2, count, c, known, weight, bias, running_mean, running_var, momentum, eps, stats,
        channels, TRAINING)  # fmt: skip
    center2, scale2, shift2 = center, scale, shift
    if RESIDUAL == 2:
        if TRAINING2:
            mean, m2 = _moments(residual, lo, hi, block, channels, inner, CHANNELS_LAST, R, G,
                                DOWN, ACROSS)  # fmt: skip
        center2, scale2, shift2 = _finish_forward(
            mean, m2, count, c, known, weight2, bias2, running_mean2, running_var2, momentum2, eps2,
            stats + 2 * channels, channels, TRAINING2)  # fmt: skip
        if ACT != 2:
            shift += shift2
    center, scale, shift = center.to(tl.float32), scale.to(tl.float32), shift.to(tl.float32)
    center2, scale2, shift2 = center2.to(tl.float32), scale2.to(tl.float32), shift2.to(tl.float32)
    store_affine(affine, center, scale, shift, c, known, channels)
    for row in range(0, rows, R):
        r = row + tl.arange(0, R)[:, None, None]
        if CHANNELS_LAST:
            _apply(x, residual, y, mask, r, r < rows, block * (8 * G), inner, center, scale, shift,
                   center2, scale2, shift2, RESIDUAL, ACT, G)  # fmt: skip
        else:
            for i0 in range(0, inner, 8 * G):
                _apply(x, residual, y, mask, r * channels + block, r < rows, i0, inner, center,
                       scale, shift, center2, scale2, shift2, RESIDUAL, ACT, G)  # fmt: skip


# --- launches


class Call(NamedTuple):
    """A call of ``bn_act_fwd``: see the schema in ``fused_res/ops/bn_act.py``.

    Args:
        act: of ``reference.ACTS``, by place.
        statistics, residual_statistics: of x and of the residual, where a convolution computed them
            already, (chunks, 3, C): mean, sum of squared deviations and number of values of each
            chunk.
    """

    x: Tensor
    norm: Norm
    residual: Tensor | None = None
    residual_norm: Norm | None = None
    act: int = 1
    save_mask: bool = True
    statistics: Tensor | None = None
    residual_statistics: Tensor | None = None

    @property
    def residual_kind(self) -> int:
        return 0 if self.residual is None else 1 if self.residual_norm is None else 2

    @property
    def trainings(self) -> tuple[bool, bool]:
        second = self.residual_norm
        return self.norm.training, second is not None and second.training

    @property
    def given(self) -> tuple[bool, bool]:
        return self.statistics is not None, self.residual_statistics is not None


class _Outputs(NamedTuple):
    y: Tensor
    mask: Tensor | None
    stats: Tensor

    @property
    def affine(self) -> Tensor:
        """center, scale and shift of the pass over the elements."""
        return self.stats[-3:]


def _contiguous(norm: Norm | None) -> Norm | None:
    return None if norm is None else Norm(*map(launch.contiguous, norm[:4]), *norm[4:])


def _norms(call: Call) -> dict:
    """Both BatchNorms, as kernels take them."""
    found = {}
    for suffix, norm in ("", call.norm), ("2", call.residual_norm or Norm()):
        fields = "running_mean", "running_var", "weight", "bias", "momentum", "eps"
        found |= {f"{field}{suffix}": getattr(norm, field) for field in fields}
    return found


def _modes(call: Call) -> dict:
    trains, trains2 = call.trainings
    return {"TRAINING": trains, "TRAINING2": trains2, "RESIDUAL": call.residual_kind,
            "ACT": call.act}  # fmt: skip


def _run_small(g: Geometry, call: Call, out: _Outputs) -> None:
    config = bn_act.CONFIGS["fwd_small"]
    tile = g.small_tile(config)
    launch.run(
        _bn_act_fwd_small_kernel, (g.blocks(tile),), config.warps, x=call.x, residual=call.residual,
        y=out.y, mask=out.mask, **_norms(call), stats=out.stats, affine=out.affine, rows=g.rows,
        values=g.values, channels=g.channels, inner=g.inner, CHANNELS_LAST=g.channels_last,
        **_modes(call), **tile,
    )  # fmt: skip


def _run_statistics(
    g: Geometry, x: Tensor, residual: Tensor, count: int, first_norm: int
) -> tuple[Tensor, int]:
    """The statistics of ``count`` BatchNorms, from the first of the two, by chunks: (2, chunks, 2,
    C); and how many values of a channel a chunk has."""
    config = bn_act.CONFIGS["fwd_statistics"]
    tile = g.sum_tile(config)
    chunk, chunks = g.chunks(tile)
    partial = x.new_empty((2, chunks, 2, g.channels), dtype=torch.float64)
    launch.run(
        _bn_act_fwd_statistics_kernel, (g.blocks(tile), chunks, count), config.warps, x=x,
        residual=residual, partial=partial, rows=g.rows, chunk=chunk, channels=g.channels,
        inner=g.inner, first_norm=first_norm, CHANNELS_LAST=g.channels_last, **tile,
    )  # fmt: skip
    return partial, chunk * g.row_values


def _run_merge(
    g: Geometry, call: Call, out: _Outputs, affine2: Tensor | None, chunk_values: int
) -> None:
    partial, partial2 = call.statistics, call.residual_statistics
    rows = [2 if t is None else t.size(1) for t in (partial, partial2)]
    launch.run(
        _bn_act_fwd_merge_kernel, g.merge_grid(), bn_act.MERGE_WARPS, partial=partial,
        chunks=0 if partial is None else len(partial), partial2=partial2,
        chunks2=0 if partial2 is None else len(partial2), chunk_values=chunk_values,
        values=g.values, **_norms(call), stats=out.stats, affine=out.affine, affine2=affine2,
        channels=g.channels, ROWS=rows[0], ROWS2=rows[1], **_modes(call), **bn_act.MERGE,
    )  # fmt: skip


def _run_apply(
    g: Geometry, x: Tensor, residual: Tensor | None, out: _Outputs, affine2: Tensor | None,
    residual_kind: int, act: int,
) -> None:  # fmt: skip
    config = bn_act.CONFIGS["fwd_apply"]
    tile = g.pass_tile(config)
    launch.run(
        _bn_act_fwd_apply_kernel, g.pass_grid(tile), config.warps, x=x, residual=residual, y=out.y,
        mask=out.mask, affine=out.affine, affine2=affine2, runs=g.runs, channels=g.channels,
        inner=g.inner, CHANNELS_LAST=g.channels_last, RESIDUAL=residual_kind, ACT=act, **tile,
    )  # fmt: skip


def _run_chunks(g: Geometry, call: Call, out: _Outputs) -> None:
    """Statistics, their merge, and the pass over the elements."""
    first, second = (
        trains and not given for trains, given in zip(call.trainings, call.given, strict=True)
    )
    chunk_values = 0
    if first or second:
        residual = call.x if call.residual is None else call.residual  # compiled, if not run
        partial, chunk_values = _run_statistics(
            g, call.x, residual, first + second, 0 if first else 1
        )
        call = call._replace(
            statistics=partial[0] if first else call.statistics,
            residual_statistics=partial[1] if second else call.residual_statistics,
        )
    affine2 = None if call.residual_norm is None else torch.empty_like(out.affine)
    _run_merge(g, call, out, affine2, chunk_values)
    _run_apply(g, call.x, call.residual, out, affine2, call.residual_kind, call.act)


def _write_back(given: Norm | None, used: Norm | None) -> None:
    """Running statistics that are not contiguous were updated in a copy."""
    if given is None or not given.training:
        return
    for old, new in zip(given[:2], used[:2], strict=True):
        if new is not old:
            old.copy_(new)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """``bn_act_fwd``: y, mask, stats."""
    norms = call.norm, call.residual_norm
    x = dense(call.x)
    call = call._replace(
        x=x,
        norm=_contiguous(call.norm),
        residual=dense_like(call.residual, x),
        residual_norm=_contiguous(call.residual_norm),
    )
    g = Geometry.of(x)
    masked = call.save_mask and call.act != ACTS.index("none")
    mask = x.new_empty((g.runs if masked else 0, g.mask_bytes), dtype=torch.uint8)
    rows = 5 if call.residual_norm is None else 7
    stats = x.new_empty((rows, g.channels), dtype=torch.float32)
    out = _Outputs(torch.empty_like(x), mask if masked else None, stats)
    with launch.on_device(x):
        if g.small and not any(call.given):
            _run_small(g, call, out)
        else:
            _run_chunks(g, call, out)
    for given, used in zip(norms, (call.norm, call.residual_norm), strict=True):
        _write_back(given, used)
    return out.y, mask, stats


def reapply(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """y and mask of a call with a ReLU and no residual once more, bit by bit, from its stats."""
    x = dense(x)
    g = Geometry.of(x)
    mask = x.new_empty((g.runs, g.mask_bytes), dtype=torch.uint8)
    out = _Outputs(torch.empty_like(x), mask, stats)
    with launch.on_device(x):
        _run_apply(g, x, None, out, None, 0, ACTS.index("relu"))
    return out.y, mask


def statistics(x: Tensor) -> Tensor:
    """``bn_act_statistics``: mean, sum of squared deviations and number of values, (3, C)."""
    x = dense(x)
    g = Geometry.of(x)
    moments = x.new_empty((3, g.channels), dtype=torch.float64)
    with launch.on_device(x):
        (partial, _), chunk_values = _run_statistics(g, x, x, 1, 0)
        launch.run(
            _bn_act_fwd_moments_kernel, g.merge_grid(), bn_act.MERGE_WARPS, partial=partial,
            chunks=len(partial), chunk_values=chunk_values, values=g.values, moments=moments,
            channels=g.channels, **bn_act.MERGE,
        )  # fmt: skip
    return moments
