#include "winograd.h"

#include "convolution.h"
#include "direct.h"
#include "direct_kernels.h"
#include "winograd_kernels.h"

namespace fused_res {
namespace {

const WinogradKernels& kernels_of(int64_t tile) {
#ifdef FUSED_RES_X86
  if (isa() == Isa::avx512) return avx512::winograd_kernels(tile);
  if (isa() == Isa::avx2) return avx2::winograd_kernels(tile);
#endif
  return plain::winograd_kernels(tile);
}

// Transforms of tiles that one core's caches hold beside a panel of weights: so many times the
// bytes of the transformed weight, which is read for every group of tiles, up to so many.
constexpr int64_t kTilesToWeight = 4, kMostTilesBytes = 1024 << 10;
// Above this, weights come from memory for every group of tiles: so all tiles are one group, up to
// so many bytes of transforms, whose points and panels the threads share.
constexpr int64_t kWeightBytes = 16 << 20, kSharedBytes = 24 << 20;
constexpr int64_t kLeastTiles = 12;  // fewer rows do not fill the registers
// Of a weight's gradient: tiles whose products make one sum, sums added one after the other, tiles
// whose transforms lie in the cache together
constexpr int64_t kTilesOfPart = 128, kMostParts = 16, kMostTiles = 128;

struct Winograd {
  const WinogradKernels& kernels;
  WinogradArgs args;
  int64_t points, panels, tiles;

  int64_t v_stride() const { return row_stride(args.channels); }
  int64_t v_plane(int64_t count) const { return count * v_stride() + 16; }
  int64_t m_plane(int64_t count) const { return count * panels * kPanel + 16; }
  size_t floats(int64_t count) const { return points * (v_plane(count) + m_plane(count)); }
  int64_t bytes_of_tile() const { return points * (args.channels + panels * kPanel) * 4; }
  int64_t bytes_of_weight() const { return points * args.channels * panels * kPanel * 4; }
  int64_t bytes_of_group() const {
    return std::min(kTilesToWeight * bytes_of_weight(), kMostTilesBytes);
  }

  WinogradTiles group(int64_t first, int64_t count) const {
    float* v = scratch(floats(count));
    return {first,          count,         v, v + points * v_plane(count), v_stride(),
            v_plane(count), m_plane(count)};
  }

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t groups = ceil_div(tiles * bytes_of_tile(), bytes_of_group());
    groups = std::min(groups, std::max<int64_t>(tiles / kLeastTiles, 1));
    groups = ceil_div(groups, threads) * threads;
    if (bytes_of_weight() > kWeightBytes || tiles < threads * kLeastTiles) return run_shared();
    torch::stable::parallel_for(0, groups, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t g = lo; g < hi; g++) run_group(tiles * g / groups, tiles * (g + 1) / groups);
    });
  }

  void run_group(int64_t begin, int64_t end) const {
    const WinogradTiles t = group(begin, end - begin);
    kernels.transform(args, t, 0, t.count);
    for (int64_t i = 0; i < points; i++)
      for (int64_t p = 0; p < panels; p++) kernels.multiply(args, t, i, p);
    kernels.finish(args, t, 0, t.count);
  }

  // the tiles [begin, end), by the calling thread
  void run_alone(int64_t begin, int64_t end) const {
    const int64_t groups = ceil_div((end - begin) * bytes_of_tile(), bytes_of_group());
    for (int64_t g = 0; g < groups; g++)
      run_group(begin + (end - begin) * g / groups, begin + (end - begin) * (g + 1) / groups);
  }

  void run_shared() const {
    const int64_t groups = std::min(tiles, ceil_div(tiles * bytes_of_tile(), kSharedBytes));
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = tiles * g / groups;
      const WinogradTiles t = group(first, tiles * (g + 1) / groups - first);
      torch::stable::parallel_for(
          0, t.count, 1, [&](int64_t lo, int64_t hi) { kernels.transform(args, t, lo, hi); });
      torch::stable::parallel_for(0, points * panels, 1, [&](int64_t lo, int64_t hi) {
        for (int64_t i = lo; i < hi; i++) kernels.multiply(args, t, i / panels, i % panels);
      });
      torch::stable::parallel_for(0, t.count, 1,
                                  [&](int64_t lo, int64_t hi) { kernels.finish(args, t, lo, hi); });
    }
  }
};

