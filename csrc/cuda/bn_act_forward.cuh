// bn_act on a CUDA device, forward: kernels and launches. See bn_act_common.cuh.
#pragma once
#include "bn_act_common.cuh"

namespace fused_res::cuda {

__device__ inline float median(float a, float b, float c) {
  return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

// A shift for each of a column's channels: the median of three of its values, which an outlier does
// not move.
template <class T, bool kChannelsLast, bool kVector>
__device__ __forceinline__ void find_shifts(const void* x, const Walk& w, const Part& part,
                                            float (&shift)[kChannelsOf<kChannelsLast>]) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  SHARED(float, shifts, kMaxWidth * 8);
  __syncthreads();  // an earlier call's shifts have been read
  if (part.lane == 0 && part.in_range) {
    const int64_t items[3] = {part.first, (part.first + part.end) / 2, part.end - 1};
    float samples[3][kChannels];
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const Place p = Cursor<kChannelsLast, kVector>(w, part.column, items[i], 0).place();
#pragma unroll
      for (int k = 0; k < kChannels; k++)
        samples[i][k] = k < p.valid ? to_float(load((const T*)x + p.element + k)) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kChannels; k++)
      shifts[part.column_of_block * kChannels + k] =
          median(samples[0][k], samples[1][k], samples[2][k]);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kChannels; k++)
    shift[k] = part.in_range ? shifts[part.column_of_block * kChannels + k] : 0.f;
}

// Mean and sum of squared deviations of a part's channels: done(channel, mean, m2) in one thread
// each. Sums are of x less a shift, in float: plainly over a few values, these then in a Sum.
template <class T, bool kChannelsLast, bool kVector, class Keep, class Done>
__device__ __forceinline__ void statistics(const void* x, const Walk& w, const Part& part,
                                           const Keep& kept, int tensor, const Done& done) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>, kBatch = kBatchOf<T, false>;
  float shift[kChannels];
  find_shifts<T, kChannelsLast, kVector>(x, w, part, shift);

  Sum sums[2 * kChannels];  // of x - shift, and of its square
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> eights[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) eights[u] = load_eight<kVector, T>(x, places[u]);
#pragma unroll
    for (int u = 0; u < kBatch; u++)
      if (places[u].valid) kept.put(tensor, i + u, eights[u]);
    float s[kChannels] = {}, q[kChannels] = {};
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (!exists<kVector>(places[u], k)) continue;
        const int c = kChannelsLast ? k : 0;
        const float d = eights[u][k] - shift[c];
        s[c] += d;
        q[c] += d * d;
      }
      if (kChannelsLast && u != kBatch - 1) continue;  // eight values of a channel at most
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        sums[c].add(s[c]), sums[kChannels + c].add(q[c]);
        s[c] = q[c] = 0;
      }
    }
  });
  reduce(sums, w.width);
  if (part.lane != 0 || !part.in_range) return;
  const double n = w.values(part.chunk);
#pragma unroll
  for (int k = 0; k < kChannels; k++) {
    const int64_t c = channel_of<kChannelsLast>(part.column) + k;
    const double sum = sums[k].value(), m2 = sums[kChannels + k].value() - sum * sum / n;
    if (c < w.shape.channels) done(c, shift[k] + sum / n, m2 < 0 ? 0 : m2);  // NaN stays NaN
  }
}

// where stats have x's centre, scale and shift
__host__ __device__ inline float* affine_of(const ForwardArgs& a) {
  return a.stats + (a.residual_kind == Residual::norm ? 4 : 2) * a.shape.channels;
}

