// The arithmetic of bn_act on a CPU, compiled once per instruction set.
#include "bn_act_kernels.h"

#include "vec.h"

namespace fused_res::FUSED_RES_ISA {
namespace {

// Rows summed in the accumulation type before they are added to a double: bounds the rounding of a
// float sum, and small enough (with 2 vectors of columns) to stay in L1.
constexpr int64_t kTileRows = 32;
// With few rows nothing averages a float sum's rounding away, so less is summed in float.
inline int64_t rows_of_tile(const Geometry& g) { return g.runs <= 512 ? 4 : kTileRows; }
constexpr int64_t kTileElements = 1024;  // the same for a run of one channel (NCHW)

template <Act kAct>
struct ActTag {
  static constexpr Act value = kAct;
};

template <class Call>
inline void with_act(Act act, const Call& call) {
  if (act == Act::none) return call(ActTag<Act::none>{});
  if (act == Act::relu) return call(ActTag<Act::relu>{});
  return call(ActTag<Act::relu_before_add>{});
}

// Values per channel, for the elements of a run from i on: neighbours (channels_last; the arrays
// are padded to whole vectors) or the one value of channel c (NCHW).
template <class A, bool kChannelsLast>
inline Vec<A> per_channel(const void* array, int64_t c, int64_t i) {
  if (!array) return Vec<A>{};
  if constexpr (kChannelsLast)
    return load_raw<Vec<A>>((const A*)array + i, Full{});
  else
    return broadcast(((const A*)array)[c]);
}

// Calls body(run, i, values, lanes) for every vector of runs [begin, end), where values = make(c,
// i) are loaded once for kRows rows (channels_last) or for a whole run (NCHW).
template <bool kChannelsLast, class Make, class Body>
inline __attribute__((always_inline)) void over_runs(const Geometry& g, int64_t begin, int64_t end,
                                                     const Make& make, const Body& body) {
  if constexpr (kChannelsLast) {
    constexpr int64_t kRows = 2;
    for (int64_t tile = begin; tile < end; tile += kRows) {
      const int64_t tile_end = end - tile < kRows ? end : tile + kRows;
      over_run(g.inner, [&](int64_t i, auto lanes) {
        const auto values = make(0, i);
        for (int64_t run = tile; run < tile_end; run++) body(run, i, values, lanes);
      });
    }
  } else {
    for (int64_t run = begin; run < end; run++) {
      const auto values = make(run % g.channels, 0);
      over_run(g.inner, [&](int64_t i, auto lanes) { body(run, i, values, lanes); });
    }
  }
}

// --- statistics

// Sums of x - shift and its square over one tile of rows, for V vectors of columns.
template <class T, int V, class Lanes>
inline void stats_tile(const T* x, int64_t stride, int64_t rows, int64_t before, double* mean,
                       double* m2, Lanes lanes) {
  using A = AccOf<T>;
  Vec<A> shift[V], s[2][V] = {}, q[2][V] = {};
  if (before == 0) {  // shift by the mean of a few rows, in later tiles by the mean so far
    const int64_t few = rows < 8 ? rows : 8;
    for (int64_t r = 0; r < few; r++)
      for (int v = 0; v < V; v++) s[0][v] += load(x + r * stride + v * kLanes, lanes);
    for (int v = 0; v < V; v++) shift[v] = s[0][v] / (A)few, s[0][v] = Vec<A>{};
  } else {
    for (int v = 0; v < V; v++) shift[v] = load_doubles<A>(mean + v * kLanes);
  }
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2)
    for (int k = 0; k < 2; k++)
      for (int v = 0; v < V; v++) {
        const Vec<A> d = load(x + (r + k) * stride + v * kLanes, lanes) - shift[v];
        s[k][v] += d;
        q[k][v] += d * d;
      }
  if (r < rows)
    for (int v = 0; v < V; v++) {
      const Vec<A> d = load(x + r * stride + v * kLanes, lanes) - shift[v];
      s[0][v] += d;
      q[0][v] += d * d;
    }
  const double n = rows, weight = n / (before + n), inv_n = 1 / n;
#pragma GCC unroll 4
  for (int i = 0; i < 2 * V; i++) {  // Chan, Golub and LeVeque's merge, in double
    const int v = i / 2, h = i % 2;
    double *mean_at = mean + i * kHalf, *m2_at = m2 + i * kHalf;
    const HalfDoubles zero = {}, total = half_of<A>(s[0][v], h) + half_of<A>(s[1][v], h);
    const HalfDoubles square = half_of<A>(q[0][v], h) + half_of<A>(q[1][v], h);
    const HalfDoubles tile_m2 = square - total * total * inv_n;
    const HalfDoubles nonnegative = tile_m2 < zero ? zero : tile_m2;  // NaN stays NaN
    const HalfDoubles old_mean = before ? load_raw<HalfDoubles>(mean_at, Full{}) : zero;
    const HalfDoubles old_m2 = before ? load_raw<HalfDoubles>(m2_at, Full{}) : zero;
    const HalfDoubles delta = (half_of<A>(shift[v], h) - old_mean) + total * inv_n;
    store_raw(old_mean + delta * weight, mean_at, Full{});
    store_raw(old_m2 + nonnegative + delta * delta * (before * weight), m2_at, Full{});
  }
}

template <class T>
void stats_rows(const void* x_, const Geometry& g, int64_t lo, int64_t hi, double* mean,
                double* m2) {
  const T* x = (const T*)x_;
  const int64_t channels = g.channels, tile_rows = rows_of_tile(g);
  for (int64_t r = lo; r < hi; r += tile_rows) {
    const int64_t rows = hi - r < tile_rows ? hi - r : tile_rows, before = r - lo;
    const T* tile = x + r * channels;
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
      stats_tile<T, 2>(tile + c, channels, rows, before, mean + c, m2 + c, Full{});
    over_run(channels - c, [&](int64_t i, auto lanes) {
      stats_tile<T, 1>(tile + c + i, channels, rows, before, mean + c + i, m2 + c + i, lanes);
    });
  }
}

// step(v, i, lanes) over a segment with v cycling through 4 accumulators
template <class Step>
inline __attribute__((always_inline)) void over_segment(int64_t length, const Step& step) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes)
    for (int v = 0; v < 4; v++) step(v, i + v * kLanes, Full{});
  over_run(length - i, [&](int64_t j, auto lanes) { step(0, i + j, lanes); });
}

