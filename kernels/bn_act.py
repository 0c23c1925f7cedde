"""bn_act in Triton: the same op as ``csrc/cpu/bn_act.cpp``, on GPUs and in Triton's interpreter.

A tensor is ``runs`` of ``inner`` contiguous elements: channels_last has N*H*W runs of C channels,
NCHW has N*C runs of H*W elements of one channel. Tiles are [R, G, 8]: R runs, G bytes of the mask
and their 8 bits. Values per channel are [1, G, 8] (channels_last) or one number (NCHW).

Training is three launches each way: sums of chunks of rows, their merge in a fixed order, and one
pass over the elements; or a single launch where one program can hold a whole channel's sums
(``Plan``). Sums are of x - shift in float32 over a few elements, then in float64: neither a large
mean nor a large tensor costs digits (Chan, Golub and LeVeque, 1983). No atomics: every result is
bitwise the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a kernel is not compiled anew for where they are 1 or multiples of 16.
COUNTS = ("rows", "chunk", "chunks", "chunks2", "chunk_values", "values")

# --- pieces


@triton.jit
def _sum(t):
    """Over all elements, in a fixed order; [1, 1, 1]."""
    t = tl.sum(t, axis=2, keep_dims=True)
    t = tl.sum(t, axis=1, keep_dims=True)
    return tl.sum(t, axis=0, keep_dims=True)


@triton.jit
def _median(a, b, c):
    low = tl.minimum(a, b)
    rest = tl.minimum(tl.maximum(a, b), c)
    return tl.maximum(low, rest)


@triton.jit
def _columns(G: tl.constexpr):
    """0 .. 8*G - 1 as [1, G, 8]."""
    return (tl.arange(0, G)[:, None] * 8 + tl.arange(0, 8)[None, :])[None]


@triton.jit
def _block_channels(block, CHANNELS_LAST: tl.constexpr, G: tl.constexpr):
    """The channels of a block: [1, G, 8], or [1, 1, 1] in NCHW."""
    if CHANNELS_LAST:  # noqa: SIM108  (the compiler types both arms of an expression)
        c = block * (8 * G) + _columns(G)
    else:
        c = block + tl.zeros([1, 1, 1], tl.int32)
    return c


@triton.jit
def _byte(run, i0, inner, G: tl.constexpr):
    """Where the mask has the elements of a tile: [R, G, 1]."""
    return run.to(tl.int64) * ((inner + 7) // 8) + i0 // 8 + tl.arange(0, G)[None, :, None]


@triton.jit
def _in_mask(row_ok, i0, inner, G: tl.constexpr):
    return row_ok & (i0 + 8 * tl.arange(0, G)[None, :, None] < inner)


@triton.jit
def _stats(x, lo, hi, block, channels, inner, CHANNELS_LAST: tl.constexpr, R: tl.constexpr,
           G: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Mean and sum of squared deviations, float64, of a block of channels (channels_last: 8*G of
    them; NCHW: one) over rows (N*H*W, or images) lo to hi."""
    r = tl.arange(0, R)[:, None, None]
    e = _columns(G)
    s = tl.zeros([R, G, 8], tl.float64)
    q = tl.zeros([R, G, 8], tl.float64)
    second = tl.minimum(lo + 1, hi - 1)
    third = tl.minimum(lo + 2, hi - 1)
    if CHANNELS_LAST:
        c = block * (8 * G) + e
        in_block = c < channels
        # a shift near the values that one outlier does not move
        shift = _median(
            tl.load(x + lo.to(tl.int64) * inner + c, mask=in_block, other=0).to(tl.float32),
            tl.load(x + second.to(tl.int64) * inner + c, mask=in_block, other=0).to(tl.float32),
            tl.load(x + third.to(tl.int64) * inner + c, mask=in_block, other=0).to(tl.float32),
        )
        for row in range(lo, hi, R * UNROLL):
            s32 = tl.zeros([R, G, 8], tl.float32)
            q32 = tl.zeros([R, G, 8], tl.float32)
            for j in tl.static_range(UNROLL):
                run = row + j * R + r
                ok = (run < hi) & in_block
                value = tl.load(x + run.to(tl.int64) * inner + c, mask=ok, other=0)
                d = tl.where(ok, value.to(tl.float32) - shift, 0)
                s32 += d
                q32 += d * d
            s += s32
            q += q32
        total = tl.sum(s, axis=0, keep_dims=True)
        square = tl.sum(q, axis=0, keep_dims=True)
        n = (hi - lo).to(tl.float64)
    else:
        last = inner - 1
        first_run = lo.to(tl.int64) * channels + block
        shift = _median(
            tl.load(x + first_run * inner).to(tl.float32),
            tl.load(x + (second.to(tl.int64) * channels + block) * inner + last).to(tl.float32),
            tl.load(x + first_run * inner + last // 2).to(tl.float32),
        )
        for row in range(lo, hi, R):
            for i0 in range(0, inner, 8 * G * UNROLL):
                s32 = tl.zeros([R, G, 8], tl.float32)
                q32 = tl.zeros([R, G, 8], tl.float32)
                for j in tl.static_range(UNROLL):
                    i = i0 + j * 8 * G + e
                    run = (row + r).to(tl.int64) * channels + block
                    ok = (row + r < hi) & (i < inner)
                    value = tl.load(x + run * inner + i, mask=ok, other=0)
                    d = tl.where(ok, value.to(tl.float32) - shift, 0)
                    s32 += d
                    q32 += d * d
                s += s32
                q += q32
        total = _sum(s)
        square = _sum(q)
        n = (hi - lo).to(tl.float64) * inner
    # 1 / n by Newton's method: a division in float64 is a call, which spills
    inverse = (1 / n.to(tl.float32)).to(tl.float64)
    inverse = inverse * (2 - n * inverse)
    off = total * (inverse * (2 - n * inverse))
    m2 = square - total * off
    return shift + off, tl.where(m2 < 0, 0.0, m2)  # NaN stays NaN


@triton.jit
def _channel(p, c, ok, missing: tl.constexpr):
    """A per-channel tensor in float64; ``missing`` where it is None."""
    if p is None:  # what follows a return is compiled too
        value = tl.full(c.shape, missing, tl.float64)
    else:
        value = tl.load(p + c, mask=ok, other=missing).to(tl.float32).to(tl.float64)
    return value


@triton.jit
def _finish_forward(mean, m2, count, c, ok, weight, bias, running_mean, running_var, momentum, eps,
                    stats, channels, TRAINING: tl.constexpr):  # fmt: skip
    """The affine of the pass over the elements: y = (x - center) * scale + shift, in float64; also
    updates the running statistics and saves mean and invstd."""
    if TRAINING:
        var = m2 / count
        if running_mean is not None:
            old_mean = _channel(running_mean, c, ok, 0.0)
            old_var = _channel(running_var, c, ok, 1.0)
            new_mean = old_mean + momentum * (mean - old_mean)
            new_var = old_var + momentum * (m2 / (count - 1) - old_var)
            dtype = running_mean.dtype.element_ty
            tl.store(running_mean + c, new_mean.to(tl.float32).to(dtype), mask=ok)
            tl.store(running_var + c, new_var.to(tl.float32).to(dtype), mask=ok)
    else:
        mean = _channel(running_mean, c, ok, 0.0)
        var = _channel(running_var, c, ok, 1.0)
    invstd = 1 / tl.sqrt(var + eps)
    scale = _channel(weight, c, ok, 1.0) * invstd
    tl.store(stats + c, mean.to(tl.float32), mask=ok)
    tl.store(stats + channels + c, invstd.to(tl.float32), mask=ok)
    # A mean under a standard deviation goes into the shift, which rounds once less than x - mean;
    # a larger one is subtracted first, and the shift takes what rounding it lost.
    center = tl.where(tl.abs(mean) * invstd < 1, 0.0, mean.to(tl.float32).to(tl.float64))
    return center, scale, _channel(bias, c, ok, 0.0) + (center - mean) * scale


@triton.jit
def _apply(x, residual, y, mask, run, row_ok, i0, inner, center, scale, shift, center2, scale2,
           shift2, RESIDUAL: tl.constexpr, ACT: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """y and mask of a tile: elements i0 on of runs ``run`` [R, 1, 1]. With a second BatchNorm and
    no ReLU in between, shift holds both."""
    i = i0 + _columns(G)
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
            at8 = _byte(run, i0, inner, G)
            tl.store(mask + at8, byte.to(tl.uint8), mask=_in_mask(row_ok, i0, inner, G))
        if RESIDUAL != 0 and ACT == 2:
            v += other
    tl.store(y + at, v.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _store3(p, center, scale, shift, c, ok, channels):
    """Three rows of a [., channels] float32 table."""
    tl.store(p + c, center.to(tl.float32), mask=ok)
    tl.store(p + channels + c, scale.to(tl.float32), mask=ok)
    tl.store(p + 2 * channels + c, shift.to(tl.float32), mask=ok)


@triton.jit
def _load3(p, c, ok, channels):
    return (
        tl.load(p + c, mask=ok, other=0),
        tl.load(p + channels + c, mask=ok, other=0),
        tl.load(p + 2 * channels + c, mask=ok, other=0),
    )


@triton.jit
def _tile(runs, channels, inner, CHANNELS_LAST: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """A program's tile in a pass over the elements: runs [R, 1, 1] and whether they exist, first
    element, channels and whether they exist. Grid (blocks of R runs * blocks of 8*G elements): one
    axis, because the others end at 65535."""
    per_run = tl.cdiv(inner, 8 * G)
    run = (tl.program_id(0) // per_run).to(tl.int64) * R + tl.arange(0, R)[:, None, None]
    row_ok = run < runs
    i0 = tl.program_id(0) % per_run * (8 * G)
    if CHANNELS_LAST:
        c = i0 + _columns(G)
        in_table = c < channels
    else:
        c = (run % channels).to(tl.int32)
        in_table = row_ok
    return run, row_ok, i0, c, in_table


# --- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_stats(x, residual, partial, rows, chunk, channels, inner, first_norm,
                  CHANNELS_LAST: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
                  UNROLL: tl.constexpr):  # fmt: skip
    """partial[norm, chunk] = mean, m2 of chunk rows; norm 0 is of x, 1 of the residual.

    Grid (blocks of channels, chunks, norms).
    """
    block = tl.program_id(0)
    k = tl.program_id(1)
    norm = first_norm + tl.program_id(2)
    lo = k * chunk
    hi = tl.minimum(lo + chunk, rows)
    if norm == 0:
        mean, m2 = _stats(x, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, UNROLL)
    else:
        mean, m2 = _stats(residual, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, UNROLL)
    row = (norm * tl.num_programs(1) + k).to(tl.int64)
    out = partial + row * 2 * channels
    c = _block_channels(block, CHANNELS_LAST, G)
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
def forward_finish(partial, chunks, partial2, chunks2, chunk_values, values, weight, bias,
                   running_mean, running_var, momentum, eps, weight2, bias2, running_mean2,
                   running_var2, momentum2, eps2, stats, affine, affine2, channels,
                   TRAINING: tl.constexpr, TRAINING2: tl.constexpr, ROWS: tl.constexpr,
                   ROWS2: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr, K: tl.constexpr,
                   B: tl.constexpr):  # fmt: skip
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
        _store3(affine2, center2, scale2, shift2, c, ok, channels)
    _store3(affine, center, scale, shift, c, ok, channels)


@triton.jit(do_not_specialize=COUNTS)
def forward_moments(partial, chunks, chunk_values, values, moments, channels, K: tl.constexpr,
                    B: tl.constexpr):  # fmt: skip
    """Merges the chunks: mean, m2 and number of values. Grid (blocks of B channels)."""
    c = tl.program_id(0) * B + tl.arange(0, B)
    ok = c < channels
    count = values.to(tl.float64)
    mean, m2 = _merge(partial, chunks, chunk_values.to(tl.float64), count, c, ok, channels, 2, K)
    tl.store(moments + c, mean, mask=ok)
    tl.store(moments + channels + c, m2, mask=ok)
    tl.store(moments + 2 * channels + c, tl.zeros([B], tl.float64) + count, mask=ok)


@triton.jit
def forward_apply(x, residual, y, mask, affine, affine2, runs, channels, inner,
                  CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
                  R: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """y and mask. Grid as _tile."""
    run, row_ok, i0, c, in_table = _tile(runs, channels, inner, CHANNELS_LAST, R, G)
    center, scale, shift = _load3(affine, c, in_table, channels)
    center2, scale2, shift2 = center, scale, shift
    if RESIDUAL == 2:
        center2, scale2, shift2 = _load3(affine2, c, in_table, channels)
    _apply(x, residual, y, mask, run, row_ok, i0, inner, center, scale, shift, center2, scale2,
           shift2, RESIDUAL, ACT, G)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def forward_small(x, residual, y, mask, weight, bias, running_mean, running_var, momentum, eps,
                  weight2, bias2, running_mean2, running_var2, momentum2, eps2, stats, affine, rows,
                  values, channels, inner, CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr,
                  TRAINING2: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
                  R: tl.constexpr, G: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """All of the forward pass for one block of channels. Grid (blocks of channels)."""
    block = tl.program_id(0)
    lo = tl.zeros([], tl.int32)
    hi = lo + rows
    c = _block_channels(block, CHANNELS_LAST, G)
    known = c < channels
    count = values.to(tl.float64)
    mean = tl.zeros(c.shape, tl.float64)
    m2 = tl.zeros(c.shape, tl.float64)
    if TRAINING:
        mean, m2 = _stats(x, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, UNROLL)
    center, scale, shift = _finish_forward(
        mean, m2, count, c, known, weight, bias, running_mean, running_var, momentum, eps, stats,
        channels, TRAINING)  # fmt: skip
    center2, scale2, shift2 = center, scale, shift
    if RESIDUAL == 2:
        if TRAINING2:
            mean, m2 = _stats(residual, lo, hi, block, channels, inner, CHANNELS_LAST, R, G, UNROLL)
        center2, scale2, shift2 = _finish_forward(
            mean, m2, count, c, known, weight2, bias2, running_mean2, running_var2, momentum2, eps2,
            stats + 2 * channels, channels, TRAINING2)  # fmt: skip
        if ACT != 2:
            shift += shift2
    center, scale, shift = center.to(tl.float32), scale.to(tl.float32), shift.to(tl.float32)
    center2, scale2, shift2 = center2.to(tl.float32), scale2.to(tl.float32), shift2.to(tl.float32)
    _store3(affine, center, scale, shift, c, known, channels)
    for row in range(0, rows, R):
        r = row + tl.arange(0, R)[:, None, None]
        if CHANNELS_LAST:
            _apply(x, residual, y, mask, r, r < rows, block * (8 * G), inner, center, scale, shift,
                   center2, scale2, shift2, RESIDUAL, ACT, G)  # fmt: skip
        else:
            for i0 in range(0, inner, 8 * G):
                _apply(x, residual, y, mask, r * channels + block, r < rows, i0, inner, center,
                       scale, shift, center2, scale2, shift2, RESIDUAL, ACT, G)  # fmt: skip


# --- backward


@triton.jit
def _gradient(dy, mask, run, row_ok, i0, inner, at, ok, ACT: tl.constexpr, G: tl.constexpr):
    """dy, and dy where the ReLU let it through."""
    raw = tl.load(dy + at, mask=ok, other=0).to(tl.float32)
    g = raw
    if ACT != 0:
        in_mask = _in_mask(row_ok, i0, inner, G)
        byte = tl.load(mask + _byte(run, i0, inner, G), mask=in_mask, other=0).to(tl.int32)
        g = tl.where(((byte >> tl.arange(0, 8)[None, None, :]) & 1) != 0, raw, 0.0)
    return raw, g


@triton.jit
def _sums(dy, x, residual, mask, mean, mean2, lo, hi, block, channels, inner,
          CHANNELS_LAST: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr, R: tl.constexpr,
          G: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Sums of g and g * (x - mean), float64, and of the residual's BatchNorm; else as _stats."""
    r = tl.arange(0, R)[:, None, None]
    e = _columns(G)
    s = tl.zeros([R, G, 8], tl.float64)
    sx = tl.zeros([R, G, 8], tl.float64)
    s2 = tl.zeros([R, G, 8], tl.float64)
    sx2 = tl.zeros([R, G, 8], tl.float64)
    STEP: tl.constexpr = R * UNROLL if CHANNELS_LAST else R
    for row in range(lo, hi, STEP):
        end = inner
        if CHANNELS_LAST:
            end = 1  # the columns are the block's channels
        for i0 in range(0, end, 8 * G * UNROLL):
            t = tl.zeros([R, G, 8], tl.float32)
            tx = tl.zeros([R, G, 8], tl.float32)
            t2 = tl.zeros([R, G, 8], tl.float32)
            tx2 = tl.zeros([R, G, 8], tl.float32)
            for j in tl.static_range(UNROLL):
                if CHANNELS_LAST:
                    run = (row + j * R + r).to(tl.int64)
                    row_ok = run < hi
                    begin = block * (8 * G)
                else:
                    run = (row + r).to(tl.int64) * channels + block
                    row_ok = row + r < hi
                    begin = i0 + j * 8 * G
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
            s += t
            sx += tx
            if SECOND:
                s2 += t2
                sx2 += tx2
    if CHANNELS_LAST:
        s = tl.sum(s, axis=0, keep_dims=True)
        sx = tl.sum(sx, axis=0, keep_dims=True)
        s2 = tl.sum(s2, axis=0, keep_dims=True)
        sx2 = tl.sum(sx2, axis=0, keep_dims=True)
    else:
        s, sx, s2, sx2 = _sum(s), _sum(sx), _sum(s2), _sum(sx2)
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
    scale = _channel(weight, c, ok, 1.0) * invstd
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
    i = i0 + _columns(G)
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
def backward_sums(dy, x, residual, mask, stats, partial, rows, chunk, channels, inner,
                  CHANNELS_LAST: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr,
                  R: tl.constexpr, G: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """partial[chunk] = sums of g, g*(x-mean), and of the second norm's. Grid as forward_stats."""
    block = tl.program_id(0)
    k = tl.program_id(1)
    lo = k * chunk
    hi = tl.minimum(lo + chunk, rows)
    c = _block_channels(block, CHANNELS_LAST, G)
    ok = c < channels
    mean = tl.load(stats + c, mask=ok, other=0)
    mean2 = mean
    if SECOND:
        mean2 = tl.load(stats + 2 * channels + c, mask=ok, other=0)
    s, sx, s2, sx2 = _sums(dy, x, residual, mask, mean, mean2, lo, hi, block, channels, inner,
                           CHANNELS_LAST, SECOND, ACT, R, G, UNROLL)  # fmt: skip
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
def backward_finish(partial, chunks, values, weight, weight2, stats, dweight, dbias, dweight2,
                    dbias2, table, channels, TRAINING: tl.constexpr, TRAINING2: tl.constexpr,
                    SECOND: tl.constexpr, K: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Adds up the chunks: gradients of the parameters, and the table of backward_dx. With no
    chunks only the table. Grid (blocks of B channels)."""
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
def backward_dx(dy, x, residual, mask, dx, dresidual, table, runs, channels, inner,
                CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr, TRAINING2: tl.constexpr,
                SECOND: tl.constexpr, ACT: tl.constexpr, R: tl.constexpr,
                G: tl.constexpr):  # fmt: skip
    """dx and dresidual. Grid as _tile."""
    run, row_ok, i0, c, in_table = _tile(runs, channels, inner, CHANNELS_LAST, R, G)
    center, scale, slope, offset = _load_table(table, c, in_table, channels)
    center2, scale2, slope2, offset2 = center, scale, slope, offset
    if SECOND:
        center2, scale2, slope2, offset2 = _load_table(table + 4 * channels, c, in_table, channels)
    _input_gradients(dy, x, residual, mask, dx, dresidual, run, row_ok, i0, inner, center, scale,
                     slope, offset, center2, scale2, slope2, offset2, TRAINING, TRAINING2, SECOND,
                     ACT, G)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def backward_small(dy, x, residual, mask, dx, dresidual, weight, weight2, stats, dweight, dbias,
                   dweight2, dbias2, rows, values, channels, inner, CHANNELS_LAST: tl.constexpr,
                   TRAINING: tl.constexpr, TRAINING2: tl.constexpr, SECOND: tl.constexpr,
                   ACT: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
                   UNROLL: tl.constexpr):  # fmt: skip
    """All of the backward pass for one block of channels. Grid (blocks of channels)."""
    block = tl.program_id(0)
    lo = tl.zeros([], tl.int32)
    hi = lo + rows
    c = _block_channels(block, CHANNELS_LAST, G)
    known = c < channels
    count = values.to(tl.float64)
    mean = tl.load(stats + c, mask=known, other=0)
    mean2 = mean
    if SECOND:
        mean2 = tl.load(stats + 2 * channels + c, mask=known, other=0)
    s, sx, s2, sx2 = _sums(dy, x, residual, mask, mean, mean2, lo, hi, block, channels, inner,
                           CHANNELS_LAST, SECOND, ACT, R, G, UNROLL)  # fmt: skip
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
def backward_reapply(dy, x, dx, y, table, affine, runs, channels, inner,
                     CHANNELS_LAST: tl.constexpr, TRAINING: tl.constexpr, R: tl.constexpr,
                     G: tl.constexpr):  # fmt: skip
    """dx, where dy is past the ReLU already, and y once more, those that are not None. dx may be
    dy. Grid as _tile."""
    run, row_ok, i0, c, in_table = _tile(runs, channels, inner, CHANNELS_LAST, R, G)
    i = i0 + _columns(G)
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
        center, scale, shift = _load3(affine, c, in_table, channels)
        v = (value - center) * scale + shift
        tl.store(y + at, tl.where(v <= 0, 0.0, v).to(y.dtype.element_ty), mask=ok)


# --- configurations


class Config(NamedTuple):
    """elements: of a tile; unroll: tiles summed in float32 before they go into float64, 0 where
    nothing is summed."""

    elements: int
    unroll: int
    warps: int


CONFIGS = {
    "forward_stats": Config(1024, 2, 4),
    "forward_apply": Config(2048, 0, 4),
    "forward_small": Config(2048, 4, 8),
    "backward_sums": Config(1024, 2, 4),
    "backward_dx": Config(1024, 0, 4),  # of 2048, Triton 3.6 makes 161 to 194 registers a thread
    "backward_reapply": Config(1024, 0, 4),
    "backward_small": Config(2048, 2, 8),
}
_WARP = 64 if torch.version.hip else 32
PROGRAMS = 512  # that sum chunks: the same on every GPU, so the results are too
SMALL_VALUES = 4096  # per channel, at most, for a single launch
SMALL_ELEMENTS = 2**19
MERGE = {"K": 64, "B": 16}  # chunks and channels merged at a time


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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
        """What is summed over in chunks: pixels (channels_last) or images (NCHW)."""
        return self.runs if self.channels_last else self.runs // self.channels

    @property
    def values(self) -> int:
        return self.runs * self.inner // self.channels

    @property
    def small(self) -> bool:
        return self.values <= SMALL_VALUES and self.runs * self.inner <= SMALL_ELEMENTS

    def tile(self, config: Config, most_bytes: int) -> dict[str, int]:
        """R and G: at most ``most_bytes`` bytes of a mask wide, the other elements in rows; UNROLL
        where the kernel sums."""
        g = min(_power_of_2(_ceil_div(self.inner, 8)), most_bytes)
        elements = config.elements
        if self.inner % 8 and not config.unroll:
            elements //= 2  # runs that are not whole vectors are addressed element by element
        tile = {"R": max(1, elements // (8 * g)), "G": g}
        if config.unroll:
            widths = _ceil_div(self.inner, 8 * g)
            tile["UNROLL"] = config.unroll if self.channels_last else min(config.unroll, widths)
        return tile

    def tiles(self, tile: dict[str, int]) -> tuple[int]:
        """Of a pass over the elements: its grid."""
        return (_ceil_div(self.runs, tile["R"]) * _ceil_div(self.inner, 8 * tile["G"]),)

    def blocks(self, g: int) -> int:
        """Of channels, as the sums take them."""
        return _ceil_div(self.channels, 8 * g) if self.channels_last else self.channels

    def chunks(self, tile: dict[str, int], blocks: int) -> tuple[int, int]:
        """Rows of a chunk, and how many chunks there are."""
        step = tile["R"] * (tile["UNROLL"] if self.channels_last else 1)
        steps = _ceil_div(self.rows, step)
        chunk = _ceil_div(steps, max(1, min(PROGRAMS // blocks, steps))) * step
        return chunk, _ceil_div(self.rows, chunk)


def options(warps: int, threads_of_warp: int) -> dict:
    """Triton's, for ``warps`` of 32 threads: AMD's CDNA has warps of 64."""
    # fusion is said because what it is by default changes with Triton 3.10
    return {"num_warps": max(1, warps * 32 // threads_of_warp), "enable_fp_fusion": True}


def _launch(kernel, grid: tuple[int, ...], *args, warps: int, **constants) -> None:
    kernel[grid](*args, **constants, **options(warps, _WARP))


def _on(x: Tensor):
    """Makes x's device the current one: Triton launches there."""
    return torch.accelerator.device_index(x.device.index if x.device.type != "cpu" else None)


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t laid out as x, which is dense."""
    if t is None:
        return None
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return t.contiguous(memory_format=layout)


def _channels(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- the op: see the schemas in fused_res/ops/bn_act.py


def forward(x, weight, bias, running_mean, running_var, training, momentum, eps, residual,
            residual_norm, residual_weight, residual_bias, residual_running_mean,
            residual_running_var, residual_training, residual_momentum, residual_eps, act,
            save_mask, partial=None, partial2=None):  # fmt: skip
    """``bn_act_fwd``: y, mask, stats.

    Args:
        partial, partial2: statistics of x and the residual that are there already, (chunks, 3, C):
            mean, sum of squared deviations and how many values of each chunk.
    """
    x = _dense(x)
    residual = _like(residual, x)
    g = Geometry.of(x)
    y = torch.empty_like(x)
    masked = save_mask and act != 0
    mask = x.new_empty((g.runs if masked else 0, _ceil_div(g.inner, 8)), dtype=torch.uint8)
    stats = x.new_empty((7 if residual_norm else 5, g.channels), dtype=torch.float32)
    affine = stats[-3:]
    running = [running_mean, running_var, residual_running_mean, residual_running_var]
    rm, rv, rm2, rv2 = (_channels(t) for t in running)
    norm = (_channels(weight), _channels(bias), rm, rv, momentum, eps)
    second = (_channels(residual_weight), _channels(residual_bias), rm2, rv2, residual_momentum,
              residual_eps)  # fmt: skip
    kind = 0 if residual is None else 2 if residual_norm else 1
    trains, trains2 = training, residual_norm and residual_training
    out = mask if masked else None
    modes = {"CHANNELS_LAST": g.channels_last, "RESIDUAL": kind, "ACT": act}
    given = partial is not None, partial2 is not None
    with _on(x):
        if g.small and not any(given):
            config = CONFIGS["forward_small"]
            tile = g.tile(config, 1 if g.channels_last else 128)
            _launch(
                forward_small, (g.blocks(tile["G"]),), x, residual, y, out, *norm, *second, stats,
                affine, g.rows, g.values, g.channels, g.inner, warps=config.warps, TRAINING=trains,
                TRAINING2=trains2, **modes, **tile,
            )  # fmt: skip
        else:
            counted = trains and not given[0], trains2 and not given[1]
            chunk = 0
            if any(counted):
                config = CONFIGS["forward_stats"]
                tile = g.tile(config, 16)
                blocks = g.blocks(tile["G"])
                chunk, chunks = g.chunks(tile, blocks)
                sums = x.new_empty((2, chunks, 2, g.channels), dtype=torch.float64)
                second_x = x if residual is None else residual  # compiled, if not run
                _launch(
                    forward_stats, (blocks, chunks, sum(counted)), x, second_x, sums, g.rows, chunk,
                    g.channels, g.inner, 0 if counted[0] else 1, warps=config.warps,
                    CHANNELS_LAST=g.channels_last, **tile,
                )  # fmt: skip
                partial = sums[0] if counted[0] else partial
                partial2 = sums[1] if counted[1] else partial2
            chunks, chunks2 = (0 if t is None else len(t) for t in (partial, partial2))
            affine2 = torch.empty_like(affine) if residual_norm else None
            per_row = 1 if g.channels_last else g.inner
            _launch(
                forward_finish, (_ceil_div(g.channels, MERGE["B"]),), partial, chunks, partial2,
                chunks2, chunk * per_row, g.values, *norm, *second, stats, affine, affine2,
                g.channels, warps=4, TRAINING=trains, TRAINING2=trains2, ROWS=2 + given[0],
                ROWS2=2 + given[1], RESIDUAL=kind, ACT=act, **MERGE,
            )  # fmt: skip
            config = CONFIGS["forward_apply"]
            tile = g.tile(config, 128)
            _launch(
                forward_apply, g.tiles(tile), x, residual, y, out, affine, affine2, g.runs,
                g.channels, g.inner, warps=config.warps, **modes, **tile,
            )  # fmt: skip
    written = trains, trains, trains2, trains2
    for given, used, new in zip(running, (rm, rv, rm2, rv2), written, strict=True):
        if new and used is not given:
            given.copy_(used)
    return y, mask, stats


def reapply(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """y and mask of a call with a ReLU and no residual once more, bit by bit, from its stats."""
    x = _dense(x)
    g = Geometry.of(x)
    y = torch.empty_like(x)
    mask = x.new_empty((g.runs, _ceil_div(g.inner, 8)), dtype=torch.uint8)
    config = CONFIGS["forward_apply"]
    tile = g.tile(config, 128)
    with _on(x):
        _launch(
            forward_apply, g.tiles(tile), x, None, y, mask, stats[2:], None, g.runs, g.channels,
            g.inner, warps=config.warps, CHANNELS_LAST=g.channels_last, RESIDUAL=0, ACT=1, **tile,
        )  # fmt: skip
    return y, mask


def statistics(x):
    """``bn_act_statistics``: mean, sum of squared deviations and number of values."""
    x = _dense(x)
    g = Geometry.of(x)
    moments = x.new_empty((3, g.channels), dtype=torch.float64)
    config = CONFIGS["forward_stats"]
    tile = g.tile(config, 16)
    blocks = g.blocks(tile["G"])
    chunk, chunks = g.chunks(tile, blocks)
    partial = x.new_empty((chunks, 2, g.channels), dtype=torch.float64)
    with _on(x):
        _launch(
            forward_stats, (blocks, chunks, 1), x, x, partial, g.rows, chunk, g.channels, g.inner,
            0, warps=config.warps, CHANNELS_LAST=g.channels_last, **tile,
        )  # fmt: skip
        _launch(
            forward_moments, (_ceil_div(g.channels, MERGE["B"]),), partial, chunks,
            chunk * (1 if g.channels_last else g.inner), g.values, moments, g.channels, warps=4,
            **MERGE,
        )  # fmt: skip
    return moments


def backward(dy, x, weight, training, residual, residual_norm, residual_weight, residual_training,
             stats, mask, act, need_x, need_residual, need_parameters, given=None):  # fmt: skip
    """``bn_act_bwd``: dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias."""
    x = _dense(x)
    dy, residual = _like(dy, x), _like(residual, x)
    g = Geometry.of(x)
    dx = torch.empty_like(x) if need_x else None
    dresidual = torch.empty_like(x) if need_residual else None

    def gradients(w):
        wanted = w is not None and need_parameters
        return [torch.empty_like(w, memory_format=torch.contiguous_format) if wanted else None
                for _ in range(2)]  # fmt: skip

    dweight, dbias = gradients(weight)
    dweight2, dbias2 = gradients(residual_weight if residual_norm else None)
    weight, weight2 = _channels(weight), _channels(residual_weight)
    trains, trains2 = training, residual_norm and residual_training
    modes = {"CHANNELS_LAST": g.channels_last, "SECOND": residual_norm, "ACT": act}
    trainings = {"TRAINING": trains, "TRAINING2": trains2}
    bits = mask if act != 0 else None
    sums = need_parameters or (need_x and trains) or (need_residual and trains2)
    with _on(x):
        if g.small and given is None:
            config = CONFIGS["backward_small"]
            tile = g.tile(config, 1 if g.channels_last else 128)
            _launch(
                backward_small, (g.blocks(tile["G"]),), dy, x, residual, bits, dx, dresidual,
                weight, weight2, stats, dweight, dbias, dweight2, dbias2, g.rows, g.values,
                g.channels, g.inner, warps=config.warps, **trainings, **modes, **tile,
            )  # fmt: skip
        else:
            config = CONFIGS["backward_sums"]
            tile = g.tile(config, 16)
            blocks = g.blocks(tile["G"])
            chunk, chunks = g.chunks(tile, blocks) if sums else (0, 0)
            per_chunk = 4 if residual_norm else 2
            partial = x.new_empty((chunks, per_chunk, g.channels), dtype=torch.float64)
            if given is not None:
                partial, chunks = given.contiguous(), 1
            elif sums:
                _launch(
                    backward_sums, (blocks, chunks), dy, x, residual, bits, stats, partial, g.rows,
                    chunk, g.channels, g.inner, warps=config.warps, **modes, **tile,
                )  # fmt: skip
            table = x.new_empty((8 if residual_norm else 4, g.channels), dtype=torch.float32)
            _launch(
                backward_finish, (_ceil_div(g.channels, MERGE["B"]),), partial, chunks, g.values,
                weight, weight2, stats, dweight, dbias, dweight2, dbias2, table, g.channels,
                warps=4, SECOND=residual_norm, **trainings, **MERGE,
            )  # fmt: skip
            if need_x or need_residual:
                config = CONFIGS["backward_dx"]
                tile = g.tile(config, 128)
                _launch(
                    backward_dx, g.tiles(tile), dy, x, residual, bits, dx, dresidual, table, g.runs,
                    g.channels, g.inner, warps=config.warps, **trainings, **modes, **tile,
                )  # fmt: skip
    results = (dx, dweight, dbias, dresidual, dweight2, dbias2)
    return tuple(x.new_empty(0) if t is None else t for t in results)


def backward_of_sums(g: Tensor, x: Tensor, weight: Tensor | None, training: bool, stats: Tensor,
                     partial: Tensor, need_x: bool, need_parameters: bool,
                     need_y: bool):  # fmt: skip
    """The backward pass of a call with a ReLU and no residual, from where its sums are there.

    Args:
        g: the gradient past the ReLU; becomes dx.
        partial: (chunks, 2, C): sums of g and of g * (x - mean).

    Returns:
        dx, dweight, dbias, and y once more; None where not wanted.
    """
    geometry = Geometry.of(x)
    channels = geometry.channels
    wanted = need_parameters and weight is not None
    gradients = [torch.empty_like(weight) if wanted else None for _ in range(2)]
    table = x.new_empty((4, channels), dtype=torch.float32)
    dx = g if need_x else None
    y = torch.empty_like(x) if need_y else None
    config = CONFIGS["backward_reapply"]
    tile = geometry.tile(config, 128)
    with _on(x):
        _launch(
            backward_finish, (_ceil_div(channels, MERGE["B"]),), partial, len(partial),
            geometry.values, _channels(weight), None, stats, *gradients, None, None, table,
            channels, warps=4, SECOND=False, TRAINING=training, TRAINING2=False, **MERGE,
        )  # fmt: skip
        if need_x or need_y:
            _launch(
                backward_reapply, geometry.tiles(tile), g, x, dx, y, table, stats[2:],
                geometry.runs, channels, geometry.inner, warps=config.warps,
                CHANNELS_LAST=geometry.channels_last, TRAINING=training, **tile,
            )  # fmt: skip
    return dx, *gradients, y
