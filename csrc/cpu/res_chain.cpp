#include "res_chain.h"

#include <algorithm>
#include <memory>

#include "convolution.h"
#include "direct.h"
#include "direct_kernels.h"
#include "team.h"
#include "winograd.h"
#include "winograd_kernels.h"

namespace fused_res {
namespace {

constexpr int kNumbers = 5;  // of a convolution in a program
// Maps of the images that a thread takes through the chain at a time, and what it gathers of them
// at a time: both stay in its core's cache, beside a weight.
constexpr int64_t kMapsBytes = 384 << 10, kGroupBytes = 256 << 10, kLeastUnits = 28;

// A convolution that keeps the size of its map.
struct Conv {
  int64_t tile, size, channels, out_channels;  // tile 0: direct
  Act act;
  bool last;  // of its block: adds the block's input
  Tensor u;
  std::vector<float> bias;
};

// Some images, as one convolution reads and writes them. A unit is a tile of
// Winograd's, or a pixel.
struct Maps {
  int64_t images, height, width;

  int64_t pixels() const { return images * height * width; }
  int64_t units(const Conv& c) const {
    if (!c.tile) return pixels();
    return images * ceil_div(height, c.tile) * ceil_div(width, c.tile);
  }

  // the units [lo, hi) of y = act(c(x)) + residual, or act of the sum
  void convolve(const Conv& c, const float* x, const float* residual, float* y, int64_t lo,
                int64_t hi) const {
    if (c.tile)
      winograd(c, x, residual, y, lo, hi);
    else
      direct(c, x, residual, y, lo, hi);
  }

 private:
  void winograd(const Conv& c, const float* x, const float* residual, float* y, int64_t lo,
                int64_t hi) const {
    const WinogradArgs args = {x,
                               height,
                               width,
                               c.channels,
                               c.channels,
                               1,
                               1,
                               (const float*)c.u.const_data_ptr(),
                               ceil_div(c.out_channels, kPanel) * c.channels * kPanel,
                               c.bias.data(),
                               y,
                               height,
                               width,
                               c.out_channels,
                               c.out_channels,
                               residual,
                               c.out_channels,
                               c.act,
                               ceil_div(height, c.tile),
                               ceil_div(width, c.tile)};
    winograd_alone(args, c.tile, lo, hi);
  }

  void direct(const Conv& c, const float* x, const float* residual, float* y, int64_t lo,
              int64_t hi) const {
    const DirectKernels& kernels = direct_kernels_of_isa();
    const int64_t padding = c.size / 2;
    DirectArgs args = {};
    args.count = 1;
    args.sources[0] = {
        x, height, width, c.channels, {c.size, c.size}, {1, 1}, {padding, padding}, {1, 1}};
    args.depth = args.sources[0].depth();
    args.u = (const float*)c.u.const_data_ptr();
    args.bias = c.bias.data();
    args.cached = true;
    args.y = y;
    args.out_height = height, args.out_width = width;
    args.out_channels = args.y_stride = args.residual_stride = c.out_channels;
    args.residual = residual;
    args.act = c.act;
    const int64_t stride = row_stride(args.depth);
    const int64_t most = kGroupBytes / (stride * (int64_t)sizeof(float));
    const int64_t groups = ceil_div(hi - lo, std::max(most, kLeastUnits));
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = lo + (hi - lo) * g / groups;
      const int64_t count = lo + (hi - lo) * (g + 1) / groups - first;
      float* v = scratch(count * (stride + kPanel));
      kernels.gather(args, first, 0, count, v, stride);
      for (int64_t p = 0; p < ceil_div(c.out_channels, kPanel); p++)
        kernels.multiply(args, first, 0, count, v, stride, p, g == 0, v + count * stride);
    }
  }
};

// A hundred convolutions are as many tensors and five times the numbers, which cost more to pass
// than a small map to compute: they are passed once, and then lie in this, behind a tensor's data.
struct Chain {
  const Chain* self = this;  // not of a copy of the bytes
  int64_t channels;
  std::vector<Conv> convs;
  int64_t widest = 0;  // channels

  explicit Chain(int64_t channels) : channels(channels) {}

  // Images through all convolutions: `part(conv, x, residual, y)` runs one. The blocks' outputs
  // take turns in two maps, the maps within a block in two more.
  template <class Part>
  void run(const float* x, float* y, float* space, int64_t map, const Part& part) const {
    const float *in = x, *residual = x;
    int64_t block = 0, inner = 0;
    for (size_t i = 0; i < convs.size(); i++) {
      const Conv& c = convs[i];
      float* out = c.last ? space + block * map : space + (2 + inner) * map;
      if (i + 1 == convs.size()) out = y;
      part(c, in, c.last ? residual : nullptr, out);
      in = out;
      if (c.last)
        residual = out, block ^= 1;
      else
        inner ^= 1;
    }
  }

