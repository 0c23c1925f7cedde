// conv_halo on a CUDA device, on raw pointers: the kernel, how the work is cut up, the launch.
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
#include "convolution.cuh"

namespace fused_res::cuda {

constexpr int kHaloThreads = 256, kHaloWarps = kHaloThreads / kWarp;
constexpr int kMostHaloChannels = 64;
constexpr int kMostTilePixels = kHaloWarps * 4 * kTile;  // four products a warp

// What a tile ends with.
// affine: y = act(sums * scale + shift [+ residual]).
// statistics: y = sums + bias, and of each block its mean, sum of squared deviations and number of
// values by channel, of y as it is rounded: what a BatchNorm in training wants.
// gradient: y = sums where a BatchNorm and ReLU of `residual` let it through, else 0; and of each
// block the sums of y and of y * (residual - mean).
enum class End : int { affine, statistics, gradient };
constexpr int kSumsOf[] = {0, 3, 2};  // by channel

struct HaloConv {
  int64_t images;
  int height, width, channels, out_channels, size;  // size: 1 or 3, of the kernel
};

// A map of patches in shared memory, channels_last. As in a chain's maps (res_chain_kernels.cuh) a
// pixel's pitch is an odd number of 16 bytes and all other gaps are multiples of 128: the m-th
// pixel of a tile starts m pitches on, but for multiples of 128, so that the 8 pixels that
// load_matrices reads at a time are in different banks, whatever rows and images they are of.
struct Patch {
  int pitch, row, image;  // bytes from a pixel, a row, an image to the next
  __host__ __device__ int at(int g, int r, int c) const { return g * image + r * row + c * pitch; }
};

// A call's tensors: x, residual and y are channels_last.
struct HaloCall {
  const void *x, *weight, *residual;
  void* y;
  int64_t out_stride, in_stride, row_stride, column_stride;  // of the weight
  ChannelValues values;
  const float* stats;  // of bn_act, (5, C): gradient alone
  float* partial;      // (blocks, kSumsOf, out channels)
  int act;
};

struct HaloArgs : HaloCall {
  bool vector, out_vector, pairs;  // of x, of residual and y, of weights: several at a time
  HaloConv conv;
  int halo, steps, tiles, warps;                  // as of a chain's Step
  int group, tile_height, tile_width;             // images, rows and columns of a tile
  int pixels, patch_pixels, down, across, count;  // of one tile; tiles of a map; tiles of all
  Patch patch;
  int stages, stage_bytes;
  int table, places, spots, first_stage;  // of shared memory, after the weights
};

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

// Starts to copy a tile's patch. What is outside of the map is zeros.
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
template <End kEnd>
struct LaneSums {
  float first[kColumns][4] = {}, second[kColumns][4] = {}, origin[kColumns][4] = {};
  int seen = 0;
};
template <>
struct LaneSums<End::affine> {};

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
template <End kEnd>
__device__ inline void write_sums(const HaloArgs& a, char* memory, const LaneSums<kEnd>& sums,
                                  int row, int rows, int column) {
  constexpr int kSums = kSumsOf[(int)kEnd];
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
      if constexpr (kEnd == End::statistics) {
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
      } else if constexpr (kEnd == End::statistics) {
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

// A tile's sums to y.
template <class T, End kEnd, int kRows>
__device__ __forceinline__ void finish_tile(const HaloArgs& a, const char* memory, int tile,
                                            Sums (&sums)[kRows][kColumns],
                                            LaneSums<kEnd>& lane_sums, int first_tile, int rows,
                                            int column) {
  const int lane = threadIdx.x % kWarp, channels = a.conv.out_channels;
  const Origin origin(a, tile);
  int64_t pixel[kRows][2];  // of the tensor; -1: there is none
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
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    const int k = (column + j * a.warps) * kTile + lane % 4 * 4, count = channels - k;
    if (count <= 0) continue;  // of a tile past the last one too
    int seen = 0;
    if constexpr (kEnd != End::affine) seen = lane_sums.seen;
    // all at once: what comes after waits for them once
    FourOf<T> others[kRows][2];
    if (kEnd != End::statistics && a.residual)
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int p = 0; p < 2; p++)
          if (pixel[i][p] >= 0)
            others[i][p] =
                load_four((const T*)a.residual + pixel[i][p] * channels + k, a.out_vector, count);
    // scale and shift; gradient: mean, centre, scale, shift
    constexpr int kTable = kEnd == End::gradient ? 4 : 2;
    float table[kTable][4];
#pragma unroll
    for (int t = 0; t < kTable; t++) {
      const auto words = load_shared<uint4>(memory + a.table + (t * a.tiles * kTile + k) * 4);
      memcpy(table[t], &words, 16);
    }
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int p = 0; p < 2; p++) {
        if (pixel[i][p] < 0) continue;
        float v[4], other[4] = {};
        if (kEnd != End::statistics && a.residual) unpack<T>(others[i][p], other);
#pragma unroll
        for (int t = 0; t < 4; t++) {
          v[t] = sums[i][j].v[t / 2][2 * p + t % 2];
          if constexpr (kEnd == End::gradient) {
            const bool stopped = (other[t] - table[1][t]) * table[2][t] + table[3][t] <= 0;
            if (stopped) v[t] = 0;  // NaN passes
          } else {
            v[t] = fmaf(v[t], table[0][t], table[1][t]);
          }
          if constexpr (kEnd == End::affine) {
            if (a.act == 2) v[t] = relu(v[t]);
            v[t] += other[t];
            if (a.act == 1) v[t] = relu(v[t]);
          }
        }
        const FourOf<T> words = pack<T>(v);
        if constexpr (kEnd != End::affine) {
          unpack<T>(words, v);  // as it is rounded
#pragma unroll
          for (int t = 0; t < 4; t++) {
            float& at = lane_sums.origin[j][t];
            if (kEnd == End::statistics && seen == 0) at = v[t];
            const float off = kEnd == End::statistics ? v[t] - at : v[t];
            lane_sums.first[j][t] += off;
            lane_sums.second[j][t] +=
                off * (kEnd == End::statistics ? off : other[t] - table[0][t]);
          }
          seen++;
        }
        store_four((T*)a.y + pixel[i][p] * channels + k, words, a.out_vector, count);
      }
    if constexpr (kEnd != End::affine)
      if (j + 1 == kColumns || count <= a.warps * kTile) lane_sums.seen = seen;
  }
}

