// The part that the CUDA kernels of convolutions share, beside their products (mma.cuh).
#pragma once
#include "mma.cuh"

namespace fused_res::cuda {

enum class Kind : int { bf16, fp16, tf32, exact };

inline int element_bytes(Kind kind) { return kind < Kind::tf32 ? 2 : 4; }

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

// Values of channels, in the element type or float32; null where there are none.
struct Values {
  const void* data;
  bool is_float;
};

// A convolution's bias and BatchNorm by running statistics; mean is null without a BatchNorm.
struct ChannelValues {
  Values bias, mean, var, norm_weight, norm_bias;
  double eps;
};

template <class T>
__device__ inline double value_of(const Values& values, int channel) {
  if (values.is_float) return load((const float*)values.data + channel);
  return to_float(load((const T*)values.data + channel));
}

// y = sums * scale + shift.
struct Affine {
  float scale, shift;
};

template <class T>
__device__ inline Affine affine_of(const ChannelValues& c, int k) {
  double scale = 1, shift = 0;
  if (c.bias.data) shift = value_of<T>(c.bias, k);
  if (c.mean.data) {
    scale = 1 / sqrt(value_of<T>(c.var, k) + c.eps);
    if (c.norm_weight.data) scale *= value_of<T>(c.norm_weight, k);
    shift = (shift - value_of<T>(c.mean, k)) * scale;
    if (c.norm_bias.data) shift += value_of<T>(c.norm_bias, k);
  }
  return {(float)scale, (float)shift};
}

__device__ __forceinline__ float relu(float v) { return v < 0 ? 0 : v; }  // NaN stays

// Steps of a warp that has at least `used` tiles of pixels: none, or 1, 2 or 4.
template <class Products, int kRows>
__device__ __forceinline__ void multiply_chunk(
    Sums (&sums)[kRows][kColumns], const char* const (&from)[kRows][Products::kPointers],
    Taps& taps, const char* const (&weights)[kColumns], int stride, int count, int used,
    bool wide) {
  const auto by = [&](auto rows) {
    if (wide)
      multiply_steps<Products, rows, 2>(sums, from, taps, weights, stride, count);
    else
      multiply_steps<Products, rows, 1>(sums, from, taps, weights, stride, count);
  };
  if (kRows > 2 && used > 2)
    by(std::integral_constant<int, kRows>{});
  else if (used > 1)
    by(std::integral_constant<int, 2>{});
  else if (used > 0)
    by(std::integral_constant<int, 1>{});
}

}  // namespace fused_res::cuda