// All statistics of channel c of one BatchNorm are known: the table {centre, scale, shift} of
// y = (x - centre) * scale + shift; and, if `first`, running statistics and what backward wants.
template <class T>
__device__ inline void finish_forward(const ForwardArgs& a, const Walk& w, const Tables& tables,
                                      bool first, int which, int64_t c, double mean, double m2) {
  const ForwardNorm& n = a.norm[which];
  double var = m2 / w.count();
  if (!n.training) {
    mean = load_channel<T>(n.running_mean, c, 0);
    var = load_channel<T>(n.running_var, c, 1);
  } else if (first) {
    const double unbiased = m2 / (w.count() - 1), momentum = n.momentum;
    const double running_mean = load_channel<T>(n.running_mean, c, 0);
    const double running_var = load_channel<T>(n.running_var, c, 1);
    store_channel<T>(n.running_mean, c, (1 - momentum) * running_mean + momentum * mean);
    store_channel<T>(n.running_var, c, (1 - momentum) * running_var + momentum * unbiased);
  }
  const double invstd = 1 / sqrt(var + n.eps);
  const double scale = load_channel<T>(n.weight, c, 1) * invstd;
  const float rounded = (float)mean;
  if (first) {
    store(a.stats + 2 * which * w.shape.channels + c, rounded);
    store(a.stats + (2 * which + 1) * w.shape.channels + c, (float)invstd);
  }
  // A mean under a standard deviation goes into the shift, which rounds once less than x - mean;
  // a larger one is subtracted first, and the shift takes what rounding it lost.
  const float centre = fabs(mean) * invstd < 1 ? 0.f : rounded;
  const double bias = load_channel<T>(n.bias, c, 0);
  const float shift = (float)(bias + ((double)centre - mean) * scale);
  if (first && which == 0) {
    float* affine = affine_of(a) + c;
    store(affine, centre);
    store(affine + w.shape.channels, (float)scale);
    store(affine + 2 * w.shape.channels, shift);
  }
  store(tables.row(which, 0) + c, centre);
  store(tables.row(which, 1) + c, (float)scale);
  store(tables.row(which, 2) + c, shift);
  if (which == 1 && a.act != Act::relu_before_add) {  // one shift for both, added after both
    float* main = tables.row(0, 2) + c;
    store(main, load(main) + shift);
  }
}

// y and mask of a part
template <class T, bool kChannelsLast, bool kVector, bool kSecond, class Keep>
__device__ __forceinline__ void apply(const ForwardArgs& a, const Walk& w, const Tables& tables,
                                      const Part& part, const Keep& kept) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  constexpr int kBatch = kBatchOf < T, kChannelsLast && kSecond > ;
  if (part.first + part.lane >= part.end) return;
  float centre[2][kChannels], scale[2][kChannels], shift[2][kChannels];
  const bool second = kSecond && a.residual_kind == Residual::norm;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (i == 1 && !second) break;
    load_channels<kChannelsLast, kVector>(tables.row(i, 0), w, part, centre[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 1), w, part, scale[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 2), w, part, shift[i]);
  }
  const bool before_add = a.act == Act::relu_before_add;
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> xs[kBatch], residuals[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      xs[u] = load_kept<kVector, T>(kept, 0, i + u, a.x, places[u]);
      if (a.residual_kind != Residual::none)
        residuals[u] = load_kept<kVector, T>(kept, 1, i + u, a.residual, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (places[u].valid == 0) continue;
      float v[8];
      uint32_t bits = 0;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int c = kChannelsLast ? k : 0;
        float value = (xs[u][k] - centre[0][c]) * scale[0][c] + shift[0][c];
        float other = -0.f;  // the value that changes nothing it is added to
        if (a.residual_kind != Residual::none) other = residuals[u][k];
        if (second) {
          other = (other - centre[1][c]) * scale[1][c];
          if (before_add) other += shift[1][c];
        }
        if (!before_add) value += other;
        if (a.act != Act::none) {
          const bool positive = !(value <= 0);  // NaN passes
          if (k < places[u].valid) bits |= (uint32_t)positive << (k ^ kPlantedBit);
          value = positive ? value : 0.f;
        }
        if (before_add) value += other;
        v[k] = value;
      }
      store_eight<kVector, T>(a.y, places[u], v);
      if (a.mask) store(a.mask + places[u].mask, (uint8_t)bits);
    }
  });
}

// The chunks' means and squared deviations become the batch's: first all means, then the squares
// about it (Chan, Golub and LeVeque 1979). The block's threads share `channels` channels, one of
// them c; its sums are complete in lane 0, which calls finish(which BatchNorm, mean, m2).
template <class Finish>
__device__ inline void merge_statistics(const ForwardArgs& a, const Walk& w, int64_t c,
                                        int channels, const Finish& finish) {
  const int lane = threadIdx.x / channels, lanes = kThreads / channels;
  const bool in_range = c < w.shape.channels;
  const int64_t chunks = in_range ? w.chunks : 0;
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if (which == 1 && a.residual_kind != Residual::norm) break;
    double mean[1] = {}, m2[1] = {};
    if (a.norm[which].training) {
      for (int64_t k = lane; k < chunks; k += lanes)
        mean[0] += w.values(k) * load(sums_of(w, a.scratch, k, 2 * which) + c);
      reduce(mean, channels);
      mean[0] /= w.count();
      for (int64_t k = lane; k < chunks; k += lanes) {
        const double delta = load(sums_of(w, a.scratch, k, 2 * which) + c) - mean[0];
        m2[0] += load(sums_of(w, a.scratch, k, 2 * which + 1) + c) + w.values(k) * delta * delta;
      }
      reduce(m2, channels);
    }
    if (in_range && lane == 0) finish(which, mean[0], m2[0]);
  }
}

