#include "training_convolution.h"

#include <atomic>

#include "convolution.h"
#include "direct.h"
#include "winograd.h"

namespace fused_res {
namespace {

// Of a call: packing a weight and merging its gradient must pay.
constexpr int64_t kLeastPixels = 256, kLeastWork = 4 << 20;  // multiplications
constexpr int64_t kLeastPixelsOfLarge = 1024;    // of a weight whose gradient oneDNN computes
constexpr int64_t kLeastSummed = 2048;           // pixels, for Winograd's gradient of a weight
constexpr int64_t kMostGradientBytes = 1 << 20;  // of a weight: more do not stay in a core's cache
// Of fewer channels oneDNN is as fast or faster: half a panel is 16.
constexpr int64_t kLeastChannels = 16, kLeastChannelsOf1x1 = 24;
// Values of the larger one of a 1x1 convolution's input and output: oneDNN's outputs of such a size
// are fresh memory. Its kernels are up to 1.3 times as fast as these, with AVX2 1.7 times.
constexpr int64_t kLeastOf1x1 = 2 << 20, kLeastOf1x1Avx2 = 4 << 20;
constexpr int64_t kPixelsOfPart = 256, kMostParts = 16;  // of the gradient of a bias
constexpr int kSizes = 11;                               // of a convolution of a branch

std::atomic<int64_t> most_tile{4};

bool is_small(const int64_t* weight) {
  const int64_t numel = weight[0] * weight[1] * weight[2] * weight[3];
  return numel * (int64_t)sizeof(float) < kMostGradientBytes;
}

// Measured with AVX-512 and AVX2: 3x3 by Winograd is 1.0 to 2.1 times as fast as oneDNN; by a
// direct convolution 0.4 to 1.0.
bool suits(const int64_t* x, const int64_t* weight, const int64_t* stride, const int64_t* padding,
           const int64_t* dilation, int64_t groups) {
  const int64_t size = weight[2], pixels = x[0] * x[2] * x[3];
  for (int d = 0; d < 2; d++)
    if (stride[d] != 1 || dilation[d] != 1 || weight[2 + d] != size || padding[d] != padding[0])
      return false;
  const int64_t fewest = std::min(weight[0], weight[1]);
  if (isa() == Isa::plain || groups != 1 || padding[0] >= size || fewest < kLeastChannels)
    return false;
  if (size == 1)
    return fewest >= kLeastChannelsOf1x1 && is_small(weight) &&
           pixels * std::max(weight[0], weight[1]) >=
               (isa() == Isa::avx2 ? kLeastOf1x1Avx2 : kLeastOf1x1);
  return size == 3 && most_tile >= 2 && weight[0] % 8 == 0 && weight[1] % 8 == 0 &&
         pixels >= (is_small(weight) ? kLeastPixels : kLeastPixelsOfLarge) &&
         pixels * weight[0] * weight[1] * 9 >= kLeastWork;
}

// Sums of few products have less error than their transforms.
bool sums_winograd(const Tensor& dy, const Tensor& weight) {
  return weight.size(2) == 3 && dy.size(0) * dy.size(2) * dy.size(3) >= kLeastSummed &&
         16 * weight.size(0) * weight.size(1) * (int64_t)sizeof(float) <= kMostGradientBytes;
}

// Winograd's of 2x2 outputs has the error of a direct one, at 4 / 9 of its multiplications.
Tensor convolve(const Tensor& x, const Filters& filters, const OptTensor& bias,
                const OptTensor& add, const int64_t* padding) {
  return filters.size[2] == 3 ? winograd_once(x, filters, bias, add, padding, 2)
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

bool trains(const Tensor& x, const Tensor& weight, const int64_t* stride, const int64_t* padding,
            const int64_t* dilation, int64_t groups) {
  return is_nhwc(x) && is_float(weight) &&
         (weight.is_contiguous() || channels_last_contiguous(weight)) &&
         suits(x.sizes().data(), weight.sizes().data(), stride, padding, dilation, groups);
}

int64_t training_convolutions(const std::vector<int64_t>& image,
                              const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(image.size() == 4, "image must be 4 sizes");
  std::vector<int64_t> x = image;
  int64_t count = 0;
  for (size_t i = 0; i + kSizes <= sizes.size(); i += kSizes) {
    const int64_t *weight = &sizes[i], *stride = weight + 4, *padding = stride + 2;
    const int64_t *dilation = padding + 2, groups = dilation[2];
    count += suits(x.data(), weight, stride, padding, dilation, groups);
    for (int d = 0; d < 2; d++) {
      const int64_t room = x[2 + d] + 2 * padding[d] - dilation[d] * (weight[2 + d] - 1) - 1;
      if (room < 0 || stride[d] < 1) return 0;
      x[2 + d] = room / stride[d] + 1;
    }
  }
  return count;
}

int64_t training_winograd(int64_t limit) {
  if (limit >= 0) most_tile = limit;
  return most_tile;
}

bool trains_weight(const Tensor& weight) { return is_small(weight.sizes().data()); }

bool trains_by_images(const Tensor& dy, const Tensor& weight) {
  return trains_weight(weight) && sums_winograd(dy, weight) && winograd_by_images(dy);
}

Tensor training_convolution(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                            const int64_t* padding) {
  return convolve(x, filters_of(weight), bias, {}, padding);
}

std::array<Tensor, 3> training_convolution_backward(const Tensor& dy, const Tensor& x,
                                                    const Tensor& weight, const int64_t* padding,
                                                    const std::array<bool, 3>& wanted,
                                                    const OptTensor& add, const Later& later) {
  std::array<Tensor, 3> gradients;
  if (later) {
    auto [dx, dweight] = winograd_gradients(dy, x, weight, add, padding, later);
    return {dx, dweight, wanted[2] ? bias_gradient(dy) : Tensor()};
  }
  if (wanted[0]) {
    const int64_t around[] = {weight.size(2) - 1 - padding[0], weight.size(3) - 1 - padding[1]};
    gradients[0] = convolve(dy, filters_of(weight).reversed(), {}, add, around);
  }
  if (wanted[1]) {
    gradients[1] = sums_winograd(dy, weight) ? winograd_weight_gradient(dy, x, weight, padding)
                                             : direct_weight_gradient(dy, x, weight, padding);
  }
  if (wanted[2]) gradients[2] = bias_gradient(dy);
  return gradients;
}

}  // namespace fused_res