  // Each thread takes some images at a time through all of the chain.
  void run_alone(const float* x, float* y, const Maps& maps) const {
    const int64_t image = maps.height * maps.width;
    const int64_t threads = torch::stable::get_num_threads();
    int64_t groups =
        ceil_div(maps.images * 3 * image * widest * (int64_t)sizeof(float), kMapsBytes);
    groups = std::clamp(ceil_div(groups, threads) * threads, (int64_t)1, maps.images);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t lo, int64_t hi) {
      const int64_t most = ceil_div(maps.images, groups), map = most * image * widest;
      const Pooled space(4 * map);
      for (int64_t g = lo; g < hi; g++) {
        const int64_t first = maps.images * g / groups;
        const Maps some = {maps.images * (g + 1) / groups - first, maps.height, maps.width};
        const int64_t at = first * image * channels;
        run(x + at, y + at, space.data(), map,
            [&](const Conv& c, const float* in, const float* residual, float* out) {
              some.convolve(c, in, residual, out, 0, some.units(c));
            });
      }
    });
  }

  // All threads share each convolution of all images.
  void run_together(const float* x, float* y, const Maps& maps) const {
    const int64_t map = maps.pixels() * widest;
    const Pooled space(4 * map);
    Team::run(torch::stable::get_num_threads(), [&](Team& team, int64_t member) {
      run(x, y, space.data(), map,
          [&](const Conv& c, const float* in, const float* residual, float* out) {
            const int64_t units = maps.units(c), members = team.size();
            maps.convolve(c, in, residual, out, units * member / members,
                          units * (member + 1) / members);
            team.wait();
          });
    });
  }
};

}  // namespace

Tensor packed_chain_cpu(const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases,
                        const std::vector<int64_t>& program, int64_t channels) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == biases.size() &&
                      program.size() == kNumbers * weights.size(),
                  "weights must be at least one, with as many biases and 5 numbers each");
  auto chain = std::make_unique<Chain>(channels);
  int64_t before = channels;
  for (size_t i = 0; i < weights.size(); i++) {
    const int64_t* n = &program[kNumbers * i];
    const int64_t tile = n[0], size = n[1], out_channels = n[2];
    STD_TORCH_CHECK(
        (tile == 0 && (size == 1 || size == 3)) || ((tile == 2 || tile == 4) && size == 3),
        "tile must be 0, 2 or 4, and size 1 or 3, with Winograd's tiles 3");
    STD_TORCH_CHECK(out_channels > 0 && 0 <= n[3] && n[3] <= 2 && (n[4] == 0 || n[4] == 1),
                    "channels must be positive, act 0, 1 or 2, last 0 or 1");
    STD_TORCH_CHECK(!n[4] || out_channels == channels, "a block must end with the channels of x");
    const int64_t taps = tile ? (tile + 2) * (tile + 2) : size * size;
    const int64_t panels = ceil_div(out_channels, kPanel);
    STD_TORCH_CHECK(is_float(weights[i]) && weights[i].is_contiguous() &&
                        weights[i].numel() == panels * kPanel * before * taps,
                    "weights must be what direct_weight or winograd_weight made for ", before,
                    " -> ", out_channels, " channels");
    chain->convs.push_back({tile, size, before, out_channels, (Act)n[3], n[4] == 1, weights[i],
                            padded(biases[i], out_channels, panels * kPanel)});
    chain->widest = std::max(chain->widest, out_channels);
    before = out_channels;
  }
  STD_TORCH_CHECK(chain->convs.back().last, "the last convolution must end a block");
  const int64_t size = sizeof(Chain), stride = 1;
  const Tensor made =
      torch::stable::from_blob(chain.get(), {&size, 1}, {&stride, 1},
                               torch::stable::Device(torch::headeronly::DeviceType::CPU),
                               ScalarType::Byte, [](void* p) { delete (Chain*)p; });
  chain.release();
  return made;
}

Tensor res_chain_cpu(const Tensor& x, const Tensor& packed) {
  STD_TORCH_CHECK(is_nhwc(x), "x must be float32 on a CPU, 4-dimensional and channels_last");
  STD_TORCH_CHECK(packed.is_cpu() && packed.numel() == sizeof(Chain) &&
                      ((const Chain*)packed.const_data_ptr())->self == packed.const_data_ptr(),
                  "chain must be what packed_chain returned, no copy of it");
  const Chain& chain = *(const Chain*)packed.const_data_ptr();
  STD_TORCH_CHECK(x.size(1) == chain.channels, "x must have ", chain.channels, " channels, got ",
                  x.size(1));
  const Maps maps = {x.size(0), x.size(2), x.size(3)};
  const Tensor y = uninitialised_nhwc(maps.images, chain.channels, maps.height, maps.width, false);
  if (y.numel() == 0) return y;
  const float* from = (const float*)x.const_data_ptr();
  float* to = (float*)y.mutable_data_ptr();
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), cores());
  if (maps.images % threads == 0 || maps.images >= 4 * threads)
    chain.run_alone(from, to, maps);
  else
    chain.run_together(from, to, maps);
  return y;
}

}  // namespace fused_res
