// Weights of convolutions: as tensors have them, and in panels, as kernels read them.
#pragma once
#include <stdint.h>

#include <utility>

// Each instruction set compiles this header. If a function here were not inlined, the linker would
// keep the copy of one instruction set for all of them.
#define FUSED_RES_INLINE inline __attribute__((always_inline))

namespace fused_res {

// output channels whose weights lie together: u[panel][depth][kPanel]
constexpr int64_t kPanel = 32;

// (K, C, R, S) of float32 in any layout
struct Filters {
  const float* data;
  int64_t size[4], stride[4];

  FUSED_RES_INLINE int64_t at(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
  }
  FUSED_RES_INLINE float operator()(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return data[at(k, c, r, s)];
  }
  int64_t depth() const { return size[1] * size[2] * size[3]; }

  // The filters of the convolution that computes an input's gradient from the output's, stride 1.
  Filters reversed() const {
    Filters f = *this;
    std::swap(f.size[0], f.size[1]);
    std::swap(f.stride[0], f.stride[1]);
    for (int d = 2; d < 4; d++) {
      f.data += (size[d] - 1) * stride[d];
      f.stride[d] = -stride[d];
    }
    return f;
  }
};

}  // namespace fused_res
