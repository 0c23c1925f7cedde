// res_chain on a CUDA device, on raw pointers: the kernels, how the work is cut up, the launches.
//
// A thread block takes a group of images through all convolutions. Their maps stay in its shared
// memory; the weights, which a first kernel puts in the order of their use, stream past them from
// the L2 cache through a ring of chunks. The ring runs on from one convolution to the next: a
// chunk arrives while those before it are multiplied.
//
// A convolution is a product of pixels x channels in by channels in x channels out for each tap.
// Each warp has up to 16 kRows pixels x 32 channels out in registers; where a block's warps do not
// hold all pixels, it makes several passes, each of which streams the weights again.
//
// Where there are fewer images than multiprocessors, or an image is too large for one, the blocks
// of a cluster (sm_90) share its rows. Each keeps a copy of the row above its own and of the one
// below, where an image has its border of zeros, and writes its first and last row there for its
// neighbours; after each convolution the cluster waits for all of its blocks.
#pragma once
#include <map>
#include <tuple>
#include <vector>

#include "convolution.cuh"

namespace fused_res::cuda {

constexpr int kChainThreads = 256, kChainWarps = kChainThreads / kWarp;
constexpr int kMostChannels = 128, kMostTiles = kMostChannels / kTile;
constexpr int kStages = 4;            // of the ring
constexpr int kChunkBytes = 8 << 10;  // of weights, and with each pass's last chunk:
constexpr int kTailBytes = kTile * 2 * sizeof(float);  // scale and shift, for 16 channels out
constexpr int kStageBytes = kChunkBytes + kMostTiles * kTailBytes;
constexpr int kSlots = 3;   // maps of a block: what it began with, and two within it
constexpr int kBatch = 48;  // convolutions a launch packs: a launch's parameters are 4 KB

// One convolution as the chain's kernel reads it. Sizes are those of padded channels.
struct alignas(16) Step {
  uint32_t weights;            // where they start, in units of kTailBytes
  uint8_t taps, steps, tiles;  // steps: of the channels in; tiles: of the channels out
  uint8_t chunk;               // steps of all taps that a chunk has
  uint8_t chunks, passes;
  uint8_t warps;  // side by side, for the channels out; the others are for other pixels
  uint8_t channels;
  uint8_t act, in, out, residual;  // slots; residual: kSlots where there is none
};

// A convolution as it is given.
struct Conv {
  int size, channels, out_channels, act;  // size: 1 or 3, of the kernel
  bool ends;                              // its block: adds what that began with
  const void* weight;                     // (K, C, size, size)
  bool channels_last;                     // its layout; else contiguous
  Values bias, mean, var, norm_weight, norm_bias;
  double eps;
};

// --- weights, in the order of their use

// What the packing kernel has to know of a convolution. weight: null where an earlier convolution
// has the same parameters, whose packed ones both use.
struct Packing {
  Step step;
  const void *weight, *bias, *mean, *var, *norm_weight, *norm_bias;
  double eps;
  uint8_t channels;
  bool channels_last;
  uint8_t floats;  // a bit for each of the five that is float32
};
struct Batch {
  Packing convs[kBatch];
};
static_assert(sizeof(Batch) <= 4000);

// The steps of a batch; and of each of its convolutions [tap][step of channels in][16 channels
// out][512 bytes], each lane's 16 bytes together, then scale and shift of each channel. Weights are
// not multiplied by a BatchNorm's scale: in 16 bits that costs accuracy.
template <class Products>
__global__ void res_chain_pack_kernel(const __grid_constant__ Batch batch, Step* steps,
                                      char* packed) {
  using T = typename Products::T;
  const Packing& c = batch.convs[blockIdx.y];
  const Step& step = c.step;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    uint4 words;
    memcpy(&words, &step, 16);
    store((uint4*)&steps[blockIdx.y], words);
  }
  if (!c.weight) return;
  constexpr int kLaneBytes = 16, kValues = kLaneBytes / sizeof(T);
  char* out = packed + (int64_t)step.weights * kTailBytes;
  const int lanes = step.taps * step.steps * step.tiles * kWarp;
  const int first = blockIdx.x * blockDim.x + threadIdx.x;
  for (int i = first; i < lanes; i += gridDim.x * blockDim.x) {
    const int tile = i / kWarp % step.tiles, place = i / kWarp / step.tiles;
    const int tap = place / step.steps, in_step = place % step.steps;
    T values[kValues];
#pragma unroll
    for (int v = 0; v < kValues; v++) {
      const Source source = Products::source(i % kWarp, v);
      const int in = in_step * Products::kStep + source.in, k = tile * kTile + source.out;
      float weight = 0;
      if (in < c.channels && k < step.channels) {
        const int at = c.channels_last ? (k * step.taps + tap) * c.channels + in
                                       : (k * c.channels + in) * step.taps + tap;
        weight = Products::weight(to_float(load((const T*)c.weight + at)));
      }
      from_float(weight, values[v]);
    }
    uint4 words;
    memcpy(&words, values, 16);
    store((uint4*)(out + i * kLaneBytes), words);
  }
  float* scales = (float*)(out + lanes * kLaneBytes);
  const int padded = step.tiles * kTile;
  const auto given = [&](const void* data, int bit) {
    return Values{data, (c.floats >> bit & 1) != 0};
  };
  const ChannelValues channels = {given(c.bias, 0),        given(c.mean, 1),      given(c.var, 2),
                                  given(c.norm_weight, 3), given(c.norm_bias, 4), c.eps};
  for (int k = first; k < padded; k += gridDim.x * blockDim.x) {
    Affine affine = {0, 0};
    if (k < step.channels) affine = affine_of<T>(channels, k);
    store(scales + k, affine.scale);
    store(scales + padded + k, affine.shift);
  }
}