template <class A>
inline double take(Vec<A> (&accumulator)[4]) {
  const Vec<A> total = (accumulator[0] + accumulator[1]) + (accumulator[2] + accumulator[3]);
  for (int v = 0; v < 4; v++) accumulator[v] = Vec<A>{};
  return sum<A>(total);
}

template <class T>
inline double mean_of_segment(const T* x, int64_t length) {
  using A = AccOf<T>;
  Vec<A> s[4] = {};
  over_segment(length, [&](int v, int64_t i, auto lanes) { s[v] += load(x + i, lanes); });
  return take<A>(s) / length;
}

// The same over the runs of an NCHW tensor, a tile being (part of) one run.
template <class T>
void stats_images(const void* x_, const Geometry& g, const Part2d& part, double* mean, double* m2) {
  using A = AccOf<T>;
  const T* x = (const T*)x_;
  for (int64_t image = part.lo; image < part.hi; image++)
    for (int64_t i = 0; i < g.inner; i += kTileElements) {
      const int64_t length = g.inner - i < kTileElements ? g.inner - i : kTileElements;
      const double seen = (image - part.lo) * g.inner + i, n = length;
      const double weight = n / (seen + n), inv_n = 1 / n;
      for (int64_t c = part.c_lo; c < part.c_hi; c++) {
        const T* p = x + (image * g.channels + c) * g.inner + i;
        const A shift = (A)(seen == 0 ? mean_of_segment(p, length) : mean[c]);
        const Vec<A> shifts = broadcast(shift);
        // x in double, as PyTorch sums it here: the mean must not be worse than its
        HalfDoubles s[4][2] = {};
        Vec<A> q[4] = {};
        over_segment(length, [&](int v, int64_t j, auto lanes) {
          const Vec<A> value = load(p + j, lanes), d = first<A>(value - shifts, lanes);
          for (int h = 0; h < 2; h++) s[v][h] += half_of<A>(value, h);
          q[v] += d * d;
        });
        const HalfDoubles sums = ((s[0][0] + s[0][1]) + (s[1][0] + s[1][1])) +
                                 ((s[2][0] + s[2][1]) + (s[3][0] + s[3][1]));
        const double total = sum_halves<kHalf>(sums) - n * shift;
        const double tile_m2 = take<A>(q) - total * total * inv_n;
        const double old_mean = seen == 0 ? 0 : mean[c], old_m2 = seen == 0 ? 0 : m2[c];
        const double delta = (shift - old_mean) + total * inv_n;
        mean[c] = old_mean + delta * weight;
        m2[c] = old_m2 + (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * (seen * weight);
      }
    }
}

// --- forward

template <class T, bool kChannelsLast, Residual kResidual, Act kAct, bool kMask>
void apply(const ForwardArgs& a, int64_t begin, int64_t end) {
  using A = AccOf<T>;
  struct Values {
    Vec<A> mean, scale, bias, mean2, scale2, bias2;
  };
  const int64_t inner = a.geometry.inner, mask_stride = (inner + 7) / 8;
  const auto make = [&](int64_t c, int64_t i) {
    const auto at = [&](const void* array) { return per_channel<A, kChannelsLast>(array, c, i); };
    const Affine &n = a.norm, &n2 = a.residual_norm;
    return Values{at(n.mean), at(n.scale), at(n.bias), at(n2.mean), at(n2.scale), at(n2.bias)};
  };
  over_runs<kChannelsLast>(
      a.geometry, begin, end, make,
      [&](int64_t run, int64_t i, const Values& p, auto lanes) __attribute__((always_inline)) {
        const int64_t at = run * inner + i;
        Vec<A> v = (load((const T*)a.x + at, lanes) - p.mean) * p.scale + p.bias, r = {};
        if constexpr (kResidual != Residual::none) r = load((const T*)a.residual + at, lanes);
        // bias already holds both BatchNorms' where the ReLU comes after the add
        if constexpr (kResidual == Residual::norm) r = (r - p.mean2) * p.scale2;
        if constexpr (kResidual == Residual::norm && kAct == Act::relu_before_add) r += p.bias2;
        if constexpr (kResidual != Residual::none && kAct != Act::relu_before_add) v += r;
        if constexpr (kAct != Act::none) {
          const Mask<A> positive = not_below_zero<A>(v);
          v = keep<A>(positive, v);
          if constexpr (kMask)
            store_bits(to_bits<A>(positive), a.mask + run * mask_stride + i / 8, lanes);
        }
        if constexpr (kResidual != Residual::none && kAct == Act::relu_before_add) v += r;
        store(v, (T*)a.y + at, lanes);
      });
}

template <class T, bool kChannelsLast, Residual kResidual, Act kAct>
void apply_mask(const ForwardArgs& a, int64_t begin, int64_t end) {
  if (kAct != Act::none && a.mask)
    apply<T, kChannelsLast, kResidual, kAct, true>(a, begin, end);
  else
    apply<T, kChannelsLast, kResidual, kAct, false>(a, begin, end);
}

template <class T, bool kChannelsLast>
void apply_residual(const ForwardArgs& a, int64_t first, int64_t end) {
  with_act(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if (a.residual_kind == Residual::none)
      apply_mask<T, kChannelsLast, Residual::none, kAct>(a, first, end);
    else if (a.residual_kind == Residual::tensor)
      apply_mask<T, kChannelsLast, Residual::tensor, kAct>(a, first, end);
    else
      apply_mask<T, kChannelsLast, Residual::norm, kAct>(a, first, end);
  });
}