template <class Products, int kRows, End kEnd>
__device__ __forceinline__ void run_halo(const HaloArgs& a) {
  using T = typename Products::T;
  DYNAMIC_SHARED(uint4, words);
  char* const memory = (char*)&words[0];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = warp % a.warps, first_tile = warp / a.warps, rows = kHaloWarps / a.warps;
  const int all = (a.pixels + kTile - 1) / kTile, used = (all - first_tile + rows - 1) / rows;
  const bool wide = column + a.warps < a.tiles;

  write_places(memory + a.places, a.patch_pixels, a.tile_height + 2 * a.halo,
               a.tile_width + 2 * a.halo);
  write_places(memory + a.spots, a.pixels, a.tile_height, a.tile_width);
  if (a.conv.channels * (int)sizeof(T) < a.steps * kStepBytes)  // which nothing else writes
    for (int i = threadIdx.x * 16; i < a.stages * a.stage_bytes; i += kHaloThreads * 16)
      store_shared(memory + a.first_stage + i, uint4{0, 0, 0, 0});
  __syncthreads();
  copy_patch<T>(a, memory, memory + a.first_stage, blockIdx.x);
  end_copies();
  write_weights<Products>(a, memory);
  for (int k = threadIdx.x; k < a.tiles * kTile; k += kHaloThreads) {
    const bool exists = k < a.conv.out_channels;
    const auto write = [&](int row, float value) {
      store_shared(memory + a.table + (row * a.tiles * kTile + k) * 4, value);
    };
    if constexpr (kEnd == End::gradient) {
      constexpr int kStats[] = {0, 2, 3, 4};  // mean, centre, scale, shift
#pragma unroll
      for (int row = 0; row < 4; row++)
        write(row, exists ? load(a.stats + kStats[row] * a.conv.out_channels + k) : 0);
    } else {
      const Affine affine = exists ? affine_of<T>(a.values, k) : Affine{0, 0};
      write(0, affine.scale), write(1, affine.shift);
    }
  }

  int from[kRows][Products::kPointers];  // a pixel past the last: the last again, stored nowhere
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
  const int stride = a.tiles * kWeightBytes, taps = a.conv.size * a.conv.size;
  const char* const columns[kColumns] = {memory + column * kWeightBytes,
                                         memory + (column + a.warps) * kWeightBytes};
  LaneSums<kEnd> lane_sums;
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
      __syncwarp();  // lanes copied more or less
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
    finish_tile<T, kEnd>(a, memory, tile, sums, lane_sums, first_tile, rows, column);
  }
  if constexpr (kEnd != End::affine) {
    __syncthreads();
    write_sums<kEnd>(a, memory, lane_sums, first_tile, rows, column);
  }
}