// --- maps

// A map of a group's images in shared memory, channels_last. A pixel's pitch is an odd number of 16
// bytes, and the other distances (between the end of a row and the next, and between images) are
// multiples of 128: the m-th pixel of the group starts m pitches on, but for multiples of 128,
// whatever rows and images it has crossed. So 8 pixels in a row, whose 16 bytes load_matrices reads
// at a time, are in different banks (32 of 4 bytes), wherever a tile starts and whatever the tap.
//
// Between rows and images there are zeros: one column, which is on the right of a row and on the
// left of the next, and at least a row.
struct Map {
  int start;  // of the group's first pixel
  int pitch, row_gap, image_gap;

  // where pixel m is, with its row and its image
  __device__ int at(int m, int row, int image) const {
    return start + m * pitch + row * row_gap + image * image_gap;
  }
};

struct ChainArgs {
  const void* x;
  void* y;
  const char* packed;
  const Step* steps;
  int count;  // of convolutions
  int64_t images;
  int group, height, width, channels;
  int cluster;  // blocks that share an image; 1: a block has a group of images
  bool vector;  // x and y are read and written 16 bytes at a time
  Map maps[kSlots];
  int map_bytes, places, ring;  // of shared memory: the maps, pixels' places, the ring; steps first
};

// What a block works on: images of a group, or rows of one image.
struct Share {
  int images, rank, height, pixels;
  int64_t first;  // pixel of the whole tensor

  __device__ Share(const ChainArgs& args, int rank) : rank(rank) {
    const int64_t image = (int64_t)(blockIdx.x / args.cluster) * args.group;
    const int row = first_row(args, rank);
    images = (int)smaller(args.images - image, args.group);
    height = first_row(args, rank + 1) - row;
    pixels = images * height * args.width;
    first = (image * args.height + row) * args.width;
  }
  __device__ static int first_row(const ChainArgs& args, int rank) {
    return args.height * rank / args.cluster;
  }
  __device__ int image_of(int row) const { return images == 1 ? 0 : row / height; }
};

// The chunks of pass after pass, as they are copied to the ring.
struct Chunks {
  const ChainArgs& args;
  const char* memory;
  int conv = 0, pass = 0, chunk = 0, stage = 0;