// --- backward

// the gradient that reaches the BatchNorm: dy where the ReLU let it through
template <class A, Act kAct, class Lanes>
inline Vec<A> masked(Vec<A> dy, const uint8_t* mask, int64_t element, Lanes lanes) {
  if constexpr (kAct == Act::none)
    return dy;
  else
    return keep<A>(from_bits<A>(load_bits(mask + element / 8, lanes)), dy);
}

inline const uint8_t* mask_of_run(const BackwardArgs& a, int64_t run) {
  return a.mask ? a.mask + run * ((a.geometry.inner + 7) / 8) : nullptr;
}

template <class A>
struct Accumulators {
  Vec<A> g = {}, gx = {}, g2 = {}, gx2 = {};
  Vec<A>& operator[](int k) { return k == 0 ? g : k == 1 ? gx : k == 2 ? g2 : gx2; }
};

template <class T, Act kAct, bool kSecond, class Lanes>
inline void accumulate(Accumulators<AccOf<T>>& sums, const T* dy, const uint8_t* mask,
                       int64_t element, const T* x, const T* residual, Vec<AccOf<T>> mean,
                       Vec<AccOf<T>> mean2, Lanes lanes) {
  using A = AccOf<T>;
  const Vec<A> raw = load(dy, lanes), g = masked<A, kAct>(raw, mask, element, lanes);
  sums.g += g;
  sums.gx += g * (load(x, lanes) - mean);
  if constexpr (kSecond) {  // a ReLU before the add does not touch the residual's gradient
    const Vec<A> g2 = kAct == Act::relu_before_add ? raw : g;
    sums.g2 += g2;
    sums.gx2 += g2 * (load(residual, lanes) - mean2);
  }
}

