#include "training_convolution.h"

#include <atomic>

#include "convolution.h"
#include "direct.h"
#include "winograd.h"

namespace fused_res {
namespace {

constexpr int64_t kLeastTiles = 48;              // of 2x2 outputs: the weight's transform must pay
constexpr int64_t kLeastPixelsOfLarge = 1024;    // of a weight whose gradient is the library's
constexpr int64_t kLeastSummed = 2048;           // pixels, for Winograd's gradient of a weight
constexpr int64_t kMostGradientBytes = 1 << 20;  // of a weight: more do not stay in a core's cache
// A call's pixels and multiplications: packing a weight and merging its gradient must pay.
constexpr int64_t kLeastPixels = 256, kLeastWork = 4 << 20;
// Panels are of 32 channels: of fewer than these the library's kernels are faster.
constexpr int64_t kLeastChannels = 24;
constexpr int64_t kPixelsOfPart = 256, kMostParts = 16;  // of the gradient of a bias

std::atomic<int64_t> most_tile{4};

// Winograd's of 2x2 outputs has the error of a direct one, at 4 / 9 of its multiplications.
bool suits_winograd(const Filters& f, int64_t images, int64_t height, int64_t width) {
  return most_tile >= 2 && f.size[2] == 3 && f.size[3] == 3 && f.size[0] % 8 == 0 &&
         f.size[1] % 8 == 0 && images * ceil_div(height, 2) * ceil_div(width, 2) >= kLeastTiles;
}

Tensor convolve(const Tensor& x, const Filters& filters, const OptTensor& bias,
                const OptTensor& add, const int64_t* padding) {
  const bool winograd = suits_winograd(filters, x.size(0), x.size(2) + 2 * padding[0] - 2,
                                       x.size(3) + 2 * padding[1] - 2);
  return winograd ? winograd_once(x, filters, bias, add, padding, 2)
                  : direct_once(x, filters, bias, add, padding);
}

// Summed in parts, as a weight's gradient: how many depends on the size alone.
Tensor bias_gradient(const Tensor& dy) {
  const int64_t channels = dy.size(1), pixels = dy.numel() / channels;
  const int64_t parts = std::clamp(pixels / kPixelsOfPart, (int64_t)1, kMostParts);
  const float* from = (const float*)dy.const_data_ptr();
  std::vector<double> sums(parts * channels);
  parallel(parts, dy.numel(), [&](int64_t lo, int64_t hi) {
    for (int64_t part = lo; part < hi; part++) {
      double* sum = sums.data() + part * channels;
      for (int64_t i = pixels * part / parts; i < pixels * (part + 1) / parts; i++)
        for (int64_t c = 0; c < channels; c++) sum[c] += from[i * channels + c];
    }
  });
  for (int64_t i = channels; i < parts * channels; i++) sums[i % channels] += sums[i];
  sums.resize(channels);
  Tensor dbias = uninitialised(channels, ScalarType::Float);
  write_channels(sums, dbias);
  return dbias;
}

}  // namespace

bool trains(const Tensor& x, const Tensor& weight, const int64_t* stride, const int64_t* padding) {
  if (!is_nhwc(x) || !is_float(weight) || stride[0] != 1 || stride[1] != 1) return false;
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  const bool square = weight.size(2) == weight.size(3) && padding[0] == padding[1];
  const bool small = weight.size(2) == 3 || weight.size(2) == 1;
  const bool dense = weight.is_contiguous() || channels_last_contiguous(weight);
  const bool enough = std::min(weight.size(0), weight.size(1)) >= kLeastChannels &&
                      pixels >= kLeastPixels && pixels * weight.numel() >= kLeastWork;
  return square && small && dense && enough && padding[0] < weight.size(2) &&
         (trains_weight(weight) || (weight.size(2) == 3 && pixels >= kLeastPixelsOfLarge));
}

int64_t training_winograd(int64_t limit) {
  if (limit >= 0) most_tile = limit;
  return most_tile;
}

bool trains_weight(const Tensor& weight) {
  return weight.numel() * (int64_t)sizeof(float) < kMostGradientBytes;
}

Tensor training_convolution(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                            const int64_t* padding) {
  return convolve(x, Filters(weight), bias, {}, padding);
}

std::array<Tensor, 3> training_convolution_backward(const Tensor& dy, const Tensor& x,
                                                    const Tensor& weight, const int64_t* padding,
                                                    const std::array<bool, 3>& wanted,
                                                    const OptTensor& add) {
  std::array<Tensor, 3> gradients;
  if (wanted[0]) {
    const int64_t around[] = {weight.size(2) - 1 - padding[0], weight.size(3) - 1 - padding[1]};
    gradients[0] = convolve(dy, Filters(weight).reversed(), {}, add, around);
  }
  if (wanted[1]) {
    // sums of few products have less error than their transforms
    const bool winograd =
        dy.size(0) * dy.size(2) * dy.size(3) >= kLeastSummed &&
        suits_winograd(Filters(weight), dy.size(0), dy.size(2), dy.size(3)) &&
        16 * weight.size(0) * weight.size(1) * (int64_t)sizeof(float) <= kMostGradientBytes;
    gradients[1] = winograd ? winograd_weight_gradient(dy, x, weight, padding)
                            : direct_weight_gradient(dy, x, weight, padding);
  }
  if (wanted[2]) gradients[2] = bias_gradient(dy);
  return gradients;
}

}  // namespace fused_res