  __device__ Step step(int i) const {
    const uint4 words = load_shared<uint4>(memory + i * sizeof(Step));
    Step step;
    memcpy(&step, &words, 16);
    return step;
  }

  // starts to copy the next, if there is one
  __device__ __forceinline__ void copy(char* ring) {
    if (conv < args.count) {
      const Step s = step(conv);
      const int stride = s.tiles * kWeightBytes, all = s.taps * s.steps;
      const int first = chunk * s.chunk, left = all - first;
      const bool last = chunk + 1 == s.chunks;
      const int bytes = last ? left * stride + s.tiles * kTailBytes : s.chunk * stride;
      const char* from = args.packed + (int64_t)s.weights * kTailBytes + first * stride;
      char* to = ring + stage * kStageBytes;
      for (int i = threadIdx.x * 16; i < bytes; i += kChainThreads * 16)
        start_copy(to + i, from + i);
      chunk++;
      if (last) chunk = 0, pass++;
      if (pass == s.passes) pass = 0, conv++;
    }
    end_copies();
    stage = (stage + 1) % kStages;
  }
};

// Two neighbouring elements in one word.
template <class T>
using PairOf = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;

template <class T>
__device__ __forceinline__ void load_pair(const char* p, float (&v)[2]) {
  const auto word = load_shared<PairOf<T>>(p);
  T pair[2];
  memcpy(pair, &word, sizeof word);
  v[0] = to_float(pair[0]), v[1] = to_float(pair[1]);
}
template <class T>
__device__ __forceinline__ PairOf<T> to_pair(const float (&v)[2]) {
  T pair[2];
  from_float(v[0], pair[0]), from_float(v[1], pair[1]);
  PairOf<T> word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// Where a pixel's output goes: to the block's own map, and to a neighbour's copy of its row (-1:
// none); and where its residual is.
struct Target {
  bool exists;
  int to, residual, above, below;
};

// y = act(sums * scale + shift [+ residual]) of up to 16 pixels x 16 channels out, from `tile` on.
// tail: scales and shifts of all tiles. Channels past the last are zero, whatever is in the sums.
template <class T, bool kCluster>
__device__ __forceinline__ void finish(const Sums& sums, const Step& step, const char* tail,
                                       int tile, char* memory, const Target (&targets)[2],
                                       int rank) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int k = tile * kTile + e * 8 + lane % 4 * 2;
    char* const channel = memory + k * (int)sizeof(T);
    float scale[2], shift[2];
    load_pair<float>(tail + k * 4, scale);
    load_pair<float>(tail + (step.tiles * kTile + k) * 4, shift);
#pragma unroll
    for (int p = 0; p < 2; p++) {
      const Target& target = targets[p];
      if (!target.exists) continue;
      float v[2], r[2] = {0, 0};
      if (step.residual < kSlots) load_pair<T>(channel + target.residual, r);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        v[c] = fmaf(sums.v[e][2 * p + c], scale[c], shift[c]);
        if (step.act == 2) v[c] = relu(v[c]);
        v[c] += r[c];
        if (step.act == 1) v[c] = relu(v[c]);
        if (k + c >= step.channels) v[c] = 0;
      }
      const PairOf<T> pair = to_pair<T>(v);
      store_shared(channel + target.to, pair);
      if constexpr (kCluster) {
        if (target.above >= 0) store_shared_of(rank - 1, channel + target.above, pair);
        if (target.below >= 0) store_shared_of(rank + 1, channel + target.below, pair);
      }
    }
  }
}