template <class T, Act kAct, bool kSecond>
void sums_rows(const BackwardArgs& a, int64_t lo, int64_t hi, double* totals, int64_t stride) {
  using A = AccOf<T>;
  const int64_t channels = a.geometry.inner;
  const T *dy = (const T*)a.dy, *x = (const T*)a.x, *residual = (const T*)a.residual;
  const int64_t tile_rows = rows_of_tile(a.geometry);
  for (int64_t tile = lo; tile < hi; tile += tile_rows) {
    const int64_t end = hi - tile < tile_rows ? hi : tile + tile_rows;
    over_run(channels, [&](int64_t c, auto lanes) {
      Accumulators<A> sums;
      const Vec<A> m = per_channel<A, true>(a.norm.mean, 0, c);
      const Vec<A> m2 = per_channel<A, true>(a.second.mean, 0, c);
      for (int64_t r = tile; r < end; r++) {
        const int64_t at = r * channels + c;
        accumulate<T, kAct, kSecond>(sums, dy + at, mask_of_run(a, r), c, x + at,
                                     residual + (kSecond ? at : 0), m, m2, lanes);
      }
      for (int k = 0; k < (kSecond ? kSums : 2); k++) {
        for (int h = 0; h < 2; h++) {
          double* total = totals + k * stride + c + h * kHalf;
          store_raw(load_raw<HalfDoubles>(total, Full{}) + half_of<A>(sums[k], h), total, Full{});
        }
      }
    });
  }
}

template <class T, Act kAct, bool kSecond>
void sums_images(const BackwardArgs& a, const Part2d& part, double* totals, int64_t stride) {
  using A = AccOf<T>;
  const int64_t inner = a.geometry.inner;
  const T *dy = (const T*)a.dy, *x = (const T*)a.x, *residual = (const T*)a.residual;
  for (int64_t image = part.lo; image < part.hi; image++)
    for (int64_t c = part.c_lo; c < part.c_hi; c++) {
      const int64_t run = image * a.geometry.channels + c, base = run * inner;
      const Vec<A> mean = per_channel<A, false>(a.norm.mean, c, 0);
      const Vec<A> mean2 = per_channel<A, false>(a.second.mean, c, 0);
      const uint8_t* mask = mask_of_run(a, run);
      for (int64_t begin = 0; begin < inner; begin += kTileElements) {
        Accumulators<A> sums[2];
        const int64_t length = inner - begin < kTileElements ? inner - begin : kTileElements;
        over_segment(length, [&](int v, int64_t i, auto lanes) {
          // lanes past the end: dy reads as zero there, so they add nothing
          const int64_t at = base + begin + i;
          accumulate<T, kAct, kSecond>(sums[v & 1], dy + at, mask, begin + i, x + at,
                                       residual + (kSecond ? at : 0), mean, mean2, lanes);
        });
        for (int k = 0; k < (kSecond ? kSums : 2); k++)
          totals[k * stride + c] += sum<A>(sums[0][k] + sums[1][k]);
      }
    }
}

template <class A>
struct GradientValues {
  Vec<A> mean, scale, slope, offset;
};

