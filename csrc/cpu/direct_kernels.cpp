// The arithmetic of a direct convolution, compiled once per instruction set.
#include "direct_kernels.h"

#include "multiply.h"

namespace fused_res::FUSED_RES_ISA {
namespace {

inline void copy(const float* from, float* to, int64_t count) {
  over_run(count, [&](int64_t i, auto lanes) { store(load(from + i, lanes), to + i, lanes); });
}
inline void clear(float* to, int64_t count) {
  over_run(count, [&](int64_t i, auto lanes) { store(V{}, to + i, lanes); });
}

// The inputs of one output pixel; where they are outside the image, zeros.
inline float* gather_pixel(const DirectSource& s, int64_t image, int64_t p, int64_t q, float* v) {
  const int64_t c = s.channels, h0 = p * s.stride[0] - s.padding[0];
  const int64_t w0 = q * s.stride[1] - s.padding[1];
  for (int64_t i = 0; i < s.kernel[0]; i++) {
    const int64_t h = h0 + i * s.dilation[0];
    const float* row = s.x + ((image * s.height + h) * s.width + w0) * c;
    if (h < 0 || h >= s.height) {
      clear(v, s.kernel[1] * c);
    } else if (s.dilation[1] == 1) {  // taps of a row lie side by side
      const int64_t lo = w0 < 0 ? (-w0 < s.kernel[1] ? -w0 : s.kernel[1]) : 0;
      const int64_t room = s.width - w0, end = room < s.kernel[1] ? room : s.kernel[1];
      const int64_t hi = end < lo ? lo : end;
      clear(v, lo * c);
      copy(row + lo * c, v + lo * c, (hi - lo) * c);
      clear(v + hi * c, (s.kernel[1] - hi) * c);
    } else {
      for (int64_t j = 0; j < s.kernel[1]; j++) {
        const int64_t w = w0 + j * s.dilation[1];
        if (w < 0 || w >= s.width)
          clear(v + j * c, c);
        else
          copy(row + j * s.dilation[1] * c, v + j * c, c);
      }
    }
    v += s.kernel[1] * c;
  }
  return v;
}

void gather(const DirectArgs& a, int64_t first, int64_t lo, int64_t hi, float* v,
            int64_t v_stride) {
  int64_t q = (first + lo) % a.out_width, p = (first + lo) / a.out_width % a.out_height;
  int64_t image = (first + lo) / (a.out_width * a.out_height);
  for (int64_t i = lo; i < hi; i++) {
    float* at = v + i * v_stride;
    for (int64_t s = 0; s < a.count; s++) at = gather_pixel(a.sources[s], image, p, q, at);
    if (++q < a.out_width) continue;
    q = 0;
    if (++p < a.out_height) continue;
    p = 0;
    image++;
  }
}

void multiply(const DirectArgs& a, int64_t first, int64_t lo, int64_t hi, const float* v,
              int64_t v_stride, int64_t panel, bool fetch, float* m) {
  const int64_t k0 = panel * kPanel;
  // A pixel's part of a panel is two lines, too far from the next pixel's for the processor to
  // guess
  for (int64_t r = lo; r < hi; r++)
    for (int64_t k = k0; k < k0 + kPanel; k += 16) {
      __builtin_prefetch(a.y + (first + r) * a.y_stride + k, 1, 1);
      if (a.residual) __builtin_prefetch(a.residual + (first + r) * a.residual_stride + k, 0, 1);
    }
  const int64_t room = a.out_channels - k0, y_stride = a.y_stride, r_stride = a.residual_stride;
  const float* bias = a.bias + k0;
  const float* residual = a.residual ? a.residual + (first + lo) * r_stride + k0 : nullptr;
  float* y = a.y + (first + lo) * y_stride + k0;
  const int act = (int)a.act;
  multiply_panel(hi - lo, room, a.depth, v + lo * v_stride, v_stride, a.u + k0 * a.depth, fetch,
                 [=](int64_t r, int64_t n, V sum, bool is_first, bool is_last) {
                   float* partial = m + r * kPanel + n;
                   if (!is_first) sum += load(partial, Full{});
                   if (!is_last) return store(sum, partial, Full{});
                   const float* add = residual ? residual + r * r_stride + n : nullptr;
                   float* to = y + r * y_stride + n;
                   if (room - n >= kLanes)
                     store_output(sum, bias + n, add, act, to, Full{});
                   else if (room > n)
                     store_output(sum, bias + n, add, act, to, Part{(int)(room - n)});
                 });
}

void accumulate(int64_t depth, int64_t count, const float* v, int64_t v_stride, const float* dy,
                bool first, float* dw) {
  const int64_t blocks = (depth + kMostRows - 1) / kMostRows;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t lo = depth * b / blocks, hi = depth * (b + 1) / blocks;
    accumulate_rows<kMostRows>(hi - lo, v + lo, v_stride, dy, count, first, dw + lo * kPanel);
  }
}

}  // namespace

const DirectKernels& direct_kernels() {
  static constexpr DirectKernels kernels = {gather, multiply, accumulate};
  return kernels;
}

}  // namespace fused_res::FUSED_RES_ISA
