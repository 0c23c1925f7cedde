// The arithmetic of Winograd's convolution, compiled once per instruction set.
#include "winograd_kernels.h"

#include <cstring>

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

// Where tiles of one row of an image's tiles lie: the i-th of `t` and up to `count` after it.
struct Row {
  int64_t image, h, w;  // of the first tile
  int64_t count;

  Row(const WinogradArgs& a, const WinogradTiles& t, int64_t i, int64_t most) {
    const int64_t tile = t.first + i, row = tile / a.tiles_w;
    image = row / a.tiles_h, h = row % a.tiles_h, w = tile % a.tiles_w;
    count = a.tiles_w - w < most ? a.tiles_w - w : most;
  }
};

// A row of tiles after the other, a vector of channels at a time, which keeps the columns that two
// tiles share.
template <int kTile>
void transform(const WinogradArgs& a, const WinogradTiles& t, int64_t lo, int64_t hi) {
  constexpr int kSize = kTile + 2;
  for (int64_t i = lo; i < hi;) {
    const Row row(a, t, i, hi - i);
    const int64_t h0 = row.h * kTile - a.pad_h, w0 = row.w * kTile - a.pad_w, count = row.count;
    const int64_t height = a.height, width = a.width, x_stride = a.x_stride;
    const int64_t v_stride = t.v_stride, v_plane = t.v_plane;
    const float* x = a.x + ((row.image * height + h0) * width + w0) * x_stride;
    float* v = t.v + i * v_stride;
    const bool inside = h0 >= 0 && h0 + kSize <= height;
    over_run(a.channels, [=](int64_t c, auto lanes) {
      V d[kSize], e[kSize][kSize], out[kSize];  // e: [point down][column]
      const auto column = [&](int64_t w, int to) {
        const float* at = x + w * x_stride + c;
        if (w0 + w < 0 || w0 + w >= width)
          for (int h = 0; h < kSize; h++) d[h] = V{};
        else if (inside)
          for (int h = 0; h < kSize; h++) d[h] = load(at + h * width * x_stride, lanes);
        else
          for (int h = 0; h < kSize; h++)
            d[h] = 0 <= h0 + h && h0 + h < height ? load(at + h * width * x_stride, lanes) : V{};
        input_points<kTile>(d, 1, out, 1);
        for (int h = 0; h < kSize; h++) e[h][to] = out[h];
      };
      for (int w = 0; w < 2; w++) column(w, w);
      for (int64_t n = 0; n < count; n++) {
        for (int w = 2; w < kSize; w++) {
          // lines too far apart for the processor to guess them
          const float* next = x + ((n + 2) * kTile + w) * x_stride + c;
          for (int h = 2; h < kSize; h++) __builtin_prefetch(next + h * width * x_stride);
          column(n * kTile + w, w);
        }
        float* to = v + n * v_stride + c;
        for (int h = 0; h < kSize; h++) {
          input_points<kTile>(e[h], 1, out, 1);
          for (int w = 0; w < kSize; w++) store(out[w], to + (h * kSize + w) * v_plane, lanes);
          for (int w = 0; w < 2; w++) e[h][w] = e[h][kTile + w];
        }
      }
    });
    i += count;
  }
}

void multiply(const WinogradArgs& a, const WinogradTiles& t, int64_t point, int64_t panel) {
  const int64_t panels = (a.out_channels + kPanel - 1) / kPanel, m_stride = panels * kPanel;
  const float* u = a.u + point * a.u_plane + panel * a.channels * kPanel;
  const float* v = t.v + point * t.v_plane;
  float* m = t.m + point * t.m_plane + panel * kPanel;
  multiply_panel(t.count, a.out_channels - panel * kPanel, a.channels, v, t.v_stride, u, true,
                 [=](int64_t r, int64_t n, V sum, bool first, bool) {
                   float* at = m + r * m_stride + n;
                   store(first ? sum : load(at, Full{}) + sum, at, Full{});
                 });
}

