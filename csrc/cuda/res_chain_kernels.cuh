// res_chain on a CUDA device, on raw pointers: the kernels and their launches. res_chain_plan.cuh
// says how the work is cut up.
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
#include "res_chain_plan.cuh"

namespace fused_res::cuda {

// --- weights, in the order of their use

// The steps of a batch; and of each of its convolutions [tap][step of channels in][16 channels
// out][512 bytes], each lane's 16 bytes together, then scale and shift of each channel. Weights are
// not multiplied by a BatchNorm's scale: in 16 bits that costs accuracy.
template <class Products>
__global__ void res_chain_fwd_pack_kernel(const __grid_constant__ Batch batch, Step* steps,
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

// A block's work: images of a group, or rows of one image.
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
// have; or the other way round.
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

// Writes to shared memory before the first convolution: the steps, each pixel's row
// and image, and zeros around its maps.
__device__ __forceinline__ void prepare_memory(const ChainArgs& args, const Share& share,
                                               char* memory) {
  for (int i = threadIdx.x; i < args.count; i += kChainThreads)
    store_shared(memory + i * sizeof(Step), load((const uint4*)args.steps + i));
  for (int m = threadIdx.x; m < share.pixels; m += kChainThreads) {
    const int row = m / args.width;
    store_shared(memory + args.places + m * 4, (uint32_t)(row | share.image_of(row) << 16));
  }
  for (int i = threadIdx.x * 16; i < args.map_bytes; i += kChainThreads * 16)
    store_shared(memory + args.maps[0].start - args.maps[0].image_gap + i, uint4{0, 0, 0, 0});
}

// A warp's work in a pass over the pixels: tiles of 16 of them, from first_tile on every rows-th;
// of channels out one tile, or two.
struct Pass {
  const Step& step;
  const Map &in, &out, &added;
  int column, first_tile, rows;
  bool wide;
  bool shared_rows;  // whether the next convolution looks at the rows around its own
};

// where a block's pixel m is in a map
__device__ __forceinline__ int place_in(const ChainArgs& args, const char* memory, const Map& map,
                                        int m) {
  const auto place = load_shared<uint32_t>(memory + args.places + m * 4);
  return map.at(m, place & 0xffff, place >> 16);
}

// Where a lane's operands of the products start. A tile or pixel past the last computes the last
// pixel again; nothing of it is stored.
template <class Products, int kRows>
__device__ __forceinline__ void find_operands(const ChainArgs& args, const Share& share,
                                              const char* memory, const Pass& pass,
                                              const char* (&from)[kRows][Products::kPointers]) {
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int p = 0; p < Products::kPointers; p++) {
      const Start start = Products::start(threadIdx.x % kWarp, p);
      const int m = (pass.first_tile + i * pass.rows) * kTile + start.pixel;
      const int last = share.pixels - 1;
      from[i][p] = memory + place_in(args, memory, pass.in, m < last ? m : last) + start.byte;
    }
}

// Where pixel m's output goes.
__device__ __forceinline__ Target find_target(const ChainArgs& args, const Share& share,
                                              const char* memory, const Pass& pass, int m) {
  Target target = {m < share.pixels, 0, 0, -1, -1};
  if (!target.exists) return target;
  target.to = place_in(args, memory, pass.out, m);
  target.residual = place_in(args, memory, pass.added, m);
  if (!pass.shared_rows) return target;
  const int width = args.width, last = (share.height - 1) * width;
  const int height_above =
      Share::first_row(args, share.rank) - Share::first_row(args, share.rank - 1);
  if (share.rank > 0 && m < width)
    target.above = pass.out.at(height_above * width + m, height_above, 0);
  if (share.rank + 1 < args.cluster && m >= last)
    target.below = pass.out.at(m - last - width, -1, 0);
  return target;
}

// A pass's sums to the output's map. tail: scales and shifts of all tiles.
template <class T, int kRows, bool kCluster>
__device__ __forceinline__ void finish_pass(const ChainArgs& args, const Share& share, char* memory,
                                            const Pass& pass, const Sums (&sums)[kRows][kColumns],
                                            const char* tail) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    Target targets[2];
#pragma unroll
    for (int p = 0; p < 2; p++) {
      const int m = (pass.first_tile + i * pass.rows) * kTile + lane / 4 + 8 * p;
      targets[p] = find_target(args, share, memory, pass, m);
    }
#pragma unroll
    for (int j = 0; j < kColumns; j++)
      if (j == 0 || pass.wide)
        finish<T, kCluster>(sums[i][j], pass.step, tail, pass.column + j * pass.step.warps, memory,
                            targets, share.rank);
  }
}