void check_tile(int64_t tile) { STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4"); }

}  // namespace

void pack_winograd(const Filters& f, const std::vector<double>& scale, int64_t tile, float* u) {
  const WinogradKernels& kernels = kernels_of(tile);
  const int64_t count = ceil_div(f.size[0], kPanel) * f.size[1];
  // an element is several times the work that `parallel` assumes
  parallel(count, 4 * (tile + 2) * (tile + 2) * count * kPanel,
           [&](int64_t lo, int64_t hi) { kernels.pack(f, scale.data(), u, lo, hi); });
}

// [point][panel][channel][kPanel], of the weight times scale; rounded once.
Tensor winograd_weight_cpu(const Tensor& weight, const OptTensor& scale, int64_t tile) {
  check_tile(tile);
  STD_TORCH_CHECK(
      is_float(weight) && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
      "weight must be float32 on a CPU, of shape (K, C, 3, 3)");
  const int64_t out_channels = weight.size(0);
  STD_TORCH_CHECK(!scale || (scale->dim() == 1 && scale->size(0) == out_channels),
                  "scale must have shape (", out_channels, ",)");
  Tensor u =
      uninitialised((tile + 2) * (tile + 2),
                    ceil_div(out_channels, kPanel) * weight.size(1) * kPanel, ScalarType::Float);
  pack_winograd(filters_of(weight), read_channels(scale, out_channels, 1.0), tile,
                (float*)u.mutable_data_ptr());
  return u;
}

namespace {

Winograd winograd_of(const WinogradArgs& args, int64_t tile, int64_t images) {
  const int64_t points = (tile + 2) * (tile + 2), panels = ceil_div(args.out_channels, kPanel);
  return {kernels_of(tile), args, points, panels, images * args.tiles_h * args.tiles_w};
}

// A convolution of x, and its output
struct Made {
  std::vector<float> shift;
  Output output;
  Winograd winograd;
};

// u: of pack_winograd
Made make(const Tensor& x, const float* u, const OptTensor& bias, const OptTensor& residual,
          int64_t out_channels, const int64_t* padding, int64_t tile, bool concat, int64_t act,
          bool inside) {
  const int64_t images = x.size(0), out_height = x.size(2) + 2 * padding[0] - 2;
  const int64_t out_width = x.size(3) + 2 * padding[1] - 2;
  std::vector<float> shift = padded(bias, out_channels, ceil_div(out_channels, kPanel) * kPanel);
  const Output output =
      output_of(images, out_channels, out_height, out_width, residual, concat, act, inside);
  const bool add = residual && !concat;
  const WinogradArgs args = {
      (const float*)x.const_data_ptr(),
      x.size(2),
      x.size(3),
      x.size(1),
      x.size(1),
      padding[0],
      padding[1],
      u,
      ceil_div(out_channels, kPanel) * x.size(1) * kPanel,
      shift.data(),
      output.data,
      out_height,
      out_width,
      out_channels,
      output.stride,
      add ? (const float*)residual->const_data_ptr() : nullptr,
      out_channels,
      (Act)act,
      ceil_div(out_height, tile),
      ceil_div(out_width, tile),
  };
  return {std::move(shift), output, winograd_of(args, tile, images)};
}

Tensor run_winograd(const Tensor& x, const float* u, const OptTensor& bias,
                    const OptTensor& residual, int64_t out_channels, const int64_t* padding,
                    int64_t tile, bool concat, int64_t act, bool inside) {
  const Made made = make(x, u, bias, residual, out_channels, padding, tile, concat, act, inside);
  if (made.output.y.numel()) made.winograd.run();
  return made.output.y;
}

int64_t transformed_size(const Filters& filters, int64_t tile) {
  return (tile + 2) * (tile + 2) * ceil_div(filters.size[0], kPanel) * filters.size[1] * kPanel;
}

}  // namespace

