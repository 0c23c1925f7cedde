// conv_halo on a CUDA device, on raw pointers: the kernel and its launch. conv_halo_plan.cuh says
// how the work is cut up.
//
// One convolution of few channels, 1x1 or 3x3, that keeps its map's size. Such a one waits for
// memory: an implicit im2col reads each pixel nine times. Here a thread block reads a patch of the
// map, a tile with the pixels around it, once into shared memory, where each of the nine taps is
// the same patch, shifted. All of the weights are there too, for all of the tiles that the block
// goes through; while one is multiplied, the next one's patch is copied.
//
// A block puts the weights in the order of their use itself: from the L2 cache, which all blocks
// share, that takes no longer than the launch of a kernel which would do it for all.
#pragma once
#include "conv_halo_plan.cuh"

namespace fused_res::cuda {

// Four neighbouring elements.
template <class T>
using FourOf = std::conditional_t<sizeof(T) == 2, uint64_t, uint4>;

template <class T>
__device__ __forceinline__ void unpack(const FourOf<T>& words, float (&v)[4]) {
  T four[4];
  memcpy(four, &words, sizeof words);
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = to_float(four[i]);
}
template <class T>
__device__ __forceinline__ FourOf<T> pack(const float (&v)[4]) {
  T four[4];
#pragma unroll
  for (int i = 0; i < 4; i++) from_float(v[i], four[i]);
  FourOf<T> words;
  memcpy(&words, four, sizeof words);
  return words;
}
template <class T>
__device__ __forceinline__ FourOf<T> load_four(const T* p, bool vector, int count) {
  if (vector) return load((const FourOf<T>*)p);
  T four[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count) four[i] = load(p + i);
  FourOf<T> words;
  memcpy(&words, four, sizeof words);
  return words;
}
template <class T>
__device__ __forceinline__ void store_four(T* p, const FourOf<T>& words, bool vector, int count) {
  if (vector) return store((FourOf<T>*)p, words);
  T four[4];
  memcpy(four, &words, sizeof words);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count) store(p + i, four[i]);
}

// A product's column c is this channel out of its 16, so that what a lane has of a pixel, columns
// 2 (l % 4) and 8 on, are four neighbours, and four lanes write a sector of 32 bytes.
__device__ inline int channel_of(int column) {
  return column % 8 / 2 * 4 + column / 8 * 2 + column % 2;
}

// Places of a table: image, row and column in a tile or its patch, which have fewer than 1024 each.
struct Place {
  int g, r, c;
  __device__ explicit Place(uint32_t word) : g(word >> 20), r(word >> 10 & 1023), c(word & 1023) {}
};
__device__ inline void write_places(char* table, int pixels, int height, int width) {
  for (int i = threadIdx.x; i < pixels; i += kHaloThreads) {
    const int row = i / width;
    const uint32_t word = row / height << 20 | row % height << 10 | (i - row * width);
    store_shared(table + i * 4, word);
  }
}

// Where a tile begins: its first image, row and column.
struct Origin {
  int64_t n;
  int h, w;
  __device__ Origin(const HaloArgs& a, int tile)
      : n((int64_t)(tile / a.across / a.down) * a.group),
        h(tile / a.across % a.down * a.tile_height), w(tile % a.across * a.tile_width) {}
};

// The weights, as multiply_steps takes them: [tap][step of channels in][16 channels out][lane].
template <class Products>
__device__ inline void write_weights(const HaloArgs& a, char* memory) {
  using T = typename Products::T;
  constexpr int kInWord = 4 / sizeof(T);
  const int size = a.conv.size, count = size * size * a.steps * a.tiles * kWarp;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kHaloThreads) {
    const int tile = i / kWarp % a.tiles, place = i / kWarp / a.tiles;
    const int tap = place / a.steps, in_step = place % a.steps;
    const T* of_tap = (const T*)a.weight + tap / size * a.row_stride + tap % size * a.column_stride;
    uint32_t words[4] = {};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const Source source = Products::source(i % kWarp, w * kInWord);
      const int in = in_step * Products::kStep + source.in;
      const int k = tile * kTile + channel_of(source.out);
      if (k >= a.conv.out_channels) continue;
      const T* from = of_tap + k * a.out_stride + in * a.in_stride;
      if (kInWord == 2 && a.pairs) {
        if (in < a.conv.channels) words[w] = load((const uint32_t*)from);
        continue;
      }
      T values[kInWord] = {};
#pragma unroll
      for (int v = 0; v < kInWord; v++)
        if (in + v < a.conv.channels)
          from_float(Products::weight(to_float(load(from + v * a.in_stride))), values[v]);
      memcpy(&words[w], values, 4);
    }
    store_shared(memory + i * 16, uint4{words[0], words[1], words[2], words[3]});
  }
}

