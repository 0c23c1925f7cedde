// Matrix products for convolutions: sums over the depth of rows of v times columns of a panel of
// weights. Included by *_kernels.cpp, after vec.h.
#pragma once
#include "panel.h"
#include "vec.h"

namespace fused_res::FUSED_RES_ISA {

using V = Vec<float>;

// Depth that is summed in registers before it is added to memory. A sum of 512 products in one go
// makes most of the rounding error; and 128 rows of a panel fit in the first cache.
constexpr int64_t kSummed = 128;

// Sums that the registers hold, with two vectors and a value beside them
#if defined(__AVX512F__)
constexpr int kVecs = 2, kMostRows = 14;
#elif defined(__AVX2__)
constexpr int kVecs = 2, kMostRows = 6;
#else
constexpr int kVecs = 1, kMostRows = 4;
#endif

// Weights come from memory at every call of a network that is larger than the caches, and the
// processor's own guesses stop at a page: 8 KB ahead gives 1.1 to 1.3 times the speed at batch 1.
constexpr int64_t kAhead = 64;

// out(row, column, sums) of kRows rows and kWidth vectors of columns, over the depth [lo, hi).
// `out` is passed and captures by value, so that what it stores cannot be what it reads: else every
// pointer is loaded anew after every store, 4 to 11 % of the time.
// kFetch: this is the first use of the weights.
template <int kRows, int kWidth, bool kFetch, class Out>
inline void multiply_block(const float* v, int64_t v_stride, const float* u, int64_t lo, int64_t hi,
                           Out out) {
  V acc[kRows][kWidth] = {};
  for (int64_t c = lo; c < hi; c++) {
    V w[kWidth];
    if constexpr (kFetch)
      for (int j = 0; j < kWidth * kLanes; j += 16)
        __builtin_prefetch(u + (c + kAhead) * kPanel + j, 0, 1);
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; j++) w[j] = load(u + c * kPanel + j * kLanes, Full{});
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const V value = broadcast_from(v + r * v_stride + c);
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; j++) acc[r][j] += value * w[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; j++) out(r, j * kLanes, acc[r][j]);
}

template <int kRows, int kColumns, bool kFetch, class Out>
inline void multiply_rows(int64_t rows, const float* v, int64_t v_stride, const float* u,
                          int64_t lo, int64_t hi, Out out) {
  if constexpr (kRows > 0) {
    if (rows < kRows)
      return multiply_rows<kRows - 1, kColumns, kFetch>(rows, v, v_stride, u, lo, hi, out);
    constexpr int kWidth = kColumns < kVecs * kLanes ? 1 : kVecs;
    for (int64_t n = 0; n < kColumns; n += kWidth * kLanes)
      multiply_block<kRows, kWidth, kFetch>(
          v, v_stride, u + n, lo, hi, [=](int64_t r, int64_t j, V sum) { out(r, n + j, sum); });
  }
}

template <int kColumns, class Out>
inline void multiply_columns(int64_t rows, int64_t depth, const float* v, int64_t v_stride,
                             const float* u, bool fetch, Out out) {
  // blocks of nearly equal size: a short last one would run at a fraction of the speed
  const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
  for (int64_t c = 0; c < depth; c += kSummed) {
    const int64_t c_end = depth - c < kSummed ? depth : c + kSummed;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t lo = rows * b / blocks, hi = rows * (b + 1) / blocks;
      const auto out_rows = [=](int64_t r, int64_t n, V sum) {
        out(lo + r, n, sum, c == 0, c_end == depth);
      };
      const float* at = v + lo * v_stride;
      if (fetch && b == 0)
        multiply_rows<kMostRows, kColumns, true>(hi - lo, at, v_stride, u, c, c_end, out_rows);
      else
        multiply_rows<kMostRows, kColumns, false>(hi - lo, at, v_stride, u, c, c_end, out_rows);
    }
  }
}

// out(row, column, sums, first, last): the sums of one part of the depth after the other, of half
// of a panel where no more than so many `columns` are wanted. fetch: the weights may be in no cache
// yet.
template <class Out>
inline void multiply_panel(int64_t rows, int64_t columns, int64_t depth, const float* v,
                           int64_t v_stride, const float* u, bool fetch, Out out) {
  constexpr int kHalf = kPanel / 2;
  if (columns <= kHalf)
    multiply_columns<kHalf>(rows, depth, v, v_stride, u, fetch, out);
  else
    multiply_columns<kPanel>(rows, depth, v, v_stride, u, fetch, out);
}

// out[kRows][kPanel] (+)= the sums over `count` rows of a column of v times a row of
// w[count][kPanel]
template <int kRows>
inline void accumulate_block(const float* v, int64_t v_stride, const float* w, int64_t count,
                             bool first, float* out) {
  V acc[kRows][kVecs] = {};
  for (int64_t i = 0; i < count; i++) {
    V row[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; j++) row[j] = load(w + i * kPanel + j * kLanes, Full{});
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const V value = broadcast_from(v + i * v_stride + r);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; j++) acc[r][j] += value * row[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; j++) {
      float* at = out + r * kPanel + j * kLanes;
      store(first ? acc[r][j] : load(at, Full{}) + acc[r][j], at, Full{});
    }
}

template <int kRows>
inline void accumulate_rows(int64_t rows, const float* v, int64_t v_stride, const float* w,
                            int64_t count, bool first, float* out) {
  if constexpr (kRows > 0) {
    if (rows < kRows) return accumulate_rows<kRows - 1>(rows, v, v_stride, w, count, first, out);
    for (int64_t n = 0; n < kPanel; n += kVecs * kLanes)
      accumulate_block<kRows>(v, v_stride, w + n, count, first, out + n);
  }
}

// y = act(sums + bias + residual), `lanes` channels from c on; null residual: none
template <class Lanes>
inline void store_output(V y, const float* bias, const float* residual, int act, float* out,
                         Lanes lanes) {
  y += load(bias, Full{});
  if (act == 2) y = keep<float>(not_below_zero<float>(y), y);
  if (residual) y += load(residual, lanes);
  if (act == 1) y = keep<float>(not_below_zero<float>(y), y);
  store(y, out, lanes);
}

}  // namespace fused_res::FUSED_RES_ISA
