// res_chain on a CUDA device: the kernels' arguments, and how the work is cut up.
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
constexpr int kSlots = 3;   // maps of a block: its input, and two within it
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
  bool last;                              // of its block: adds the block's input
  const void* weight;                     // (K, C, size, size)
  bool channels_last;                     // its layout; else contiguous
  Values bias, mean, var, norm_weight, norm_bias;
  double eps;
};

// A convolution for the packing kernel. weight: null where an earlier convolution has the same
// parameters; then both use the same packed weights.
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

struct ChainShape {
  int64_t images;
  int channels, height, width;
};

// The resources of a device.
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

// Where each convolution reads and writes: not over its input, nor over its block's input,
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
    if (convs[i].last && in != residual) out = residual;
    step.in = in, step.out = out, step.residual = convs[i].last ? residual : kSlots;
    if (convs[i].out_channels > widest[out]) widest[out] = convs[i].out_channels;
    in = out;
    if (convs[i].last) residual = out;
  }
  return widest;
}

constexpr int kMostCluster = 8;          // blocks; every device with clusters has as many
constexpr int kLeastPixels = 2 * kTile;  // of a block of a cluster: with less it waits for weights

struct ChainPlanner {
  Kind kind;
  const ChainShape& shape;
  const std::vector<Conv>& convs;
  const ChainDevice& device;
  ChainPlan plan = {};
  std::vector<int> widest = {};  // channels of each slot

  // Gives each map its place in shared memory, behind the steps, and before pixels' places and the
  // ring of weights; the bytes of all.
  int lay_out(int group, int height) {
    ChainArgs& args = plan.args;
    int at = round_up((int)plan.steps_bytes(), 128);
    const int begin = at;
    for (int s = 0; s < kSlots; s++) {
      Map& map = args.maps[s];
      map = {at, 0, 0, 0};
      if (!widest[s]) continue;
      map.pitch = round_up(widest[s], kTile) * element_bytes(kind) + 16 + kPlantedPitch;
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
  }

  int height_of(int cluster) const { return (int)ceil_div(shape.height, cluster); }

  bool may_grow() const {
    const int cluster = 2 * plan.args.cluster;
    return device.clusters && cluster <= kMostCluster && cluster <= shape.height &&
           height_of(cluster) * shape.width >= kLeastPixels;
  }

  // Whether the maps of one image fit, or of the part that a block of a cluster has; then how many
  // images a block takes, or blocks an image.
  bool share_images() {
    ChainArgs& args = plan.args;
    args.cluster = 1;
    while (lay_out(1, height_of(args.cluster)) > device.shared_bytes) {
      if (!may_grow()) return false;
      args.cluster *= 2;
    }
    while (may_grow() && shape.images * 2 * args.cluster <= device.multiprocessors)
      args.cluster *= 2;
    args.group = 1;
    if (args.cluster == 1) {  // as few waves of blocks as the maps allow, images spread evenly
      int most = 1;
      while (most < shape.images && lay_out(most + 1, shape.height) <= device.shared_bytes) most++;
      const int64_t waves = ceil_div(shape.images, (int64_t)most * device.multiprocessors);
      args.group = (int)ceil_div(shape.images, waves * device.multiprocessors);
    }
    plan.shared_bytes = lay_out(args.group, height_of(args.cluster));
    plan.blocks = (int)ceil_div(shape.images, args.group) * args.cluster;
    args.count = (int)convs.size();
    args.images = shape.images;
    args.height = shape.height, args.width = shape.width, args.channels = shape.channels;
    args.vector = shape.channels * element_bytes(kind) % 16 == 0;
    return true;
  }

  // rows of 16 pixels that a warp has where `warps` are side by side
  int rows_of(int warps) const {
    const int pixels = plan.args.group * height_of(plan.args.cluster) * shape.width;
    return (int)ceil_div(ceil_div(pixels, kTile), kChainWarps / warps);
  }

  // A convolution's warps: as many side by side as give the busiest the least to do.
  void share_pixels() {
    int most_rows = 0;
    for (size_t i = 0; i < convs.size(); i++) {
      Step& step = plan.convs[i].step;
      step.taps = convs[i].size * convs[i].size;
      step.steps = round_up(convs[i].channels, kTile) * element_bytes(kind) / kStepBytes;
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
    plan.rows = most_rows > 2 && plan.args.cluster == 1 && kind != Kind::exact ? 4 : 2;
  }

  // Gives each convolution's packed weights their place: one for all that have the same parameters.
  // False: a convolution takes too many passes.
  bool place_weights() {
    std::map<std::tuple<const void*, const void*, const void*, const void*, const void*,
                        const void*, double, int, int, int, bool>,
             uint32_t>
        known;
    uint32_t end = 0;
    for (size_t i = 0; i < convs.size(); i++) {
      const Conv& c = convs[i];
      Packing& p = plan.convs[i];
      Step& step = p.step;
      const int64_t passes = ceil_div(rows_of(step.warps), plan.rows);
      if (passes > 255) return false;
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
    return true;
  }
};

// The chain fits where its maps of one image do, or of the part that a block of a cluster has.
inline ChainPlan plan_chain(Kind kind, const ChainShape& shape, const std::vector<Conv>& convs,
                            const ChainDevice& device) {
  ChainPlanner planner{kind, shape, convs, device};
  ChainPlan& plan = planner.plan;
  plan.convs.resize(convs.size());
  planner.widest = assign_slots(convs, plan.convs);
  const int64_t image_pixels = (int64_t)shape.height * shape.width;
  if (image_pixels * kStepBytes > kMostCluster * device.shared_bytes || convs.size() > 4096 ||
      shape.images >= 1 << 28)
    return plan;  // before anything overflows
  if (!planner.share_images()) return plan;
  planner.share_pixels();
  plan.fits = planner.place_weights();
  return plan;
}

}  // namespace fused_res::cuda
