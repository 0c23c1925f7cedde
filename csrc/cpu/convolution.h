// The part that the convolutions of a CPU share: memory, and checks of their tensors.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "bn_act_kernels.h"  // Act
#include "isa.h"
#include "panel.h"
#include "pool.h"
#include "tensors.h"

namespace fused_res {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread's memory, kept from call to call: a fresh one costs page faults.
inline float* scratch(size_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(4096, ceil_div(floats * sizeof(float), 4096) * 4096));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return (float*)memory.get();
}

// Floats of the pool, while this is there
class Pooled {
 public:
  explicit Pooled(size_t floats) : data_((float*)pool_take(floats * sizeof(float))) {}
  Pooled(const Pooled&) = delete;
  ~Pooled() { pool_give(data_); }
  float* data() const { return data_; }

 private:
  float* data_;
};

// Floats from row to row where columns are read: a line more than whole lines, because rows
// 4 KB apart share a set of the first cache.
inline int64_t row_stride(int64_t floats) { return ceil_div(floats, 16) * 16 + 16; }

inline bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_cpu(); }

inline bool is_nhwc(const Tensor& t) {
  return is_float(t) && t.dim() == 4 && channels_last_contiguous(t);
}

// A bias, or zeros, of whole panels
inline std::vector<float> padded(const OptTensor& bias, int64_t channels, int64_t size) {
  std::vector<float> values(size);
  if (!bias) return values;
  STD_TORCH_CHECK(is_float(*bias) && bias->dim() == 1 && bias->size(0) == channels,
                  "bias must be float32 of shape (", channels, ",)");
  const std::vector<double> read = read_channels(bias, channels, 0);
  std::copy(read.begin(), read.end(), values.begin());
  return values;
}

inline Filters filters_of(const Tensor& weight) {
  Filters f = {(const float*)weight.const_data_ptr(), {}, {}};
  for (int d = 0; d < 4; d++) f.size[d] = weight.size(d), f.stride[d] = weight.stride(d);
  return f;
}

// (images, channels, height, width) of float32, channels_last; `inside`: never leaves the op
inline Tensor uninitialised_nhwc(int64_t images, int64_t channels, int64_t height, int64_t width,
                                 bool inside) {
  const int64_t size[] = {images, channels, height, width};
  const int64_t stride[] = {channels * height * width, 1, width * channels, channels};
  const size_t bytes = images * channels * height * width * sizeof(float);
  if (!inside || bytes < kLeastPooled) return empty_strided(4, size, stride, ScalarType::Float);
  return torch::stable::from_blob(pool_take(bytes), size, stride,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Float, pool_give);
}

// The output of a convolution, with room before its channels for those of `before`.
struct Output {
  Tensor y;
  float* data;  // of the convolution's channels
  int64_t stride;
};

// The first channels of each pixel of y, from `before`.
inline void put_before(const Tensor& before, bool relu, float* y, int64_t y_stride) {
  const int64_t channels = before.size(1), pixels = before.numel() / channels;
  const float* x = (const float*)before.const_data_ptr();
  parallel(pixels, before.numel(), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++)
      for (int64_t c = 0; c < channels; c++) {
        const float v = x[i * channels + c];
        y[i * y_stride + c] = relu && v <= 0 ? 0 : v;  // NaN stays, as in torch.relu
      }
  });
}

// Checks `residual`, and puts it before the output's channels if `concat`.
inline Output output_of(int64_t images, int64_t channels, int64_t height, int64_t width,
                        const OptTensor& residual, bool concat, int64_t act, bool inside) {
  STD_TORCH_CHECK(0 <= act && act <= 2, "act must be 0, 1 or 2");
  STD_TORCH_CHECK(channels > 0 && height > 0 && width > 0,
                  "x must be at least as large as the kernel");
  STD_TORCH_CHECK(!concat || residual, "concat needs a residual");
  if (residual)
    STD_TORCH_CHECK(is_nhwc(*residual) && residual->size(0) == images &&
                        (concat || residual->size(1) == channels) && residual->size(2) == height &&
                        residual->size(3) == width,
                    "residual must be float32, channels_last and of the output's size");
  const int64_t before = concat ? residual->size(1) : 0, all = before + channels;
  Tensor y = uninitialised_nhwc(images, all, height, width, inside);
  float* data = (float*)y.mutable_data_ptr();
  if (before && y.numel()) put_before(*residual, (Act)act == Act::relu, data, all);
  return {y, data + before, all};
}

}  // namespace fused_res
