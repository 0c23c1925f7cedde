// The interface between bn_act.cpp (tensors, threads) and bn_act_kernels.cpp (arithmetic, one
// object per instruction set). A tensor is seen as `runs` of `inner` contiguous elements:
// channels_last has N*H*W runs of C channels, NCHW has N*C runs of H*W elements of one channel.
// Masks hold one bit per element, each run padded to whole bytes.
#pragma once
#include <stdint.h>

namespace fused_res {

enum class Act : int { none, relu, relu_before_add };
enum class Residual : int { none, tensor, norm };
enum class Element : int { f32, bf16, f16, f64 };

constexpr int64_t kMaxLanes = 16;  // channel arrays are padded to a multiple of this

struct Geometry {
  int64_t runs, inner, channels;
  bool channels_last;
  bool large;  // comes from memory, not from a cache: read in order, written past the caches
};

// One BatchNorm, per channel, in the accumulation type: y = (x - mean) * scale + bias.
struct Affine {
  const void *mean, *scale, *bias;
};

struct ForwardArgs {
  Geometry geometry;
  Act act;
  Residual residual_kind;
  const void *x, *residual;
  void* y;
  uint8_t* mask;  // null: not wanted
  Affine norm, residual_norm;
};

// The gradient of one BatchNorm's input: scale * g - (offset + slope * (x - mean)), in which only
// the first product, the last difference and scale itself round to more than a small part of the
// result; eval: scale * g.
struct BackwardNorm {
  const void *mean, *scale, *slope, *offset;
  bool training;
};

struct BackwardArgs {
  Geometry geometry;
  Act act;
  bool residual_norm;  // the residual has a BatchNorm of its own
  const void *dy, *x, *residual;
  const uint8_t* mask;
  void *dx, *dresidual;  // null: not wanted
  BackwardNorm norm, second;
};

// Sums of one backward pass, per channel: g, g*(x-mean), and the same of the residual's BatchNorm.
constexpr int kSums = 4;

// A part of a tensor: channels [c_lo, c_hi) of rows (channels_last) or images (NCHW) [lo, hi).
struct Part2d {
  int64_t lo, hi, c_lo, c_hi;
};

struct BnActKernels {
  // mean and sum of squared deviations of the part's channels
  void (*stats)(const void* x, const Geometry&, const Part2d&, double* mean, double* m2);
  // y and mask of the part
  void (*apply)(const ForwardArgs&, const Part2d&);
  // adds the part's sums to sums[kSums][stride]
  void (*sums)(const BackwardArgs&, const Part2d&, double* sums, int64_t stride);
  // dx and dresidual of the part
  void (*gradients)(const BackwardArgs&, const Part2d&);
};

namespace plain {
const BnActKernels& bn_act_kernels(Element);
}
#ifdef FUSED_RES_X86
namespace avx2 {
const BnActKernels& bn_act_kernels(Element);
}
namespace avx512 {
const BnActKernels& bn_act_kernels(Element);
}
#endif

}  // namespace fused_res