// Blocks that a multiprocessor's registers are for. A warp with more pixels reads its weights for
// more of them; with fewer, two blocks hide each other's latencies.
template <class Products>
constexpr int blocks_together(int rows) {
  return std::is_same_v<Products, ExactProducts> || rows > 2 ? 1 : 2;
}

template <class Products, int kRows, End kEnd>
__global__ void __launch_bounds__(kHaloThreads, blocks_together<Products>(kRows))
    conv_halo_kernel(const __grid_constant__ HaloArgs args) {
  if constexpr (kHasMma) run_halo<Products, kRows, kEnd>(args);
}

// --- the plan

// What a plan has to know of a device.
struct HaloDevice {
  int multiprocessors;
  int shared_bytes;          // that a block may have
  int multiprocessor_bytes;  // of shared memory
};

struct HaloPlan {
  bool fits;
  HaloArgs args;  // less the call and what depends on it
  int blocks, rows, shared_bytes;
};

// Tiles are cut, and buffered once or twice, as takes the least time by a count of cycles: a warp
// reads 16 pixels or channels' weights in 4 of shared memory's and multiplies them in 4 of the
// tensor cores' (sm_80; without them 16); global memory has 16 bytes a cycle and multiprocessor.
// Estimates: no GPU has run this yet.
constexpr int kSharedBytesPerCycle = 128, kGlobalBytesPerCycle = 16;
constexpr double kHidden = 0.75;
constexpr int kCyclesOfTile = 1500;   // latencies: of the barrier, of the first loads, of the end
constexpr int kReservedBytes = 1024;  // of a block's shared memory