// A block's pixels from global to shared memory, with the rows next to them that its neighbours
// have, or its own back.
template <class T, bool kBack>
__device__ void transfer(const ChainArgs& args, const Share& share, char* memory, const Map& map) {
  const int above = !kBack && share.rank > 0, below = !kBack && share.rank + 1 < args.cluster;
  const int pixels = share.pixels + (above + below) * args.width;
  const auto each = [&](auto value, auto* global) {
    using V = decltype(value);
    constexpr int kElements = sizeof(V) / sizeof(T);
    const int pieces = args.channels / kElements;
    global += (share.first - above * args.width) * pieces;
    for (int i = threadIdx.x; i < pixels * pieces; i += kChainThreads) {
      const int m = i / pieces, row = m / args.width;
      const int at = map.at(m - above * args.width, row - above, share.image_of(row));
      char* p = memory + at + (i - m * pieces) * (int)sizeof(V);
      if constexpr (kBack)
        store(global + i, load_shared<V>(p));
      else
        store_shared(p, load(global + i));
    }
  };
  const auto global = [&](auto value) {
    using V = decltype(value);
    if constexpr (kBack)
      each(value, (V*)args.y);
    else
      each(value, (const V*)args.x);
  };
  if (args.vector)
    global(uint4{});
  else
    global(T{});
}

template <class Products, int kRows, bool kCluster>
__device__ __forceinline__ void run_chain(const ChainArgs& args) {
  using T = typename Products::T;
  DYNAMIC_SHARED(uint4, words);
  char* const memory = (char*)&words[0];
  char* const ring = memory + args.ring;
  const Share share(args, kCluster ? cluster_rank() : 0);
  const int pixels = share.pixels, tiles = (pixels + kTile - 1) / kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  for (int i = threadIdx.x; i < args.count; i += kChainThreads)
    store_shared(memory + i * sizeof(Step), load((const uint4*)args.steps + i));
  for (int m = threadIdx.x; m < pixels; m += kChainThreads) {
    const int row = m / args.width;
    store_shared(memory + args.places + m * 4, (uint32_t)(row | share.image_of(row) << 16));
  }
  for (int i = threadIdx.x * 16; i < args.map_bytes; i += kChainThreads * 16)
    store_shared(memory + args.maps[0].start - args.maps[0].image_gap + i, uint4{0, 0, 0, 0});
  __syncthreads();
  transfer<T, false>(args, share, memory, args.maps[0]);
  Chunks chunks{args, memory};
  for (int i = 0; i + 1 < kStages; i++) chunks.copy(ring);

  const auto at = [&](const Map& map, int m) {
    const auto place = load_shared<uint32_t>(memory + args.places + m * 4);
    return map.at(m, place & 0xffff, place >> 16);
  };
  int stage = 0;
  Map out = {};
  for (int conv = 0; conv < args.count; conv++) {
    const Step step = chunks.step(conv);
    const Map in = args.maps[step.in], added = args.maps[step.residual % kSlots];
    out = args.maps[step.out];
    // whether the next convolution looks at the rows around its own
    const bool shared_rows = kCluster && conv + 1 < args.count && chunks.step(conv + 1).taps > 1;
    const int stride = step.tiles * kWeightBytes;
    const int column = warp % step.warps, row = warp / step.warps;
    const int rows = kChainWarps / step.warps;
    const bool wide = column + step.warps < step.tiles;  // two tiles of channels out, or one
    for (int pass = 0; pass < step.passes; pass++) {
      const int first_tile = pass * rows * kRows + row;  // of 16 pixels; then every rows-th
      const int used = (tiles - first_tile + rows - 1) / rows;
      // A tile or pixel past the last computes the last pixel again; nothing of it is stored.
      const char* from[kRows][Products::kPointers];
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int p = 0; p < Products::kPointers; p++) {
          const Start start = Products::start(lane, p);
          const int m = (first_tile + i * rows) * kTile + start.pixel;
          from[i][p] = memory + at(in, m < pixels ? m : pixels - 1) + start.byte;
        }
      Sums sums[kRows][kColumns] = {};
      Taps taps(step.taps, step.steps, in.pitch, args.width * in.pitch + in.row_gap);
      int left = step.taps * step.steps;
      for (int chunk = 0; chunk < step.chunks; chunk++) {
        // From here on this chunk is there, and all are done with the one before, and with the
        // convolution before where this is a new one's first: its stage and its input can be
        // overwritten, its output read.
        WAIT_FOR_CHUNK(kStages - 2);
        if (kCluster && pass == 0 && chunk == 0)
          BARRIER_OF_CLUSTER();
        else
          SYNC_BEFORE_CHUNK();
        chunks.copy(ring);
        __syncwarp();  // lanes copied more or less
        const int count = left < step.chunk ? left : step.chunk;
        left -= count;
        const char* const weights = ring + stage * kStageBytes;
        const char* const columns[kColumns] = {weights + column * kWeightBytes,
                                               weights + (column + step.warps) * kWeightBytes};
        multiply_chunk<Products>(sums, from, taps, columns, stride, count, used, wide);
        stage = (stage + 1) % kStages;
        if (left > 0 || used <= 0) continue;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
          Target targets[2];
#pragma unroll
          for (int p = 0; p < 2; p++) {
            Target& target = targets[p];
            const int m = (first_tile + i * rows) * kTile + lane / 4 + 8 * p;
            target = {m < pixels, 0, 0, -1, -1};
            if (!target.exists) continue;
            target.to = at(out, m), target.residual = at(added, m);
            if (!shared_rows) continue;
            const int width = args.width, last = (share.height - 1) * width;
            const int height_above =
                Share::first_row(args, share.rank) - Share::first_row(args, share.rank - 1);
            if (share.rank > 0 && m < width)
              target.above = out.at(height_above * width + m, height_above, 0);
            if (share.rank + 1 < args.cluster && m >= last)
              target.below = out.at(m - last - width, -1, 0);
          }
#pragma unroll
          for (int j = 0; j < kColumns; j++)
            if (j == 0 || wide)
              finish<T, kCluster>(sums[i][j], step, weights + count * stride,
                                  column + j * step.warps, memory, targets, share.rank);
        }
      }
    }
  }
  __syncthreads();
  transfer<T, true>(args, share, memory, out);
}

