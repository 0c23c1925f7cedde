// The arithmetic of Winograd's convolution, compiled once per instruction set.
#include "winograd_kernels.h"

#include "multiply.h"
#include "winograd_points.h"

namespace fused_res::FUSED_RES_ISA {
namespace {

// B^T d: values of the input's polynomial at the points
template <int kTile>
inline __attribute__((always_inline)) void input_points(const V* d, int64_t step, V* out,
                                                        int64_t out_step) {
  if constexpr (kTile == 2) {
    out[0] = d[0] - d[2 * step];
    out[out_step] = d[step] + d[2 * step];
    out[2 * out_step] = d[2 * step] - d[step];
    out[3 * out_step] = d[3 * step] - d[step];
  } else {
    constexpr float a = kPointA, b = kPointB, aa = a * a, bb = b * b;
    const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    out[0] = aa * bb * d[0] + (d4 - (aa + bb) * d2);
    const V even = d4 - bb * d2, odd = a * d3 - a * bb * d1;
    out[out_step] = even + odd;
    out[2 * out_step] = even - odd;
    const V even_b = d4 - aa * d2, odd_b = b * d3 - b * aa * d1;
    out[3 * out_step] = even_b + odd_b;
    out[4 * out_step] = even_b - odd_b;
    out[5 * out_step] = aa * bb * d1 + (d[5 * step] - (aa + bb) * d3);
  }
}

// A^T m: the outputs, from their values at the points
template <int kTile>
inline __attribute__((always_inline)) void outputs(const V* m, int64_t step, V* out,
                                                   int64_t out_step) {
  if constexpr (kTile == 2) {
    out[0] = m[0] + m[step] + m[2 * step];
    out[out_step] = m[step] - m[2 * step] + m[3 * step];
  } else {
    constexpr float a = kPointA, b = kPointB, aa = a * a, bb = b * b;
    const V even = m[step] + m[2 * step], odd = m[step] - m[2 * step];
    const V even_b = m[3 * step] + m[4 * step], odd_b = m[3 * step] - m[4 * step];
    out[0] = m[0] + even + even_b;
    out[out_step] = a * odd + b * odd_b;
    out[2 * out_step] = aa * even + bb * even_b;
    out[3 * out_step] = a * aa * odd + b * bb * odd_b + m[5 * step];
  }
}

template <int kTile>
void transform(const WinogradArgs& a, const WinogradTiles& t, int64_t lo, int64_t hi) {
  constexpr int kSize = kTile + 2;
  for (int64_t i = lo; i < hi; i++) {
    const int64_t tile = t.first + i, per_image = a.tiles_h * a.tiles_w;
    const int64_t image = tile / per_image, in_image = tile % per_image;
    const int64_t h0 = in_image / a.tiles_w * kTile - a.pad_h;
    const int64_t w0 = in_image % a.tiles_w * kTile - a.pad_w;
    const float* x = a.x + ((image * a.height + h0) * a.width + w0) * a.x_stride;
    const int64_t row = a.width * a.x_stride;
    // rows and columns of the tile that are inside the image
    const auto first = [](int64_t at) { return (int)(at < 0 ? (-at < kSize ? -at : kSize) : 0); };
    const auto last = [](int64_t at, int64_t size) {
      return (int)(size - at < kSize ? (size - at < 0 ? 0 : size - at) : kSize);
    };
    const int h_lo = first(h0), h_hi = last(h0, a.height), w_lo = first(w0),
              w_hi = last(w0, a.width);
    const bool inside = h_lo == 0 && w_lo == 0 && h_hi == kSize && w_hi == kSize;
    float* v = t.v + i * t.v_stride;
    // what the next tile needs beside this one's: its lines are too far apart for the processor to
    // guess them
    for (int h = 0; h < kSize; h++)
      for (int w = kSize; w < kSize + kTile; w++)
        for (int64_t c = 0; c < a.channels; c += 16)
          __builtin_prefetch(x + h * row + w * a.x_stride + c, 0, 1);
    const int64_t x_stride = a.x_stride, v_plane = t.v_plane;
    over_run(a.channels, [=](int64_t c, auto lanes) {
      V d[kSize * kSize], e[kSize * kSize];
      if (inside) {
        for (int h = 0; h < kSize; h++)
          for (int w = 0; w < kSize; w++)
            d[h * kSize + w] = load(x + h * row + w * x_stride + c, lanes);
      } else {
        for (int h = 0; h < kSize; h++)
          for (int w = 0; w < kSize; w++)
            d[h * kSize + w] = h_lo <= h && h < h_hi && w_lo <= w && w < w_hi
                                   ? load(x + h * row + w * x_stride + c, lanes)
                                   : V{};
      }
      for (int w = 0; w < kSize; w++) input_points<kTile>(d + w, kSize, e + w, kSize);
      for (int h = 0; h < kSize; h++) {
        V out[kSize];
        input_points<kTile>(e + h * kSize, 1, out, 1);
        for (int w = 0; w < kSize; w++) store(out[w], v + (h * kSize + w) * v_plane + c, lanes);
      }
    });
  }
}

void multiply(const WinogradArgs& a, const WinogradTiles& t, int64_t point, int64_t panel) {
  const int64_t panels = (a.out_channels + kPanel - 1) / kPanel, m_stride = panels * kPanel;
  const float* u = a.u + (point * panels + panel) * a.channels * kPanel;
  const float* v = t.v + point * t.v_plane;
  float* m = t.m + point * t.m_plane + panel * kPanel;
  multiply_panel(t.count, a.channels, v, t.v_stride, u, true,
                 [=](int64_t r, int64_t n, V sum, bool first, bool) {
                   float* at = m + r * m_stride + n;
                   store(first ? sum : load(at, Full{}) + sum, at, Full{});
                 });
}

template <int kTile>
void finish(const WinogradArgs& a, const WinogradTiles& t, int64_t lo, int64_t hi) {
  constexpr int kSize = kTile + 2;
  const int64_t m_stride = (a.out_channels + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = lo; i < hi; i++) {
    const int64_t tile = t.first + i, per_image = a.tiles_h * a.tiles_w;
    const int64_t image = tile / per_image, in_image = tile % per_image;
    const int64_t h0 = in_image / a.tiles_w * kTile, w0 = in_image % a.tiles_w * kTile;
    const int rows = (int)(a.out_height - h0 < kTile ? a.out_height - h0 : kTile);
    const int columns = (int)(a.out_width - w0 < kTile ? a.out_width - w0 : kTile);
    const int64_t pixel0 = (image * a.out_height + h0) * a.out_width + w0;
    const float* m = t.m + i * m_stride;
    for (int h = 0; h < kTile; h++)
      for (int w = kTile; w < 2 * kTile; w++)
        for (int64_t c = 0; c < a.out_channels; c += 16)
          __builtin_prefetch(a.y + (pixel0 + h * a.out_width + w) * a.y_stride + c, 1, 1);
    const int64_t m_plane = t.m_plane, y_stride = a.y_stride, r_stride = a.residual_stride;
    const int64_t width = a.out_width;
    const float *bias = a.bias, *residual = a.residual;
    float* y = a.y;
    const int act = (int)a.act;
    over_run(a.out_channels, [=](int64_t c, auto lanes) {
      V d[kSize * kSize], e[kTile * kSize];
      for (int p = 0; p < kSize * kSize; p++) d[p] = load(m + p * m_plane + c, Full{});
      for (int w = 0; w < kSize; w++) outputs<kTile>(d + w, kSize, e + w, kSize);
      for (int h = 0; h < rows; h++) {
        V out[kTile];
        outputs<kTile>(e + h * kSize, 1, out, 1);
        for (int w = 0; w < columns; w++) {
          const int64_t pixel = pixel0 + h * width + w;
          store_output(out[w], bias + c, residual ? residual + pixel * r_stride + c : nullptr, act,
                       y + pixel * y_stride + c, lanes);
        }
      }
    });
  }
}

// A dy A^T: `outputs` the other way round
inline __attribute__((always_inline)) void gradient_points(V a, V b, V* out, int64_t step) {
  out[0] = a;
  out[step] = a + b;
  out[2 * step] = a - b;
  out[3 * step] = b;
}

void transform_gradient(const WinogradArgs& a, const WinogradTiles& t, int64_t lo, int64_t hi) {
  const int64_t y_stride = a.y_stride, row = a.out_width * y_stride, m_plane = t.m_plane;
  const int64_t panel_stride = t.count * kPanel, channels = a.out_channels;
  for (int64_t i = lo; i < hi; i++) {
    const int64_t tile = t.first + i, per_image = a.tiles_h * a.tiles_w;
    const int64_t image = tile / per_image, in_image = tile % per_image;
    const int64_t h0 = in_image / a.tiles_w * 2, w0 = in_image % a.tiles_w * 2;
    const bool below = h0 + 1 < a.out_height, beside = w0 + 1 < a.out_width;
    const float* dy = a.y + ((image * a.out_height + h0) * a.out_width + w0) * y_stride;
    float* m = t.m + i * kPanel;
    const auto of_lanes = [=](int64_t c, auto lanes) {
      const V d00 = load(dy + c, lanes), d01 = beside ? load(dy + y_stride + c, lanes) : V{};
      const V d10 = below ? load(dy + row + c, lanes) : V{};
      const V d11 = below && beside ? load(dy + row + y_stride + c, lanes) : V{};
      V e[8], out[4];  // [point down][column]
      gradient_points(d00, d10, e, 2);
      gradient_points(d01, d11, e + 1, 2);
      for (int h = 0; h < 4; h++) {
        gradient_points(e[2 * h], e[2 * h + 1], out, 1);
        for (int w = 0; w < 4; w++)
          store(out[w], m + (h * 4 + w) * m_plane + c / kPanel * panel_stride + c % kPanel, Full{});
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) of_lanes(c, Full{});
    if (c < channels) of_lanes(c, Part{(int)(channels - c)});
  }
}

}  // namespace

const WinogradKernels& winograd_kernels(int64_t tile) {
  static constexpr WinogradKernels two = {transform<2>, multiply, finish<2>, transform_gradient},
                                   four = {transform<4>, multiply, finish<4>, nullptr};
  return tile == 2 ? two : four;
}

}  // namespace fused_res::FUSED_RES_ISA
