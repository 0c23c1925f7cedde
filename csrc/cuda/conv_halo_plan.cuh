// conv_halo on a CUDA device: the kernel's arguments, and how the work is cut up.
#pragma once
#include "convolution.cuh"

namespace fused_res::cuda {

constexpr int kHaloThreads = 256, kHaloWarps = kHaloThreads / kWarp;
constexpr int kMostHaloChannels = 64;
constexpr int kMostTilePixels = kHaloWarps * 4 * kTile;  // four products a warp

// The epilogue of a tile.
// affine: y = act(sums * scale + shift [+ residual]).
// statistics: y = sums + bias, and of each block its mean, sum of squared deviations and number of
// values by channel, of y as it is rounded: what a BatchNorm in training wants.
// gradient: y = sums where a BatchNorm and ReLU of `residual` let it through, else 0; and of each
// block the sums of y and of y * (residual - mean).
enum class Epilogue : int { affine, statistics, gradient };
constexpr int kSumsOf[] = {0, 3, 2};  // by channel

struct HaloConv {
  int64_t images;
  int height, width, channels, out_channels, size;  // size: 1 or 3, of the kernel
};

// A map of patches in shared memory, channels_last. As in a chain's maps (res_chain_plan.cuh) a
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

// Blocks that a multiprocessor's registers are for. A warp with more pixels reads its weights for
// more of them; with fewer, two blocks hide each other's latencies.
template <class Products>
constexpr int blocks_together(int rows) {
  return std::is_same_v<Products, ExactProducts> || rows > 2 ? 1 : 2;
}

// --- the plan

// The resources of a device.
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
constexpr int kCyclesOfTile =
    1500;  // latencies: of the barrier, of the first loads, of the epilogue
constexpr int kReservedBytes = 1024;  // of a block's shared memory

// The part of a plan that does not depend on the tile.
inline HaloArgs untiled_halo(Kind kind, const HaloConv& conv) {
  const int bytes = element_bytes(kind), taps = conv.size * conv.size;
  HaloArgs a{};
  a.conv = conv;
  a.halo = conv.size / 2;
  a.steps = round_up(conv.channels, kTile) * bytes / kStepBytes;
  a.tiles = round_up(conv.out_channels, kTile) / kTile;
  a.warps = a.tiles > kColumns ? 2 : 1;
  a.vector = conv.channels * bytes % 16 == 0;
  a.table = taps * a.steps * a.tiles * kWeightBytes;
  a.places = a.table + 4 * a.tiles * kTile * (int)sizeof(float);
  a.patch.pitch = a.steps * kStepBytes + 16 + kPlantedPitch;
  return a;
}

// Looks for the plan that takes the least time.
struct HaloPlanner {
  Kind kind;
  Epilogue epilogue;
  int residuals;
  const HaloDevice& device;
  HaloArgs a;
  HaloPlan best = {};
  double least = 0;

  int rows() const { return kHaloWarps / a.warps; }

  // tiles of `group` images, `height` rows and `width` columns
  void cut(int group, int height, int width) {
    const HaloConv& conv = a.conv;
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
  }

  // tiles of 16 pixels of a warp
  int tiles_of_warp() const { return ceil_div(ceil_div(a.pixels, kTile), rows()); }

  // cycles of a tile's products
  double multiply_cycles() const {
    const int taps = a.conv.size * a.conv.size, columns = smaller(kColumns, a.tiles);
    const int of_warp = tiles_of_warp(), used = of_warp == 3 ? 4 : of_warp;
    const int reads = (used + columns) * kWeightBytes / kSharedBytesPerCycle;
    const int products = used * columns * (kind == Kind::exact ? 16 : 4);
    return (double)taps * a.steps * kHaloWarps * (reads > products ? reads : products);
  }

  // cycles of a tile's accesses to global memory
  double move_cycles() const {
    const int64_t elements = (int64_t)a.patch_pixels * a.conv.channels +
                             (int64_t)a.pixels * a.conv.out_channels * (1 + residuals);
    return (double)elements * element_bytes(kind) / kGlobalBytesPerCycle;
  }

  void consider(int group, int height, int width) {
    cut(group, height, width);
    const int of_warp = tiles_of_warp();
    const double multiply = multiply_cycles(), move = move_cycles();
    const double hidden = multiply < move ? multiply : move;  // by the other, mostly
    const int sums = kSumsOf[(int)epilogue] * rows() * 8 * a.tiles * kTile * 4;
    for (a.stages = 2; a.stages > 0; a.stages--) {
      const int stages = a.stages * a.stage_bytes;
      const int shared = a.first_stage + (stages > sums ? stages : sums);
      if (shared > device.shared_bytes) continue;
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
  }

  // all tiles of at most `most` pixels
  void consider_tiles(int most) {
    const HaloConv& conv = a.conv;
    if (conv.size == 1) return consider(1, 1, (int)smaller(most, conv.width));
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
};

inline HaloPlan plan_halo(Kind kind, HaloConv conv, Epilogue epilogue, int residuals,
                          const HaloDevice& device) {
  const int64_t pixels = conv.images * conv.height * conv.width;
  const auto takes = [](int channels) { return channels > 0 && channels <= kMostHaloChannels; };
  if (pixels == 0 || pixels >= INT32_MAX - kMostTilePixels || !takes(conv.channels) ||
      !takes(conv.out_channels))
    return {};
  if (conv.size == 1) conv.width = (int)pixels, conv.images = conv.height = 1;
  HaloPlanner planner{kind, epilogue, residuals, device, untiled_halo(kind, conv)};
  const int most_rows = kind == Kind::exact ? ExactProducts::kMostRows : 4;
  for (int of_warp = 1; of_warp <= most_rows; of_warp *= 2)
    planner.consider_tiles(of_warp * planner.rows() * kTile);
  return planner.best;
}

}  // namespace fused_res::cuda