// Devices that lack what it takes are refused.
template <class Products, int kRows, bool kCluster>
__global__ void __launch_bounds__(kChainThreads, 1)
    res_chain_kernel(const __grid_constant__ ChainArgs args) {
  if constexpr (kCluster ? kHasClusters : kHasMma) run_chain<Products, kRows, kCluster>(args);
}

// Of those that need the newest devices, one: it tells what the code was compiled for.
constexpr auto kNewestKernel = res_chain_kernel<HalfProducts<bf16>, 2, true>;

// --- the plan

struct ChainShape {
  int64_t images;
  int channels, height, width;
};

// What a plan has to know of a device.
struct ChainDevice {
  int multiprocessors;
  int shared_bytes;  // that a block may have
  bool clusters;
};

struct ChainPlan {
  bool fits;
  ChainArgs args;  // less the pointers
  int blocks, rows;
  int shared_bytes;
  std::vector<Packing> convs;
  int64_t packed_bytes;

  int64_t steps_bytes() const { return (int64_t)convs.size() * sizeof(Step); }
};

// Where each convolution reads and writes: not over its input, nor over what its block began with,
// unless it ends the block and adds to that in place; a block of one convolution takes turns.
// Returns the most channels of each slot.
inline std::vector<int> assign_slots(const std::vector<Conv>& convs, std::vector<Packing>& packed) {
  std::vector<int> widest(kSlots, 0);
  int in = 0, residual = 0;
  widest[0] = convs[0].channels;
  for (size_t i = 0; i < convs.size(); i++) {
    Step& step = packed[i].step;
    int out = 0;
    while (out == in || out == residual) out++;
    if (convs[i].ends && in != residual) out = residual;
    step.in = in, step.out = out, step.residual = convs[i].ends ? residual : kSlots;
    if (convs[i].out_channels > widest[out]) widest[out] = convs[i].out_channels;
    in = out;
    if (convs[i].ends) residual = out;
  }
  return widest;
}

constexpr int kMostCluster = 8;          // blocks; what every device with clusters has
constexpr int kLeastPixels = 2 * kTile;  // of a block of a cluster: with less it waits for weights

