// bn_act on a CUDA device, backward: kernels and launches. See bn_act_common.cuh.
#pragma once
#include "bn_act_common.cuh"

namespace fused_res::cuda {

// Adds up all threads' sums of a part's channels: done(channel, sums) in one thread each.
template <bool kChannelsLast, int kValues, class Done>
__device__ __forceinline__ void reduce_channels(Sum (&sums)[kValues], const Walk& w,
                                                const Part& part, const Done& done) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  reduce(sums, w.width);
  if (part.lane != 0 || !part.in_range) return;
#pragma unroll
  for (int k = 0; k < kChannels; k++) {
    const int64_t c = channel_of<kChannelsLast>(part.column) + k;
    if (c >= w.shape.channels) continue;
    double of_channel[kSums] = {};
#pragma unroll
    for (int i = 0; i < kValues / kChannels; i++) of_channel[i] = sums[i * kChannels + k].value();
    done(c, of_channel);
  }
}

// Sums of g and g * (x - mean) of a part's channels, and of the residual's BatchNorm: done(channel,
// sums) in one thread each.
template <class T, bool kChannelsLast, bool kVector, bool kSecond, class Keep, class Done>
__device__ __forceinline__ void gradient_sums(const BackwardArgs& a, const Walk& w,
                                              const Part& part, const Keep& kept,
                                              const Done& done) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  constexpr int kBatch = kBatchOf < T, kChannelsLast || kSecond > ;
  const bool second = kSecond && a.residual_norm;
  float mean[2][kChannels] = {};
  if (part.in_range) load_channels<kChannelsLast, kVector>(a.stats, w, part, mean[0]);
  if (part.in_range && second)
    load_channels<kChannelsLast, kVector>(a.stats + 2 * w.shape.channels, w, part, mean[1]);
  constexpr int kWanted = kSecond ? kSums : 2;
  Sum sums[kWanted * kChannels];
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> dys[kBatch], xs[kBatch], residuals[kBatch];
    uint32_t bits[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      dys[u] = load_eight<kVector, T>(a.dy, places[u]);
      xs[u] = load_eight<kVector, T>(a.x, places[u]);
      if (second) residuals[u] = load_eight<kVector, T>(a.residual, places[u]);
      bits[u] = 0xff;
      if (a.act != Act::none && places[u].valid) bits[u] = load(a.mask + places[u].mask);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (places[u].valid == 0) continue;
      kept.put(0, i + u, dys[u]);
      kept.put(1, i + u, xs[u]);
      if (second) kept.put(2, i + u, residuals[u]);
    }
    float s[kWanted][kChannels] = {};
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (!exists<kVector>(places[u], k)) continue;
        const int c = kChannelsLast ? k : 0;
        const float raw = dys[u][k], g = bits[u] >> k & 1 ? raw : 0.f;
        s[0][c] += g;
        s[1][c] += g * (xs[u][k] - mean[0][c]);
        if (kSecond && second) {  // a ReLU before the add does not touch the residual's gradient
          const float g2 = a.act == Act::relu_before_add ? raw : g;
          s[2][c] += g2;
          s[3][c] += g2 * (residuals[u][k] - mean[1][c]);
        }
      }
      if (kChannelsLast && u != kBatch - 1) continue;
#pragma unroll
      for (int i = 0; i < kWanted * kChannels; i++) {
        float& part_sum = s[i / kChannels][i % kChannels];
        sums[i].add(part_sum), part_sum = 0;
      }
    }
  });
  reduce_channels<kChannelsLast>(sums, w, part, done);
}

// All sums of channel c are known: the table {mean, scale, slope, offset} of
// dx = scale * g - (offset + slope * (x - mean)); and, if `first`, its parameters' gradients.
template <class T>
__device__ inline void finish_backward(const BackwardArgs& a, const Walk& w, const Tables& tables,
                                       bool first, int which, int64_t c, double sum_g,
                                       double sum_gx) {
  const BackwardNorm& n = a.norm[which];
  const float mean = load(a.stats + 2 * which * w.shape.channels + c);
  const double invstd = load(a.stats + (2 * which + 1) * w.shape.channels + c);
  const double dweight = sum_gx * invstd;
  if (first) {
    store_channel<T>(n.dweight, c, dweight);
    store_channel<T>(n.dbias, c, sum_g);
  }
  store(tables.row(which, 0) + c, mean);
  const double scale = load_channel<T>(n.weight, c, 1) * invstd;
  store(tables.row(which, 1) + c, (float)scale);
  store(tables.row(which, 2) + c, (float)(scale * invstd * dweight / w.count()));
  store(tables.row(which, 3) + c, (float)(scale * sum_g / w.count()));
}