void winograd_alone(const WinogradArgs& args, int64_t tile, int64_t begin, int64_t end) {
  winograd_of(args, tile, 0).run_alone(begin, end);
}

Tensor winograd_cpu(const Tensor& x, const Tensor& u, const OptTensor& bias,
                    const OptTensor& residual, int64_t out_channels,
                    const std::vector<int64_t>& padding, int64_t tile, bool concat, int64_t act,
                    bool inside) {
  check_tile(tile);
  const int64_t points = (tile + 2) * (tile + 2), panels = ceil_div(out_channels, kPanel);
  STD_TORCH_CHECK(is_nhwc(x), "x must be float32 on a CPU, 4-dimensional and channels_last");
  STD_TORCH_CHECK(out_channels > 0 && is_float(u) && u.is_contiguous() &&
                      u.numel() == points * panels * x.size(1) * kPanel,
                  "u must be what winograd_weight made for ", x.size(1), " -> ", out_channels,
                  " channels and tile=", tile);
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0,
                  "padding must be two numbers of at least 0");
  return run_winograd(x, (const float*)u.const_data_ptr(), bias, residual, out_channels,
                      padding.data(), tile, concat, act, inside);
}

Tensor winograd_once(const Tensor& x, const Filters& filters, const OptTensor& bias,
                     const OptTensor& add, const int64_t* padding, int64_t tile) {
  const Pooled u(transformed_size(filters, tile));
  pack_winograd(filters, std::vector<double>(filters.size[0], 1.0), tile, u.data());
  return run_winograd(x, u.data(), bias, add, filters.size[0], padding, tile, false, 0, false);
}

namespace {

// The gradient of a weight. Tiles are summed in parts, how many depends on the sizes alone; of
// whole images where there are as many.
struct WeightGradient {
  static constexpr int64_t kPoints = 16;
  const WinogradKernels& kernels = kernels_of(2);
  const Tensor& weight;
  int64_t images, channels, out_channels, panels, of_image, parts, size;
  Winograd of;
  Pooled sums;

  WeightGradient(const Tensor& dy, const Tensor& x, const Tensor& weight, const int64_t* padding)
      : weight(weight), images(x.size(0)), channels(x.size(1)), out_channels(dy.size(1)),
        panels(ceil_div(out_channels, kPanel)),
        of_image(ceil_div(dy.size(2), 2) * ceil_div(dy.size(3), 2)), parts(parts_of(dy)),
        size(kPoints * panels * channels * kPanel), of{kernels, {}, kPoints, panels, tiles()},
        sums(parts * size) {
    WinogradArgs& args = of.args;
    args.x = (const float*)x.const_data_ptr();
    args.height = x.size(2), args.width = x.size(3), args.channels = args.x_stride = channels;
    args.pad_h = padding[0], args.pad_w = padding[1];
    args.y = (float*)dy.const_data_ptr();  // read
    args.out_height = dy.size(2), args.out_width = dy.size(3);
    args.out_channels = args.y_stride = out_channels;
    args.tiles_h = ceil_div(args.out_height, 2), args.tiles_w = ceil_div(args.out_width, 2);
  }

  static int64_t parts_of(const Tensor& dy) {
    const int64_t tiles = dy.size(0) * ceil_div(dy.size(2), 2) * ceil_div(dy.size(3), 2);
    return std::clamp(tiles / kTilesOfPart, (int64_t)1, kMostParts);
  }

  int64_t tiles() const { return images * of_image; }
  bool by_images() const { return images >= parts; }
  int64_t first_image(int64_t part) const { return images * part / parts; }
  int64_t first_tile(int64_t part) const {
    return by_images() ? first_image(part) * of_image : tiles() * part / parts;
  }
  int64_t most() const {
    return std::clamp(of.bytes_of_group() / of.bytes_of_tile(), (int64_t)16, kMostTiles);
  }
  // which are added at a time, where parts are of whole ones
  int64_t images_at_once() const { return std::max<int64_t>(most() / of_image, 1); }