// One pass of a convolution: its products, chunk after chunk of the weights, and its output.
template <class Products, int kRows, bool kCluster>
__device__ __forceinline__ void run_pass(const ChainArgs& args, const Share& share, char* memory,
                                         const Pass& pass, bool first, Chunks& chunks, int& stage) {
  using T = typename Products::T;
  char* const ring = memory + args.ring;
  const Step& step = pass.step;
  const int tiles = (share.pixels + kTile - 1) / kTile;
  const int used = (tiles - pass.first_tile + pass.rows - 1) / pass.rows;
  const int stride = step.tiles * kWeightBytes;
  const char* from[kRows][Products::kPointers];
  find_operands<Products, kRows>(args, share, memory, pass, from);
  Sums sums[kRows][kColumns] = {};
  Taps taps(step.taps, step.steps, pass.in.pitch, args.width * pass.in.pitch + pass.in.row_gap);
  int left = step.taps * step.steps;
  for (int chunk = 0; chunk < step.chunks; chunk++) {
    // From here on this chunk is there, and all are done with the one before, and with the
    // convolution before where this is a new one's first: its stage and its input can be
    // overwritten, its output read.
    WAIT_FOR_CHUNK(kStages - 2);
    if (kCluster && first && chunk == 0)
      BARRIER_OF_CLUSTER();
    else
      SYNC_BEFORE_CHUNK();
    chunks.copy(ring);
    SYNC_LANES();  // which copied more or less
    const int count = left < step.chunk ? left : step.chunk;
    left -= count;
    const char* const weights = ring + stage * kStageBytes;
    const char* const columns[kColumns] = {weights + pass.column * kWeightBytes,
                                           weights + (pass.column + step.warps) * kWeightBytes};
    multiply_chunk<Products>(sums, from, taps, columns, stride, count, used, pass.wide);
    stage = (stage + 1) % kStages;
    if (left > 0 || used <= 0) continue;
    finish_pass<T, kRows, kCluster>(args, share, memory, pass, sums, weights + count * stride);
  }
}

template <class Products, int kRows, bool kCluster>
__device__ __forceinline__ void run_chain(const ChainArgs& args) {
  using T = typename Products::T;
  DYNAMIC_SHARED(uint4, words);
  char* const memory = (char*)&words[0];
  const Share share(args, kCluster ? cluster_rank() : 0);
  const int warp = threadIdx.x / kWarp;

  prepare_memory(args, share, memory);
  __syncthreads();
  transfer<T, false>(args, share, memory, args.maps[0]);
  Chunks chunks{args, memory};
  for (int i = 0; i + 1 < kStages; i++) chunks.copy(memory + args.ring);

  int stage = 0;
  Map out = {};
  for (int conv = 0; conv < args.count; conv++) {
    const Step step = chunks.step(conv);
    const Map in = args.maps[step.in], added = args.maps[step.residual % kSlots];
    out = args.maps[step.out];
    const bool shared_rows = kCluster && conv + 1 < args.count && chunks.step(conv + 1).taps > 1;
    const int column = warp % step.warps, row = warp / step.warps;
    const int rows = kChainWarps / step.warps;
    const bool wide = column + step.warps < step.tiles;
    for (int i = 0; i < step.passes; i++) {
      const Pass pass = {step, in,   out,        added, column, i * rows * kRows + row,
                         rows, wide, shared_rows};
      run_pass<Products, kRows, kCluster>(args, share, memory, pass, i == 0, chunks, stage);
    }
  }
  __syncthreads();
  transfer<T, true>(args, share, memory, out);
}

// Devices without these instructions are refused.
template <class Products, int kRows, bool kCluster>
__global__ void __launch_bounds__(kChainThreads, 1)
    res_chain_fwd_kernel(const __grid_constant__ ChainArgs args) {
  if constexpr (kCluster ? kHasClusters : kHasMma) run_chain<Products, kRows, kCluster>(args);
}

// One of the kernels that need the newest devices: its PTX version tells the compiled architecture.
constexpr auto kNewestKernel = res_chain_fwd_kernel<HalfProducts<bf16>, 2, true>;

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
    launch("res_chain_pack", res_chain_fwd_pack_kernel<Products>, dim3(kPackBlocks, count),
           kPackThreads, stream, batch, steps + first, packed);
  }
  const auto kernel = args.cluster > 1 ? res_chain_fwd_kernel<Products, 2, true>
                      : plan.rows == 2 ? res_chain_fwd_kernel<Products, 2, false>
                                       : res_chain_fwd_kernel<Products, Products::kMostRows, false>;
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