// the gradient of a BatchNorm's input from g, its output's
template <bool kTraining, class T, class Lanes>
inline Vec<AccOf<T>> input_gradient(const GradientValues<AccOf<T>>& p, Vec<AccOf<T>> g, const T* x,
                                    Lanes lanes) {
  if constexpr (kTraining) g = (g - p.offset) - p.slope * (load(x, lanes) - p.mean);
  return p.scale * g;
}

template <class T, bool kChannelsLast, Act kAct, bool kTraining>
void gradients(const BackwardArgs& a, int64_t begin, int64_t end) {
  using A = AccOf<T>;
  struct Values {
    GradientValues<A> main, second;
  };
  const auto make = [&](int64_t c, int64_t i) {
    const auto values = [&](const BackwardNorm& n) {
      const auto at = [&](const void* array) { return per_channel<A, kChannelsLast>(array, c, i); };
      return GradientValues<A>{at(n.mean), at(n.scale), at(n.slope), at(n.offset)};
    };
    return Values{values(a.norm), values(a.second)};
  };
  over_runs<kChannelsLast>(
      a.geometry, begin, end, make,
      [&](int64_t run, int64_t i, const Values& p, auto lanes) __attribute__((always_inline)) {
        const int64_t at = run * a.geometry.inner + i;
        const Vec<A> raw = load((const T*)a.dy + at, lanes);
        const Vec<A> g = masked<A, kAct>(raw, mask_of_run(a, run), i, lanes);
        if (a.dx)
          store(input_gradient<kTraining>(p.main, g, (const T*)a.x + at, lanes), (T*)a.dx + at,
                lanes);
        if (a.dresidual) {
          Vec<A> d = kAct == Act::relu_before_add ? raw : g;
          const T* residual = (const T*)a.residual + (a.residual_norm ? at : 0);
          if (a.residual_norm && a.second.training)
            d = input_gradient<true>(p.second, d, residual, lanes);
          else if (a.residual_norm)
            d = input_gradient<false>(p.second, d, residual, lanes);
          store(d, (T*)a.dresidual + at, lanes);
        }
      });
}

// --- one table per element type

template <class T>
constexpr BnActKernels table() {
  return {
      [](const void* x, const Geometry& g, const Part2d& part, double* mean, double* m2) {
        return g.channels_last ? stats_rows<T>(x, g, part.lo, part.hi, mean, m2)
                               : stats_images<T>(x, g, part, mean, m2);
      },
      [](const ForwardArgs& a, int64_t first, int64_t end) {
        return a.geometry.channels_last ? apply_residual<T, true>(a, first, end)
                                        : apply_residual<T, false>(a, first, end);
      },
      [](const BackwardArgs& a, const Part2d& part, double* sums, int64_t stride) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          if (a.geometry.channels_last)
            return a.residual_norm ? sums_rows<T, kAct, true>(a, part.lo, part.hi, sums, stride)
                                   : sums_rows<T, kAct, false>(a, part.lo, part.hi, sums, stride);
          return a.residual_norm ? sums_images<T, kAct, true>(a, part, sums, stride)
                                 : sums_images<T, kAct, false>(a, part, sums, stride);
        });
      },
      [](const BackwardArgs& a, int64_t first, int64_t end) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          if (a.norm.training)
            return a.geometry.channels_last ? gradients<T, true, kAct, true>(a, first, end)
                                            : gradients<T, false, kAct, true>(a, first, end);
          return a.geometry.channels_last ? gradients<T, true, kAct, false>(a, first, end)
                                          : gradients<T, false, kAct, false>(a, first, end);
        });
      },
  };
}

}  // namespace

const BnActKernels& bn_act_kernels(Element element) {
  static constexpr BnActKernels f32 = table<float>(), b16 = table<bf16>(), h16 = table<fp16>();
  switch (element) {
    case Element::bf16:
      return b16;
    case Element::f16:
      return h16;
#ifndef FUSED_RES_VECTOR_ISA  // double is for checking gradients: plain code is enough
    case Element::f64: {
      static constexpr BnActKernels f64 = table<double>();
      return f64;
    }
#endif
    default:
      return f32;
  }
}

}  // namespace fused_res::FUSED_RES_ISA