inline HaloPlan plan_halo(Kind kind, HaloConv conv, End end, int residuals,
                          const HaloDevice& device) {
  HaloPlan best{};
  const int64_t pixels = conv.images * conv.height * conv.width;
  const auto takes = [](int channels) { return channels > 0 && channels <= kMostHaloChannels; };
  if (pixels == 0 || pixels >= INT32_MAX - kMostTilePixels || !takes(conv.channels) ||
      !takes(conv.out_channels))
    return best;
  if (conv.size == 1) conv.width = (int)pixels, conv.images = conv.height = 1;
  const int bytes = element_bytes(kind), taps = conv.size * conv.size;
  HaloArgs a{};
  a.conv = conv;
  a.halo = conv.size / 2;
  a.steps = round_up(conv.channels, kTile) * bytes / kStepBytes;
  a.tiles = round_up(conv.out_channels, kTile) / kTile;
  a.warps = a.tiles > kColumns ? 2 : 1;
  a.vector = conv.channels * bytes % 16 == 0;
  const int rows = kHaloWarps / a.warps, padded = a.tiles * kTile;
  const int most_rows = kind == Kind::exact ? ExactProducts::kMostRows : 4;
  a.table = taps * a.steps * a.tiles * kWeightBytes;
  a.places = a.table + 4 * padded * (int)sizeof(float);
  a.patch.pitch = a.steps * kStepBytes + 16 + kPlantedPitch;
  const int columns = smaller(kColumns, a.tiles);

  double least = 0;
  const auto consider = [&](int group, int height, int width) {
    a.group = group, a.tile_height = height, a.tile_width = width;
    a.pixels = group * height * width;
    a.down = ceil_div(conv.height, height), a.across = ceil_div(conv.width, width);
    a.count = ceil_div(conv.images, group) * a.down * a.across;
    a.patch_pixels = group * (height + 2 * a.halo) * (width + 2 * a.halo);
    a.patch.row = width * a.patch.pitch + round_up(2 * a.halo * a.patch.pitch, 128);
    a.patch.image = height * a.patch.row + round_up(2 * a.halo * a.patch.row, 128);
    a.stage_bytes = round_up(group * a.patch.image, 128);
    a.spots = a.places + a.patch_pixels * 4;
    a.first_stage = round_up(a.spots + a.pixels * 4, 128);
    const int of_warp = ceil_div(ceil_div(a.pixels, kTile), rows);
    const int used = of_warp == 3 ? 4 : of_warp;
    const int reads = (used + columns) * kWeightBytes / kSharedBytesPerCycle;
    const int products = used * columns * (kind == Kind::exact ? 16 : 4);
    const double multiply =
        (double)taps * a.steps * kHaloWarps * (reads > products ? reads : products);
    const int64_t global = (int64_t)a.patch_pixels * conv.channels +
                           (int64_t)a.pixels * conv.out_channels * (1 + residuals);
    for (a.stages = 2; a.stages > 0; a.stages--) {
      const int sums = kSumsOf[(int)end] * rows * 8 * padded * 4;
      const int stages = a.stages * a.stage_bytes;
      const int shared = a.first_stage + (stages > sums ? stages : sums);
      if (shared > device.shared_bytes) continue;
      const double move = (double)global * bytes / kGlobalBytesPerCycle;
      const double hidden = multiply < move ? multiply : move;  // by the other, mostly
      const double tile = multiply + move - (a.stages == 2 ? kHidden * hidden : 0);
      const bool two = kind != Kind::exact && of_warp <= 2 &&
                       2 * (shared + kReservedBytes) <= device.multiprocessor_bytes;
      const int64_t blocks = (two ? 2 : 1) * (int64_t)device.multiprocessors;
      const double time = ceil_div(a.count, blocks) * ((two ? 2 : 1) * tile + kCyclesOfTile);
      if (best.fits && time >= least) continue;
      least = time;
      best.fits = true, best.args = a, best.shared_bytes = shared;
      best.blocks = smaller(a.count, blocks), best.rows = of_warp > 2 ? 4 : 2;
    }
  };
  for (int of_warp = 1; of_warp <= most_rows; of_warp *= 2) {
    const int most = of_warp * rows * kTile;
    if (conv.size == 1) {
      consider(1, 1, (int)smaller(most, conv.width));
      continue;
    }
    if (conv.height * (int64_t)conv.width <= most)
      for (int group = smaller(conv.images, most / (conv.height * conv.width)); group; group /= 2)
        consider(group, conv.height, conv.width);
    // Bands of columns of about the same width, as high as may be, of about the same height.
    for (int across = ceil_div(conv.width, most); across <= conv.width;) {
      const int width = ceil_div(conv.width, across);
      const int down = ceil_div(conv.height, smaller(conv.height, most / width));
      consider(1, ceil_div(conv.height, down), width);
      if (width < 4) break;
      across = ceil_div(conv.width, width - 1);
    }
  }
  return best;
}

// --- launches

inline void conv_halo(Kind kind, End end, const HaloPlan& plan, const HaloCall& call,
                      Stream stream) {
  HaloArgs args = plan.args;
  (HaloCall&)args = call;
  const auto aligned = [](const void* p) { return (uintptr_t)p % 16 == 0; };
  args.vector &= aligned(args.x);
  args.out_vector = args.conv.out_channels % 4 == 0 && aligned(args.y) && aligned(args.residual);
  args.pairs = args.in_stride == 1 && args.conv.channels % 2 == 0 &&
               (uintptr_t)args.weight % 4 == 0 && args.out_stride % 2 == 0 &&
               (args.conv.size == 1 || (args.row_stride % 2 == 0 && args.column_stride % 2 == 0));
  const auto with_end = [&](auto products, auto rows) {
    using Products = decltype(products);
    const auto kernel = end == End::affine       ? conv_halo_kernel<Products, rows, End::affine>
                        : end == End::statistics ? conv_halo_kernel<Products, rows, End::statistics>
                                                 : conv_halo_kernel<Products, rows, End::gradient>;
    launch_clusters("conv_halo", kernel, plan.blocks, 1, kHaloThreads, plan.shared_bytes, stream,
                    args);
  };
  const auto with = [&](auto products) {
    if (plan.rows == 2) return with_end(products, std::integral_constant<int, 2>{});
    with_end(products, std::integral_constant<int, decltype(products)::kMostRows>{});
  };
  if (kind == Kind::bf16) return with(HalfProducts<bf16>{});
  if (kind == Kind::fp16) return with(HalfProducts<fp16>{});
  if (kind == Kind::tf32) return with(Tf32Products{});
  with(ExactProducts{});
}

}  // namespace fused_res::cuda