  // adds the tiles [begin, end) to those of a part, of some points
  void add(int64_t part, int64_t begin, int64_t end, int64_t point_lo, int64_t point_hi) const {
    const auto accumulate = direct_kernels_of_isa().accumulate;
    const int64_t plane = channels * kPanel;
    for (int64_t first = begin; first < end; first += most()) {
      const WinogradTiles t = of.group(first, std::min(most(), end - first));
      kernels.transform(of.args, t, 0, t.count);
      kernels.transform_gradient(of.args, t, 0, t.count);
      for (int64_t i = point_lo; i < point_hi; i++)
        for (int64_t p = 0; p < panels; p++)
          accumulate(channels, t.count, t.v + i * t.v_plane, t.v_stride,
                     t.m + i * t.m_plane + p * t.count * kPanel, first == first_tile(part),
                     sums.data() + part * size + (i * panels + p) * plane);
    }
  }

  void run() const {
    // each task makes all transforms for its share of the points
    const int64_t threads = torch::stable::get_num_threads();
    int64_t shares = 1;
    while (shares < kPoints && parts * shares % threads && parts * shares < 4 * threads)
      shares *= 2;
    torch::stable::parallel_for(0, parts * shares, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t task = lo; task < hi; task++) {
        const int64_t part = task / shares, share = task % shares;
        const int64_t end = first_tile(part + 1);
        const int64_t step = by_images() ? images_at_once() * of_image : tiles();
        for (int64_t at = first_tile(part); at < end; at += step)
          add(part, at, std::min(at + step, end), kPoints * share / shares,
              kPoints * (share + 1) / shares);
      }
    });
  }

  Tensor finish() const {
    Tensor dweight = uninitialised_like(weight);
    const Filters like = filters_of(dweight);
    parallel(panels * channels, parts * size, [&](int64_t lo, int64_t hi) {
      kernels.finish_gradient(sums.data(), parts, like, (float*)dweight.mutable_data_ptr(), lo, hi);
    });
    return dweight;
  }
};

}  // namespace

Tensor winograd_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                const int64_t* padding) {
  const WeightGradient gradient(dy, x, weight, padding);
  gradient.run();
  return gradient.finish();
}

bool winograd_by_images(const Tensor& dy) {
  const int64_t parts = WeightGradient::parts_of(dy);
  return dy.size(0) >= parts && parts >= torch::stable::get_num_threads();
}

std::array<Tensor, 2> winograd_gradients(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                         const OptTensor& add, const int64_t* padding,
                                         const Later& later) {
  const Filters filters = filters_of(weight).reversed();
  const Pooled u(transformed_size(filters, 2));
  pack_winograd(filters, std::vector<double>(filters.size[0], 1.0), 2, u.data());
  const int64_t around[] = {2 - padding[0], 2 - padding[1]};
  const Made of_x = make(dy, u.data(), {}, add, filters.size[0], around, 2, false, 0, false);
  const WeightGradient gradient(dy, x, weight, padding);
  const int64_t pixels = dy.size(2) * dy.size(3);
  const int64_t tiles = of_x.winograd.tiles / gradient.images;
  torch::stable::parallel_for(0, gradient.parts, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t part = lo; part < hi; part++) {
      const int64_t end = gradient.first_image(part + 1), step = gradient.images_at_once();
      for (int64_t at = gradient.first_image(part); at < end; at += step) {
        const int64_t to = std::min(at + step, end);
        later(at * pixels, to * pixels);
        of_x.winograd.run_alone(at * tiles, to * tiles);
        gradient.add(part, at * gradient.of_image, to * gradient.of_image, 0,
                     WeightGradient::kPoints);
      }
    }
  });
  return {of_x.output.y, gradient.finish()};
}

}  // namespace fused_res
