// The interface between direct.cpp (tensors, threads) and direct_kernels.cpp (arithmetic, one
// object per instruction set). The inputs of an output pixel, in the order of the weight's rows,
// are one row of v: a tile of rows is gathered into the cache and multiplied there.
#pragma once
#include <stdint.h>

#include "bn_act_kernels.h"  // Act
#include "panel.h"

namespace fused_res {

// A convolution of one group; x is NHWC.
struct DirectSource {
  const float* x;
  int64_t height, width, channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t depth() const { return kernel[0] * kernel[1] * channels; }
};

struct DirectArgs {
  DirectSource sources[2];  // whose outputs are added: the second is a block's projection
  int64_t count, depth;     // of the sources, and of both together
  const float *u, *bias;    // [panel][depth][kPanel], [panel][kPanel]
  bool cached;              // the weights stay in the cache from one tile of rows to the next
  float* y;                 // strides are floats from pixel to pixel
  int64_t out_height, out_width, out_channels, y_stride;
  const float* residual;  // null: none
  int64_t residual_stride;
  Act act;
};

struct DirectKernels {
  // rows [lo, hi) of v, output pixels first + lo to first + hi
  void (*gather)(const DirectArgs&, int64_t first, int64_t lo, int64_t hi, float* v,
                 int64_t v_stride);
  // a panel of the output pixels first + [lo, hi). fetch: its weights may be in no cache yet. m:
  // space for (hi - lo) x kPanel
  void (*multiply)(const DirectArgs&, int64_t first, int64_t lo, int64_t hi, const float* v,
                   int64_t v_stride, int64_t panel, bool fetch, float* m);
  // dw[depth][kPanel] (+)= v^T dy of rows v[count][depth] and dy[count][kPanel]
  void (*accumulate)(int64_t depth, int64_t count, const float* v, int64_t v_stride,
                     const float* dy, bool first, float* dw);
};

namespace plain {
const DirectKernels& direct_kernels();
}
#ifdef FUSED_RES_X86
namespace avx2 {
const DirectKernels& direct_kernels();
}
namespace avx512 {
const DirectKernels& direct_kernels();
}
#endif

}  // namespace fused_res