template <int kTile>
void finish(const WinogradArgs& a, const WinogradTiles& t, int64_t lo, int64_t hi) {
  constexpr int kSize = kTile + 2;
  const int64_t m_stride = (a.out_channels + kPanel - 1) / kPanel * kPanel, m_plane = t.m_plane;
  const int64_t y_stride = a.y_stride, r_stride = a.residual_stride, width = a.out_width;
  const float *bias = a.bias, *residual = a.residual;
  const int act = (int)a.act;
  float* y = a.y;
  for (int64_t i = lo; i < hi;) {
    const Row row(a, t, i, hi - i);
    const int64_t h0 = row.h * kTile;
    const int rows = (int)(a.out_height - h0 < kTile ? a.out_height - h0 : kTile);
    for (int64_t n = 0; n < row.count; n++) {
      const int64_t w0 = (row.w + n) * kTile, pixel0 = (row.image * a.out_height + h0) * width + w0;
      const int columns = (int)(width - w0 < kTile ? width - w0 : kTile);
      const float* m = t.m + (i + n) * m_stride;
      const auto of_lanes = [=](int rows, int columns, int64_t c,
                                auto lanes) __attribute__((always_inline)) {
        V d[kSize * kSize], e[kTile * kSize];
        for (int p = 0; p < kSize * kSize; p++) d[p] = load(m + p * m_plane + c, Full{});
        for (int w = 0; w < kSize; w++) outputs<kTile>(d + w, kSize, e + w, kSize);
        for (int h = 0; h < rows; h++) {
          V out[kTile];
          outputs<kTile>(e + h * kSize, 1, out, 1);
          for (int w = 0; w < columns; w++) {
            const int64_t pixel = pixel0 + h * width + w;
            store_output(out[w], bias + c, residual ? residual + pixel * r_stride + c : nullptr,
                         act, y + pixel * y_stride + c, lanes);
          }
        }
      };
      if (rows == kTile && columns == kTile)
        over_run(a.out_channels, [=](int64_t c, auto lanes) { of_lanes(kTile, kTile, c, lanes); });
      else
        over_run(a.out_channels, [=](int64_t c, auto lanes) { of_lanes(rows, columns, c, lanes); });
    }
    i += row.count;
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
  const int64_t y_stride = a.y_stride, line = a.out_width * y_stride, m_plane = t.m_plane;
  const int64_t panel_stride = t.count * kPanel, channels = a.out_channels;
  for (int64_t i = lo; i < hi;) {
    const Row row(a, t, i, hi - i);
    const int64_t pixel0 = (row.image * a.out_height + 2 * row.h) * a.out_width;
    const bool below = 2 * row.h + 1 < a.out_height;
    for (int64_t n = 0; n < row.count; n++) {
      const int64_t w0 = 2 * (row.w + n);
      const bool beside = w0 + 1 < a.out_width;
      const float* dy = a.y + (pixel0 + w0) * y_stride;
      float* m = t.m + (i + n) * kPanel;
      over_run(channels, [=](int64_t c, auto lanes) {
        const V d00 = load(dy + c, lanes), d01 = beside ? load(dy + y_stride + c, lanes) : V{};
        const V d10 = below ? load(dy + line + c, lanes) : V{};
        const V d11 = below && beside ? load(dy + line + y_stride + c, lanes) : V{};
        V e[8], out[4];  // [point down][column]
        gradient_points(d00, d10, e, 2);
        gradient_points(d01, d11, e + 1, 2);
        float* to = m + c / kPanel * panel_stride + c % kPanel;
        for (int h = 0; h < 4; h++) {
          gradient_points(e[2 * h], e[2 * h + 1], out, 1);
          for (int w = 0; w < 4; w++) store(out[w], to + (h * 4 + w) * m_plane, Full{});
        }
      });
    }
    i += row.count;
  }
}

// one value of each channel of a panel
using Floats = float __attribute__((vector_size(kPanel * sizeof(float))));
using Doubles = double __attribute__((vector_size(kPanel * sizeof(double))));

template <int kTile>
void pack(const Filters& f, const double* scale, float* u, int64_t lo, int64_t hi) {
  constexpr int kSize = kTile + 2;
  const int64_t channels = f.size[1], point = (f.size[0] + kPanel - 1) / kPanel * channels * kPanel;
  for (int64_t i = lo; i < hi; i++) {
    const int64_t k0 = i / channels * kPanel, c = i % channels;
    const int64_t count = f.size[0] - k0 < kPanel ? f.size[0] - k0 : kPanel;
    Doubles columns[3][3] = {}, rows[kSize][3], points[kSize];
    for (int r = 0; r < 3; r++)
      for (int s = 0; s < 3; s++)
        for (int64_t n = 0; n < count; n++) columns[s][r][n] = scale[k0 + n] * f(k0 + n, c, r, s);
    for (int s = 0; s < 3; s++) {
      filter_points(kTile, columns[s], points);
      for (int h = 0; h < kSize; h++) rows[h][s] = points[h];
    }
    for (int h = 0; h < kSize; h++) {
      filter_points(kTile, rows[h], points);
      for (int w = 0; w < kSize; w++) {
        const auto rounded = __builtin_convertvector(points[w], Floats);
        std::memcpy(u + (h * kSize + w) * point + i * kPanel, &rounded, sizeof rounded);
      }
    }
  }
}

void finish_gradient(const float* sums, int64_t parts, const Filters& like, float* gradient,
                     int64_t lo, int64_t hi) {
  const int64_t channels = like.size[1];
  const int64_t point = (like.size[0] + kPanel - 1) / kPanel * channels * kPanel;
  for (int64_t i = lo; i < hi; i++) {
    const int64_t k0 = i / channels * kPanel, c = i % channels;
    const int64_t count = like.size[0] - k0 < kPanel ? like.size[0] - k0 : kPanel;
    Floats u[4][4], rows[3][4], taps[3];
    for (int p = 0; p < 16; p++) {
      Floats total = {}, one;
      for (int64_t part = 0; part < parts; part++) {
        std::memcpy(&one, sums + (part * 16 + p) * point + i * kPanel, sizeof one);
        total += one;
      }
      u[p / 4][p % 4] = total;
    }
    for (int w = 0; w < 4; w++) {
      const Floats column[4] = {u[0][w], u[1][w], u[2][w], u[3][w]};
      filter_gradient(column, taps);
      for (int r = 0; r < 3; r++) rows[r][w] = taps[r];
    }
    for (int r = 0; r < 3; r++) {
      filter_gradient(rows[r], taps);
      for (int s = 0; s < 3; s++)
        for (int64_t n = 0; n < count; n++) gradient[like.at(k0 + n, c, r, s)] = taps[s][n];
    }
  }
}

}  // namespace

const WinogradKernels& winograd_kernels(int64_t tile) {
  static constexpr WinogradKernels two = {pack<2>,   transform<2>,       multiply,
                                          finish<2>, transform_gradient, finish_gradient},
                                   four = {pack<4>,   transform<4>, multiply,
                                           finish<4>, nullptr,      nullptr};
  return tile == 2 ? two : four;
}

}  // namespace fused_res::FUSED_RES_ISA