// Starts to copy a tile's patch. Pixels outside of the map are zeros.
template <class T>
__device__ inline void copy_patch(const HaloArgs& a, const char* memory, char* stage, int tile) {
  const Origin origin(a, tile);
  const auto each = [&](auto value) {
    using V = decltype(value);
    const V* x = (const V*)a.x;
    const int pieces = a.conv.channels * (int)sizeof(T) / (int)sizeof(V);
    int pixel = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    while (pixel < a.patch_pixels) {
      const Place place(load_shared<uint32_t>(memory + a.places + pixel * 4));
      char* to = stage + a.patch.at(place.g, place.r, place.c) + piece * (int)sizeof(V);
      const int64_t n = origin.n + place.g;
      const int h = origin.h + place.r - a.halo, w = origin.w + place.c - a.halo;
      if (n >= a.conv.images || (unsigned)h >= (unsigned)a.conv.height ||
          (unsigned)w >= (unsigned)a.conv.width) {
        store_shared(to, V{});
      } else {
        const V* from = x + ((n * a.conv.height + h) * a.conv.width + w) * pieces + piece;
        if constexpr (sizeof(V) == 16)
          start_copy(to, (const char*)from);
        else
          store_shared(to, load(from));
      }
      pixel += kHaloThreads / pieces, piece += kHaloThreads % pieces;
      if (piece >= pieces) piece -= pieces, pixel++;
    }
  };
  if (a.vector)
    each(uint4{});
  else
    each(T{});
}

// A lane's sums over all tiles, of its four channels in each of kColumns tiles of channels.
// statistics: of deviations from the first value, their squares, and that value. gradient: of y,
// and of y times the deviation.
template <Epilogue kEpilogue>
struct LaneSums {
  float first[kColumns][4] = {}, second[kColumns][4] = {}, origin[kColumns][4] = {};
  int seen = 0;
};
template <>
struct LaneSums<Epilogue::affine> {};

// Of two parts' values the mean and the sum of squared deviations, by the method of Chan, Golub and
// LeVeque (1979).
__device__ inline void merge_moments(double (&a)[3], const double (&b)[3]) {
  if (b[2] == 0) return;
  const double n = a[2] + b[2], delta = b[0] - a[0], share = b[2] / n;
  a[1] += b[1] + delta * delta * a[2] * share;
  a[0] += delta * share;
  a[2] = n;
}

// The block's sums, from its lanes' in a fixed order, by way of the stages, which are free now.
template <Epilogue kEpilogue>
__device__ inline void write_sums(const HaloArgs& a, char* memory, const LaneSums<kEpilogue>& sums,
                                  int row, int rows, int column) {
  constexpr int kSums = kSumsOf[(int)kEpilogue];
  const int lane = threadIdx.x % kWarp, padded = a.tiles * kTile, slots = rows * 8;
  const auto slot_of = [&](int channel, int slot) {
    return memory + a.first_stage + (slot * padded + channel) * kSums * 4;
  };
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    const int tile = column + j * a.warps;
    if (tile >= a.tiles) continue;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      char* to = slot_of(tile * kTile + lane % 4 * 4 + t, row * 8 + lane / 4);
      float first = sums.first[j][t], second = sums.second[j][t];
      if constexpr (kEpilogue == Epilogue::statistics) {
        const float off = sums.seen ? first / sums.seen : 0;
        second -= off * first;
        first = sums.origin[j][t] + off;
        second = second < 0 ? 0 : second;  // NaN stays
        store_shared(to + 8, (float)sums.seen);
      }
      store_shared(to, first);
      store_shared(to + 4, second);
    }
  }
  // A channel has several threads, of which the first merges what they have merged.
  constexpr int kMergers = 4;
  const int each = slots / kMergers;
  const auto merge = [&](int channel, int first, int step, int count) {
    double total[kSums], part[kSums];  // rounded once
    for (int i = 0; i < count; i++) {
      const char* from = slot_of(channel, first + i * step);
#pragma unroll
      for (int s = 0; s < kSums; s++) part[s] = load_shared<float>(from + s * 4);
      if (i == 0) {
        memcpy(total, part, sizeof total);
      } else if constexpr (kEpilogue == Epilogue::statistics) {
        merge_moments(total, part);
      } else {
        total[0] += part[0], total[1] += part[1];
      }
    }
    char* to = slot_of(channel, first);
#pragma unroll
    for (int s = 0; s < kSums; s++) store_shared(to + s * 4, (float)total[s]);
  };
  const int channel = threadIdx.x % padded, thread = threadIdx.x / padded;
  SYNC_BEFORE_REDUCTION();
  if (thread < kMergers) merge(channel, thread * each, 1, each);
  __syncthreads();
  if (thread > 0 || channel >= a.conv.out_channels) return;
  merge(channel, 0, each, kMergers);
