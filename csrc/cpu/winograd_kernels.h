// The interface between winograd.cpp (tensors, threads) and winograd_kernels.cpp (arithmetic, one
// object per instruction set). Tiles of kTile x kTile outputs need kTile + 2 squared inputs; a
// tile's transforms are points of as many planes: v[point][tile][channel] and
// m[point][tile][channel out].
#pragma once
#include <stdint.h>

#include "bn_act_kernels.h"  // Act
#include "panel.h"

namespace fused_res {

// A 3x3 convolution of stride 1. Tensors are NHWC; strides are floats from pixel to pixel.
struct WinogradArgs {
  const float* x;
  int64_t height, width, channels, x_stride, pad_h, pad_w;
  const float* u;     // [point][panel][channel][kPanel]
  int64_t u_plane;    // floats from point to point
  const float* bias;  // of whole panels
  float* y;
  int64_t out_height, out_width, out_channels, y_stride;
  const float* residual;  // null: none
  int64_t residual_stride;
  Act act;
  int64_t tiles_h, tiles_w;  // of an image
};

// Some tiles [first, first + count) and where their transforms lie.
struct WinogradTiles {
  int64_t first, count;
  float *v, *m;
  int64_t v_stride;          // floats from tile to tile
  int64_t v_plane, m_plane;  // and from point to point
};

struct WinogradKernels {
  // u[point][panel][channel][kPanel] of the filters times scale (one of each output channel), of
  // the panels' channels [lo, hi), which count through; computed in double, rounded once
  void (*pack)(const Filters& filters, const double* scale, float* u, int64_t lo, int64_t hi);
  // v of the tiles [lo, hi) among them
  void (*transform)(const WinogradArgs&, const WinogradTiles&, int64_t lo, int64_t hi);
  // m of one point and panel
  void (*multiply)(const WinogradArgs&, const WinogradTiles&, int64_t point, int64_t panel);
  // y of the tiles [lo, hi) among them
  void (*finish)(const WinogradArgs&, const WinogradTiles&, int64_t lo, int64_t hi);
  // For the weight's gradient, of tiles of 2 alone: m[point][panel][tile][kPanel] of y's gradient
  // in y, of the tiles [lo, hi)
  void (*transform_gradient)(const WinogradArgs&, const WinogradTiles&, int64_t lo, int64_t hi);
  // and the gradient, laid out as `like`, of the panels' channels [lo, hi), of the products' sums:
  // of all parts, [part][point][panel][channel][kPanel]
  void (*finish_gradient)(const float* sums, int64_t parts, const Filters& like, float* gradient,
                          int64_t lo, int64_t hi);
};

namespace plain {
const WinogradKernels& winograd_kernels(int64_t tile);
}
#ifdef FUSED_RES_X86
namespace avx2 {
const WinogradKernels& winograd_kernels(int64_t tile);
}
namespace avx512 {
const WinogradKernels& winograd_kernels(int64_t tile);
}
#endif

}  // namespace fused_res