template <class T>
__device__ inline void merge_forward(const ForwardArgs& a, const Walk& w, const Tables& tables,
                                     bool first, int64_t c, int channels) {
  merge_statistics(a, w, c, channels, [&](int which, double mean, double m2) {
    finish_forward<T>(a, w, tables, first, which, c, mean, m2);
  });
}

// where a part's statistics wait for their merge
__device__ inline auto kept_sums(const ForwardArgs& a, const Walk& w, const Part& part, int which) {
  double* sums = sums_of(w, a.scratch, part.chunk, 2 * which);
  const int64_t padded = w.padded();
  return [=](int64_t c, double mean, double m2) {
    store(sums + c, mean);
    store(sums + padded + c, m2);
  };
}

template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_fwd_statistics_kernel(const __grid_constant__ ForwardArgs a,
                                 const __grid_constant__ Walk w) {
  const int which = blockIdx.y == 1 || !a.norm[0].training;
  const Part part(w, false);
  statistics<T, kChannelsLast, kVector>(which ? a.residual : a.x, w, part, NotKept<T>{}, which,
                                        kept_sums(a, w, part, which));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    bn_act_fwd_merge_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  const int64_t c = (int64_t)blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  merge_forward<T>(a, w, tables_of_all(w, a.scratch), true, c, kMergeChannels);
}

// mean, m2 and number of values: (3, C)
__global__ void __launch_bounds__(kThreads, 1)
    bn_act_fwd_moments_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w,
                              double* out) {
  const int64_t c = (int64_t)blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  merge_statistics(a, w, c, kMergeChannels, [&](int, double mean, double m2) {
    store(out + c, mean);
    store(out + w.shape.channels + c, m2);
    store(out + 2 * w.shape.channels + c, w.count());
  });
}

template <class T, bool kChannelsLast, bool kVector, bool kSecond>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    bn_act_fwd_apply_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  apply<T, kChannelsLast, kVector, kSecond>(a, w, tables_of_all(w, a.scratch), Part(w, true),
                                            NotKept<T>{});
}

// y and mask once more, by the affine that stats have
template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    bn_act_fwd_reapply_kernel(const __grid_constant__ ForwardArgs a,
                              const __grid_constant__ Walk w) {
  apply<T, kChannelsLast, kVector, false>(a, w, {affine_of(a), w.shape.channels}, Part(w, true),
                                          NotKept<T>{});
}

// one chunk: a block has all values of its channels
template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    bn_act_fwd_whole_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  const Part part(w, false);
  const Tables tables = tables_of_all(w, a.scratch);
  for (int which = 0; which < (a.residual_kind == Residual::norm ? 2 : 1); which++) {
    const auto finish = [&](int64_t c, double mean, double m2) {
      finish_forward<T>(a, w, tables, true, which, c, mean, m2);
    };
    if (a.norm[which].training)
      statistics<T, kChannelsLast, kVector>(which ? a.residual : a.x, w, part, NotKept<T>{}, which,
                                            finish);
    else if (part.lane == 0 && part.in_range)
      for (int k = 0; k < kChannelsOf<kChannelsLast>; k++) {
        const int64_t c = channel_of<kChannelsLast>(part.column) + k;
        if (c < w.shape.channels) finish(c, 0, 0);
      }
  }
  __syncthreads();
  apply<T, kChannelsLast, kVector, true>(a, w, tables, part, NotKept<T>{});
}