#pragma unroll
  for (int s = 0; s < kSums; s++)
    store(a.partial + ((int64_t)blockIdx.x * kSums + s) * a.conv.out_channels + channel,
          load_shared<float>(slot_of(channel, 0) + s * 4));
}

// Which pixels of the tensor a lane has of a tile; -1: there is none.
template <int kRows>
__device__ __forceinline__ void find_pixels(const HaloArgs& a, const char* memory, int tile,
                                            int first_tile, int rows, int64_t (&pixel)[kRows][2]) {
  const int lane = threadIdx.x % kWarp;
  const Origin origin(a, tile);
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int p = 0; p < 2; p++) {
      const int m = (first_tile + i * rows) * kTile + lane / 4 + 8 * p;
      pixel[i][p] = -1;
      if (m >= a.pixels) continue;
      const Place place(load_shared<uint32_t>(memory + a.spots + m * 4));
      const int64_t n = origin.n + place.g;
      const int h = origin.h + place.r, w = origin.w + place.c;
      if (n < a.conv.images && h < a.conv.height && w < a.conv.width)
        pixel[i][p] = (n * a.conv.height + h) * a.conv.width + w;
    }
}

// Rows of the table of channels: scale and shift; gradient: mean, centre, scale, shift.
template <Epilogue kEpilogue>
constexpr int kTableRows = kEpilogue == Epilogue::gradient ? 4 : 2;

// The t-th of a lane's four channels of a pixel, from its sum v.
template <Epilogue kEpilogue>
__device__ __forceinline__ float epilogue_of(int act, float v, float other, int t,
                                             const float (&table)[kTableRows<kEpilogue>][4]) {
  if constexpr (kEpilogue == Epilogue::gradient) {
    const bool stopped = (other - table[1][t]) * table[2][t] + table[3][t] <= 0;
    return stopped ? 0 : v;  // NaN passes
  } else {
    v = fmaf(v, table[0][t], table[1][t]);
    if constexpr (kEpilogue == Epilogue::affine) {
      if (act == 2) v = relu(v);
      v += other;
      if (act == 1) v = relu(v);
    }
    return v;
  }
}

// Adds four channels of a pixel, as they are rounded, to a lane's sums.
template <Epilogue kEpilogue>
__device__ __forceinline__ void add_to_sums(LaneSums<kEpilogue>& sums, int j, bool first,
                                            const float (&v)[4], const float (&other)[4],
                                            const float (&mean)[4]) {
  constexpr bool kStatistics = kEpilogue == Epilogue::statistics;
#pragma unroll
  for (int t = 0; t < 4; t++) {
    float& at = sums.origin[j][t];
    if (kStatistics && first) at = v[t];
    const float off = kStatistics ? v[t] - at : v[t];
    sums.first[j][t] += off;
    sums.second[j][t] += off * (kStatistics ? off : other[t] - mean[t]);
  }
}

// Four of a lane's channels of all its pixels to y: column j of its tiles of channels, from k on.
template <class T, Epilogue kEpilogue, int kRows>
__device__ __forceinline__ void finish_column(const HaloArgs& a, const char* memory, int j, int k,
                                              const int64_t (&pixel)[kRows][2],
                                              Sums (&sums)[kRows][kColumns],
                                              LaneSums<kEpilogue>& lane_sums) {
  const int channels = a.conv.out_channels, count = channels - k;
  int seen = 0;
  if constexpr (kEpilogue != Epilogue::affine) seen = lane_sums.seen;
  const bool reads = kEpilogue != Epilogue::statistics && a.residual;
  // loaded all at once, so there is one wait for all
  FourOf<T> others[kRows][2];
  if (reads)
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int p = 0; p < 2; p++)
        if (pixel[i][p] >= 0)
          others[i][p] =
              load_four((const T*)a.residual + pixel[i][p] * channels + k, a.out_vector, count);
  float table[kTableRows<kEpilogue>][4];