// dx and dresidual of a part
template <class T, bool kChannelsLast, bool kVector, bool kSecond, class Keep>
__device__ __forceinline__ void gradients(const BackwardArgs& a, const Walk& w,
                                          const Tables& tables, const Part& part,
                                          const Keep& kept) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  constexpr int kBatch = kBatchOf < T, kSecond || Keep::kKeeps > ;  // shared memory is near
  if (part.first + part.lane >= part.end) return;
  const bool second = kSecond && a.residual_norm && a.dresidual;
  const bool reads_x = a.dx && a.norm[0].training;
  const bool reads_residual = second && a.norm[1].training;
  float mean[2][kChannels], scale[2][kChannels], slope[2][kChannels], offset[2][kChannels];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (i == 1 && !second) break;
    load_channels<kChannelsLast, kVector>(tables.row(i, 0), w, part, mean[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 1), w, part, scale[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 2), w, part, slope[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 3), w, part, offset[i]);
  }
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> dys[kBatch], xs[kBatch], residuals[kBatch];
    uint32_t bits[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      dys[u] = load_kept<kVector, T>(kept, 0, i + u, a.dy, places[u]);
      if (reads_x) xs[u] = load_kept<kVector, T>(kept, 1, i + u, a.x, places[u]);
      if (reads_residual)
        residuals[u] = load_kept<kVector, T>(kept, 2, i + u, a.residual, places[u]);
      bits[u] = 0xff;
      if (a.act != Act::none && places[u].valid) bits[u] = load(a.mask + places[u].mask);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (places[u].valid == 0) continue;
      float dx[8], dresidual[8];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int c = kChannelsLast ? k : 0;
        const float raw = dys[u][k], g = bits[u] >> k & 1 ? raw : 0.f;
        dx[k] = g * scale[0][c];
        if (reads_x) dx[k] -= offset[0][c] + slope[0][c] * (xs[u][k] - mean[0][c]);
        dresidual[k] = a.act == Act::relu_before_add ? raw : g;
        if (second) dresidual[k] *= scale[1][c];
        if (reads_residual)
          dresidual[k] -= offset[1][c] + slope[1][c] * (residuals[u][k] - mean[1][c]);
      }
      if (a.dx) store_eight<kVector, T>(a.dx, places[u], dx);
      if (a.dresidual) store_eight<kVector, T>(a.dresidual, places[u], dresidual);
    }
  });
}

// as merge_forward
template <class T>
__device__ inline void merge_backward(const BackwardArgs& a, const Walk& w, const Tables& tables,
                                      bool first, int64_t c, int channels) {
  const int lane = threadIdx.x / channels, lanes = kThreads / channels;
  const bool in_range = c < w.shape.channels;
  const int64_t chunks = in_range && a.sums ? w.chunks : 0;
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if (which == 1 && !a.residual_norm) break;
    double sums[2] = {};
    for (int64_t k = lane; k < chunks; k += lanes)
#pragma unroll
      for (int i = 0; i < 2; i++) sums[i] += load(sums_of(w, a.scratch, k, 2 * which + i) + c);
    if (a.sums) reduce(sums, channels);
    if (a.given && in_range)
#pragma unroll
      for (int i = 0; i < 2; i++) sums[i] = load(a.given + (2 * which + i) * w.shape.channels + c);
    if (in_range && lane == 0) finish_backward<T>(a, w, tables, first, which, c, sums[0], sums[1]);
  }
}

template <bool kSecond>
__device__ inline auto kept_sums(const BackwardArgs& a, const Walk& w, const Part& part) {
  double* sums = sums_of(w, a.scratch, part.chunk, 0);
  const int64_t padded = w.padded();
  return [=](int64_t c, const double (&of_channel)[kSums]) {
#pragma unroll
    for (int i = 0; i < (kSecond ? kSums : 2); i++) store(sums + i * padded + c, of_channel[i]);
  };
}