// All blocks at once: each keeps what it reads for the statistics, merges those of all blocks for
// its own channels, and goes on from what it kept. The blocks of the first chunk write what there
// is one of.
template <class T, bool kChannelsLast, bool kSecond>
__global__ void __launch_bounds__(kThreads, blocks_together(kSecond))
    bn_act_fwd_cooperative_kernel(const __grid_constant__ ForwardArgs a,
                                  const __grid_constant__ Walk w,
                                  const __grid_constant__ Kept<T> kept) {
  const Part part(w, false);
  if (a.norm[0].training)
    statistics<T, kChannelsLast, true>(a.x, w, part, kept, 0, kept_sums(a, w, part, 0));
  if (kSecond && a.norm[1].training)
    statistics<T, kChannelsLast, true>(a.residual, w, part, kept, 1, kept_sums(a, w, part, 1));
  BARRIER_BEFORE_MERGE();
  const int channels = w.channels_of_block();
  const int64_t c = blockIdx.x % w.column_blocks * channels + threadIdx.x % channels;
  const Tables tables = tables_of_block(w, a.scratch);
  merge_forward<T>(a, w, tables, part.chunk == 0, c, channels);
  __syncthreads();
  apply<T, kChannelsLast, true, kSecond>(a, w, tables, part, kept);
}

// --- launches

inline void bn_act_forward(const ForwardArgs& a, Stream stream) {
  const Walk split = split_walk(a.shape);
  const bool vector = split.run % 8 == 0 && aligned(a.x) && aligned(a.residual) && aligned(a.y);
  const bool second = a.residual_kind == Residual::norm;
  const int trained = a.norm[0].training + (second && a.norm[1].training);
  const Plan plan =
      plan_of(a.plan, a.shape, a.element, a.device, second, trained ? 1 + second : 0, vector);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    using T = decltype(t);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    constexpr bool kVector = decltype(vector)::value;
    if (plan == Plan::whole) {
      const Walk whole = whole_walk(a.shape);
      return launch("bn_act_fwd_whole", bn_act_fwd_whole_kernel<T, kChannelsLast, kVector>,
                    dim3(whole.blocks()), kThreads, stream, a, whole);
    }
    if constexpr (kVector) {
      if (plan == Plan::cooperative) {
        const Walk together = cooperative_walk(a.shape, a.device, second);
        const Kept<T> kept(kept_bytes(a.device, second), 1 + second,
                           a.norm[0].training + 2 * a.norm[1].training);
        const auto kernel = second ? bn_act_fwd_cooperative_kernel<T, kChannelsLast, true>
                                   : bn_act_fwd_cooperative_kernel<T, kChannelsLast, false>;
        const bool launched =
            launch_together("bn_act_fwd_cooperative", kernel, together.blocks(), kThreads,
                            kept.bytes(1 + second), stream, a, together, kept);
        if (launched) return;
      }
    }
    if (trained)
      launch("bn_act_fwd_statistics", bn_act_fwd_statistics_kernel<T, kChannelsLast, kVector>,
             dim3(split.blocks(), trained), kThreads, stream, a, split);
    launch("bn_act_fwd_merge", bn_act_fwd_merge_kernel<T>,
           dim3(ceil_div(a.shape.channels, kMergeChannels)), kThreads, stream, a, split);
    // Element by element is slow anyway: there is one kernel for all kinds of residual.
    const auto apply = second || !kVector
                           ? bn_act_fwd_apply_kernel<T, kChannelsLast, kVector, true>
                           : bn_act_fwd_apply_kernel<T, kChannelsLast, kVector, !kVector>;
    launch("bn_act_fwd_apply", apply, dim3(split.blocks()), kThreads, stream, a, split);
  });
}

// without a residual
inline void bn_act_reapply(const ForwardArgs& a, Stream stream) {
  const Walk split = split_walk(a.shape);
  const bool vector = split.run % 8 == 0 && aligned(a.x) && aligned(a.y) && aligned(a.stats);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    using T = decltype(t);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    launch("bn_act_fwd_reapply",
           bn_act_fwd_reapply_kernel<T, kChannelsLast, decltype(vector)::value>,
           dim3(split.blocks()), kThreads, stream, a, split);
  });
}

// Only the statistics of a.x: mean, sum of squared deviations and number of values, (3, C). Of `a`
// it takes element, shape, x, norm[0].training, which must be true, and scratch.
inline void bn_act_statistics(const ForwardArgs& a, double* out, Stream stream) {
  const Walk walk = split_walk(a.shape);
  const bool vector = walk.run % 8 == 0 && aligned(a.x);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    launch("bn_act_statistics",
           bn_act_fwd_statistics_kernel<decltype(t), decltype(channels_last)::value,
                                        decltype(vector)::value>,
           dim3(walk.blocks()), kThreads, stream, a, walk);
  });
  launch("bn_act_statistics_merge", bn_act_fwd_moments_kernel,
         dim3(ceil_div(a.shape.channels, kMergeChannels)), kThreads, stream, a, walk, out);
}

}  // namespace fused_res::cuda