#pragma unroll
  for (int t = 0; t < kTableRows<kEpilogue>; t++) {
    const auto words = load_shared<uint4>(memory + a.table + (t * a.tiles * kTile + k) * 4);
    memcpy(table[t], &words, 16);
  }
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int p = 0; p < 2; p++) {
      if (pixel[i][p] < 0) continue;
      float v[4], other[4] = {};
      if (reads) unpack<T>(others[i][p], other);
#pragma unroll
      for (int t = 0; t < 4; t++)
        v[t] =
            epilogue_of<kEpilogue>(a.act, sums[i][j].v[t / 2][2 * p + t % 2], other[t], t, table);
      const FourOf<T> words = pack<T>(v);
      if constexpr (kEpilogue != Epilogue::affine) {
        unpack<T>(words, v);
        add_to_sums<kEpilogue>(lane_sums, j, seen == 0, v, other, table[0]);
        seen++;
      }
      store_four((T*)a.y + pixel[i][p] * channels + k, words, a.out_vector, count);
    }
  if constexpr (kEpilogue != Epilogue::affine)
    if (j + 1 == kColumns || count <= a.warps * kTile) lane_sums.seen = seen;
}

// A tile's sums to y.
template <class T, Epilogue kEpilogue, int kRows>
__device__ __forceinline__ void finish_tile(const HaloArgs& a, const char* memory, int tile,
                                            Sums (&sums)[kRows][kColumns],
                                            LaneSums<kEpilogue>& lane_sums, int first_tile,
                                            int rows, int column) {
  int64_t pixel[kRows][2];
  find_pixels<kRows>(a, memory, tile, first_tile, rows, pixel);
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    const int k = (column + j * a.warps) * kTile + threadIdx.x % kWarp % 4 * 4;
    if (k < a.conv.out_channels)  // of a tile past the last one not
      finish_column<T, kEpilogue, kRows>(a, memory, j, k, pixel, sums, lane_sums);
  }
}

// Writes to shared memory before the first tile: places, and zeros where no patch
// writes.
template <class T>
__device__ __forceinline__ void prepare_memory(const HaloArgs& a, char* memory) {
  write_places(memory + a.places, a.patch_pixels, a.tile_height + 2 * a.halo,
               a.tile_width + 2 * a.halo);
  write_places(memory + a.spots, a.pixels, a.tile_height, a.tile_width);
  if (a.conv.channels * (int)sizeof(T) < a.steps * kStepBytes)
    for (int i = threadIdx.x * 16; i < a.stages * a.stage_bytes; i += kHaloThreads * 16)
      store_shared(memory + a.first_stage + i, uint4{0, 0, 0, 0});
}

template <class T, Epilogue kEpilogue>
__device__ __forceinline__ void write_table(const HaloArgs& a, char* memory) {
  for (int k = threadIdx.x; k < a.tiles * kTile; k += kHaloThreads) {
    const bool exists = k < a.conv.out_channels;
    const auto write = [&](int row, float value) {
      store_shared(memory + a.table + (row * a.tiles * kTile + k) * 4, value);
    };
    if constexpr (kEpilogue == Epilogue::gradient) {
      constexpr int kStats[] = {0, 2, 3, 4};  // mean, centre, scale, shift
#pragma unroll
      for (int row = 0; row < 4; row++)
        write(row, exists ? load(a.stats + kStats[row] * a.conv.out_channels + k) : 0);
    } else {
      const Affine affine = exists ? affine_of<T>(a.values, k) : Affine{0, 0};
      write(0, affine.scale), write(1, affine.shift);
    }
  }
}

// Where in a patch a lane's operands of the products start. Of a pixel past the last: the last
// again, which is stored nowhere.
template <class Products, int kRows>
__device__ __forceinline__ void find_operands(const HaloArgs& a, const char* memory, int first_tile,
                                              int rows, int (&from)[kRows][Products::kPointers]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int p = 0; p < Products::kPointers; p++) {
      const Start start = Products::start(lane, p);
      const int m = (first_tile + i * rows) * kTile + start.pixel;
      const int spot = (m < a.pixels ? m : a.pixels - 1) * 4;
      const Place place(load_shared<uint32_t>(memory + a.spots + spot));
      from[i][p] = a.patch.at(place.g, place.r + a.halo, place.c + a.halo) + start.byte;
    }
}