// The chain fits where its maps of one image do, or of the part that a block of a cluster has.
inline ChainPlan plan_chain(Kind kind, const ChainShape& shape, const std::vector<Conv>& convs,
                            const ChainDevice& device) {
  ChainPlan plan{};
  const int size = element_bytes(kind), step_channels = kStepBytes / size;
  plan.convs.resize(convs.size());
  const std::vector<int> widest = assign_slots(convs, plan.convs);
  const int64_t image_pixels = (int64_t)shape.height * shape.width;
  if (image_pixels * kStepBytes > kMostCluster * device.shared_bytes || convs.size() > 4096 ||
      shape.images >= 1 << 28)
    return plan;  // before anything overflows

  // shared memory: steps, maps, places, ring
  ChainArgs& args = plan.args;
  const auto lay_out = [&](int group, int height) {
    int at = round_up((int)plan.steps_bytes(), 128);
    const int begin = at;
    for (int s = 0; s < kSlots; s++) {
      Map& map = args.maps[s];
      map = {at, 0, 0, 0};
      if (!widest[s]) continue;
      map.pitch = round_up(widest[s], kTile) * size + 16 + kPlantedPitch;
      map.row_gap = round_up(map.pitch, 128);
      const int row = shape.width * map.pitch + map.row_gap;
      map.image_gap = round_up(row + map.pitch, 128);
      map.start = at + map.image_gap;
      at = map.start + group * (height * row + map.image_gap);
    }
    args.map_bytes = at - begin;
    args.places = at;
    args.ring = round_up(at + 4 * group * height * shape.width, 128);
    return args.ring + kStages * kStageBytes;
  };
  const auto height_of = [&](int cluster) { return (int)ceil_div(shape.height, cluster); };
  args.cluster = 1;
  const auto may_grow = [&] {
    const int cluster = 2 * args.cluster;
    return device.clusters && cluster <= kMostCluster && cluster <= shape.height &&
           height_of(cluster) * shape.width >= kLeastPixels;
  };
  while (lay_out(1, height_of(args.cluster)) > device.shared_bytes) {
    if (!may_grow()) return plan;
    args.cluster *= 2;
  }
  while (may_grow() && shape.images * 2 * args.cluster <= device.multiprocessors) args.cluster *= 2;
  args.group = 1;
  if (args.cluster == 1) {  // as few waves of blocks as the maps allow, images spread evenly
    int most = 1;
    while (most < shape.images && lay_out(most + 1, shape.height) <= device.shared_bytes) most++;
    const int64_t waves = ceil_div(shape.images, (int64_t)most * device.multiprocessors);
    args.group = (int)ceil_div(shape.images, waves * device.multiprocessors);
  }
  const int height = height_of(args.cluster);
  plan.shared_bytes = lay_out(args.group, height);
  plan.blocks = (int)ceil_div(shape.images, args.group) * args.cluster;
  args.count = (int)convs.size();
  args.images = shape.images;
  args.height = shape.height, args.width = shape.width, args.channels = shape.channels;
  args.vector = shape.channels * size % 16 == 0;

  // A convolution's warps: as many side by side as give the busiest the least to do.
  const int tiles_of_pixels = (int)ceil_div(args.group * height * shape.width, kTile);
  const auto rows_of = [&](int warps) {
    return (int)ceil_div(tiles_of_pixels, kChainWarps / warps);
  };
  int most_rows = 0;
  for (size_t i = 0; i < convs.size(); i++) {
    Step& step = plan.convs[i].step;
    step.taps = convs[i].size * convs[i].size;
    step.steps = round_up(convs[i].channels, kTile) / step_channels;
    step.tiles = round_up(convs[i].out_channels, kTile) / kTile;
    step.chunk = kChunkBytes / kWeightBytes / step.tiles;
    step.chunks = ceil_div(step.taps * step.steps, step.chunk);
    step.channels = convs[i].out_channels;
    step.act = convs[i].act;
    int64_t least = INT64_MAX;
    for (int warps = 1; warps <= kChainWarps && warps <= step.tiles; warps *= 2) {
      const int64_t columns = ceil_div(step.tiles, warps), work = columns * rows_of(warps);
      if (columns > kColumns || work >= least) continue;
      least = work, step.warps = warps;
    }
    if (rows_of(step.warps) > most_rows) most_rows = rows_of(step.warps);
  }
  plan.rows = most_rows > 2 && args.cluster == 1 && kind != Kind::exact ? 4 : 2;

  std::map<std::tuple<const void*, const void*, const void*, const void*, const void*, const void*,
                      double, int, int, int, bool>,
           uint32_t>
      known;
  uint32_t end = 0;
  for (size_t i = 0; i < convs.size(); i++) {
    const Conv& c = convs[i];
    Packing& p = plan.convs[i];
    Step& step = p.step;
    const int64_t passes = ceil_div(rows_of(step.warps), plan.rows);
    if (passes > 255) return plan;
    step.passes = passes;
    const auto [found, fresh] = known.insert(
        {{c.weight, c.bias.data, c.mean.data, c.var.data, c.norm_weight.data, c.norm_bias.data,
          c.eps, c.size, c.channels, c.out_channels, c.channels_last},
         end});
    step.weights = found->second;
    if (!fresh) continue;
    end += step.tiles * (step.taps * step.steps * (kWeightBytes / kTailBytes) + 1);
    p = {step,
         c.weight,
         c.bias.data,
         c.mean.data,
         c.var.data,
         c.norm_weight.data,
         c.norm_bias.data,
         c.eps,
         (uint8_t)c.channels,
         c.channels_last,
         (uint8_t)(c.bias.is_float | c.mean.is_float << 1 | c.var.is_float << 2 |
                   c.norm_weight.is_float << 3 | c.norm_bias.is_float << 4)};
  }
  plan.packed_bytes = (int64_t)end * kTailBytes;
  plan.fits = true;
  return plan;
}