template <class T, bool kChannelsLast, bool kVector, bool kSecond>
__global__ void __launch_bounds__(kThreads, kVector && !kSecond ? 2 : 1)
    bn_act_bwd_sums_kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ Walk w) {
  const Part part(w, false);
  gradient_sums<T, kChannelsLast, kVector, kSecond>(a, w, part, NotKept<T>{},
                                                    kept_sums<kSecond>(a, w, part));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    bn_act_bwd_merge_kernel(const __grid_constant__ BackwardArgs a,
                            const __grid_constant__ Walk w) {
  const int64_t c = (int64_t)blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  merge_backward<T>(a, w, tables_of_all(w, a.scratch), true, c, kMergeChannels);
}

template <class T, bool kChannelsLast, bool kVector, bool kSecond>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    bn_act_bwd_gradients_kernel(const __grid_constant__ BackwardArgs a,
                                const __grid_constant__ Walk w) {
  gradients<T, kChannelsLast, kVector, kSecond>(a, w, tables_of_all(w, a.scratch), Part(w, true),
                                                NotKept<T>{});
}

template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    bn_act_bwd_whole_kernel(const __grid_constant__ BackwardArgs a,
                            const __grid_constant__ Walk w) {
  const Part part(w, false);
  const Tables tables = tables_of_all(w, a.scratch);
  const auto finish = [&](int64_t c, const double (&sums)[kSums]) {
    finish_backward<T>(a, w, tables, true, 0, c, sums[0], sums[1]);
    if (a.residual_norm) finish_backward<T>(a, w, tables, true, 1, c, sums[2], sums[3]);
  };
  const double none[kSums] = {};
  if (a.sums)
    gradient_sums<T, kChannelsLast, kVector, true>(a, w, part, NotKept<T>{}, finish);
  else if (part.lane == 0 && part.in_range)
    for (int k = 0; k < kChannelsOf<kChannelsLast>; k++) {
      const int64_t c = channel_of<kChannelsLast>(part.column) + k;
      if (c < w.shape.channels) finish(c, none);
    }
  __syncthreads();
  if (a.dx || a.dresidual)
    gradients<T, kChannelsLast, kVector, true>(a, w, tables, part, NotKept<T>{});
}

template <class T, bool kChannelsLast, bool kSecond>
__global__ void __launch_bounds__(kThreads, blocks_together(kSecond))
    bn_act_bwd_cooperative_kernel(const __grid_constant__ BackwardArgs a,
                                  const __grid_constant__ Walk w,
                                  const __grid_constant__ Kept<T> kept) {
  const Part part(w, false);
  gradient_sums<T, kChannelsLast, true, kSecond>(a, w, part, kept, kept_sums<kSecond>(a, w, part));
  BARRIER_BEFORE_MERGE();
  const int channels = w.channels_of_block();
  const int64_t c = blockIdx.x % w.column_blocks * channels + threadIdx.x % channels;
  const Tables tables = tables_of_block(w, a.scratch);
  merge_backward<T>(a, w, tables, part.chunk == 0, c, channels);
  __syncthreads();
  if (a.dx || a.dresidual) gradients<T, kChannelsLast, true, kSecond>(a, w, tables, part, kept);
}

// --- launches

inline void bn_act_backward(const BackwardArgs& a, Stream stream) {
  if (!a.sums && !a.dx && !a.dresidual) return;
  const Walk split = split_walk(a.shape);
  const bool vector = split.run % 8 == 0 && aligned(a.dy) && aligned(a.x) && aligned(a.residual) &&
                      aligned(a.dx) && aligned(a.dresidual) && aligned(a.stats);
  const int tensors = 2 + a.residual_norm;
  const Plan plan = a.given ? Plan::split
                            : plan_of(a.plan, a.shape, a.element, a.device, a.residual_norm,
                                      a.sums ? tensors : 0, vector);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    using T = decltype(t);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    constexpr bool kVector = decltype(vector)::value;
    if (plan == Plan::whole) {
      const Walk whole = whole_walk(a.shape);
      return launch("bn_act_bwd_whole", bn_act_bwd_whole_kernel<T, kChannelsLast, kVector>,
                    dim3(whole.blocks()), kThreads, stream, a, whole);
    }
    if constexpr (kVector) {
      if (plan == Plan::cooperative) {
        const Walk together = cooperative_walk(a.shape, a.device, a.residual_norm);
        const Kept<T> kept(kept_bytes(a.device, a.residual_norm), tensors, 7);
        const auto kernel = a.residual_norm
                                ? bn_act_bwd_cooperative_kernel<T, kChannelsLast, true>
                                : bn_act_bwd_cooperative_kernel<T, kChannelsLast, false>;
        const bool launched =
            launch_together("bn_act_bwd_cooperative", kernel, together.blocks(), kThreads,
                            kept.bytes(tensors), stream, a, together, kept);
        if (launched) return;
      }
    }
    const bool second = a.residual_norm || !kVector;
    if (a.sums) {
      const auto sums = second ? bn_act_bwd_sums_kernel<T, kChannelsLast, kVector, true>
                               : bn_act_bwd_sums_kernel<T, kChannelsLast, kVector, !kVector>;
      launch("bn_act_bwd_sums", sums, dim3(split.blocks()), kThreads, stream, a, split);
    }
    launch("bn_act_bwd_merge", bn_act_bwd_merge_kernel<T>,
           dim3(ceil_div(a.shape.channels, kMergeChannels)), kThreads, stream, a, split);
    if (!a.dx && !a.dresidual) return;
    const auto pass = second ? bn_act_bwd_gradients_kernel<T, kChannelsLast, kVector, true>
                             : bn_act_bwd_gradients_kernel<T, kChannelsLast, kVector, !kVector>;
    launch("bn_act_bwd_gradients", pass, dim3(split.blocks()), kThreads, stream, a, split);
  });
}

}  // namespace fused_res::cuda