template <class Products, int kRows, Epilogue kEpilogue>
__device__ __forceinline__ void run_halo(const HaloArgs& a) {
  using T = typename Products::T;
  DYNAMIC_SHARED(uint4, words);
  char* const memory = (char*)&words[0];
  const int warp = threadIdx.x / kWarp;
  const int column = warp % a.warps, first_tile = warp / a.warps, rows = kHaloWarps / a.warps;
  const int all = (a.pixels + kTile - 1) / kTile, used = (all - first_tile + rows - 1) / rows;
  const bool wide = column + a.warps < a.tiles;

  prepare_memory<T>(a, memory);
  __syncthreads();
  copy_patch<T>(a, memory, memory + a.first_stage, blockIdx.x);
  end_copies();
  write_weights<Products>(a, memory);
  write_table<T, kEpilogue>(a, memory);
  int from[kRows][Products::kPointers];
  find_operands<Products, kRows>(a, memory, first_tile, rows, from);
  const int stride = a.tiles * kWeightBytes, taps = a.conv.size * a.conv.size;
  const char* const columns[kColumns] = {memory + column * kWeightBytes,
                                         memory + (column + a.warps) * kWeightBytes};
  LaneSums<kEpilogue> lane_sums;
  int stage = 0;
  for (int tile = blockIdx.x; tile < a.count; tile += gridDim.x) {
    // From here on this tile's patch is there, and all are done with the one before.
    WAIT_FOR_CHUNK(0);
    SYNC_BEFORE_CHUNK();
    char* const patch = memory + a.first_stage + stage * a.stage_bytes;
    const int next = tile + gridDim.x;
    const auto copy_next = [&] {
      stage = (stage + 1) % a.stages;
      if (next < a.count)
        copy_patch<T>(a, memory, memory + a.first_stage + stage * a.stage_bytes, next);
      end_copies();
      SYNC_LANES();  // which copied more or less
    };
    if (a.stages == 2) copy_next();
    const char* pixels[kRows][Products::kPointers];
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int p = 0; p < Products::kPointers; p++) pixels[i][p] = patch + from[i][p];
    Sums sums[kRows][kColumns] = {};
    Taps of_conv(taps, a.steps, a.patch.pitch, a.patch.row);
    multiply_chunk<Products>(sums, pixels, of_conv, columns, stride, taps * a.steps, used, wide);
    if (a.stages == 1) {
      __syncthreads();
      copy_next();
    }
    finish_tile<T, kEpilogue>(a, memory, tile, sums, lane_sums, first_tile, rows, column);
  }
  if constexpr (kEpilogue != Epilogue::affine) {
    __syncthreads();
    write_sums<kEpilogue>(a, memory, lane_sums, first_tile, rows, column);
  }
}

template <class Products, int kRows, Epilogue kEpilogue>
__global__ void __launch_bounds__(kHaloThreads, blocks_together<Products>(kRows))
    conv_halo_fwd_bwd_kernel(const __grid_constant__ HaloArgs args) {
  if constexpr (kHasMma) run_halo<Products, kRows, kEpilogue>(args);
}

// --- launches

inline void conv_halo(Kind kind, Epilogue epilogue, const HaloPlan& plan, const HaloCall& call,
                      Stream stream) {
  HaloArgs args = plan.args;
  (HaloCall&)args = call;
  const auto aligned = [](const void* p) { return (uintptr_t)p % 16 == 0; };
  args.vector &= aligned(args.x);
  args.out_vector = args.conv.out_channels % 4 == 0 && aligned(args.y) && aligned(args.residual);
  args.pairs = args.in_stride == 1 && args.conv.channels % 2 == 0 &&
               (uintptr_t)args.weight % 4 == 0 && args.out_stride % 2 == 0 &&
               (args.conv.size == 1 || (args.row_stride % 2 == 0 && args.column_stride % 2 == 0));
  const auto with_epilogue = [&](auto products, auto rows) {
    using Products = decltype(products);
    const auto kernel = epilogue == Epilogue::affine
                            ? conv_halo_fwd_bwd_kernel<Products, rows, Epilogue::affine>
                        : epilogue == Epilogue::statistics
                            ? conv_halo_fwd_bwd_kernel<Products, rows, Epilogue::statistics>
                            : conv_halo_fwd_bwd_kernel<Products, rows, Epilogue::gradient>;
    launch_clusters("conv_halo", kernel, plan.blocks, 1, kHaloThreads, plan.shared_bytes, stream,
                    args);
  };
  const auto with = [&](auto products) {
    if (plan.rows == 2) return with_epilogue(products, std::integral_constant<int, 2>{});
    with_epilogue(products, std::integral_constant<int, decltype(products)::kMostRows>{});
  };
  if (kind == Kind::bf16) return with(HalfProducts<bf16>{});
  if (kind == Kind::fp16) return with(HalfProducts<fp16>{});
  if (kind == Kind::tf32) return with(Tf32Products{});
  with(ExactProducts{});
}

}  // namespace fused_res::cuda