// --- launches

inline int64_t workspace_bytes(const ChainPlan& plan) {
  return plan.packed_bytes + plan.steps_bytes();
}

template <class Products>
void launch_chain(const ChainPlan& plan, const void* x, void* y, void* workspace, Stream stream) {
  constexpr int kPackBlocks = 8, kPackThreads = 256;
  ChainArgs args = plan.args;
  args.x = x, args.y = y;
  args.vector &= (uintptr_t)x % 16 == 0 && (uintptr_t)y % 16 == 0;
  char* packed = (char*)workspace;
  Step* steps = (Step*)(packed + plan.packed_bytes);
  args.packed = packed, args.steps = steps;
  for (int first = 0; first < args.count; first += kBatch) {
    Batch batch{};
    const int count = (int)smaller(kBatch, args.count - first);
    for (int i = 0; i < count; i++) batch.convs[i] = plan.convs[first + i];
    launch("res_chain_pack", res_chain_pack_kernel<Products>, dim3(kPackBlocks, count),
           kPackThreads, stream, batch, steps + first, packed);
  }
  const auto kernel = args.cluster > 1 ? res_chain_kernel<Products, 2, true>
                      : plan.rows == 2 ? res_chain_kernel<Products, 2, false>
                                       : res_chain_kernel<Products, Products::kMostRows, false>;
  launch_clusters("res_chain", kernel, plan.blocks, args.cluster, kChainThreads, plan.shared_bytes,
                  stream, args);
}

// x, y: channels_last. workspace: workspace_bytes(plan), 128-byte aligned.
inline void res_chain(Kind kind, const ChainPlan& plan, const void* x, void* y, void* workspace,
                      Stream stream) {
  const auto chain = kind == Kind::bf16   ? launch_chain<HalfProducts<bf16>>
                     : kind == Kind::fp16 ? launch_chain<HalfProducts<fp16>>
                     : kind == Kind::tf32 ? launch_chain<Tf32Products>
                                          : launch_chain<ExactProducts>;
  chain(plan, x, y, workspace, stream);
}

}  // namespace fused_res::cuda
