// The arithmetic of bn_act on a CPU, compiled once per instruction set.
#include "bn_act_kernels.h"

#include "vec.h"

namespace fused_res::FUSED_RES_ISA {
namespace {

// Rows summed in the accumulation type before they are added to a double: bounds the rounding of a
// float sum, and small enough (with 2 vectors of columns) to stay in L1.
constexpr int64_t kTileRows = 32;
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

// A value per channel: a vector of neighbours (channels_last) or one value for the whole run (NCHW).
template <class A, bool kChannelsLast>
struct PerChannel {
  const A* p;
  Vec<A> same;
  PerChannel(const void* base, int64_t channel) : p((const A*)base) {
    if constexpr (!kChannelsLast) same = p ? broadcast(p[channel]) : Vec<A>{};
  }
  Vec<A> at(int64_t i) const {
    if constexpr (kChannelsLast) return load_raw<Vec<A>>(p + i, Full{});  // arrays are padded
    return same;
  }
};

// --- statistics -----------------------------------------------------------------------------------

// Sums of x - shift and its square over one tile of rows, for V vectors of columns.
template <class T, int V, class Lanes>
inline void stats_tile(const T* x, int64_t stride, int64_t rows, int64_t before, double* mean,
                       double* m2, Lanes lanes) {
  using A = AccOf<T>;
  Vec<A> shift[V], s[2][V] = {}, q[2][V] = {};
  if (before == 0) {  // the first tile shifts by its own mean, later ones by the mean so far
    for (int64_t r = 0; r < rows; r++)
      for (int v = 0; v < V; v++) s[0][v] += load(x + r * stride + v * kLanes, lanes);
    for (int v = 0; v < V; v++) shift[v] = s[0][v] / (A)rows, s[0][v] = Vec<A>{};
  } else {
    for (int v = 0; v < V; v++)
      shift[v] = __builtin_convertvector(load_raw<Vec<double>>(mean + v * kLanes, Full{}), Vec<A>);
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
  for (int v = 0; v < V; v++) {  // Chan, Golub and LeVeque's merge, in double
    const Vec<double> total = to_double<A>(s[0][v]) + to_double<A>(s[1][v]);
    const Vec<double> square = to_double<A>(q[0][v]) + to_double<A>(q[1][v]);
    const Vec<double> tile_m2 = square - total * total * inv_n;
    const Vec<double> zero = {}, nonnegative = tile_m2 < zero ? zero : tile_m2;  // NaN stays NaN
    Vec<double> old_mean = load_raw<Vec<double>>(mean + v * kLanes, Full{});
    Vec<double> old_m2 = load_raw<Vec<double>>(m2 + v * kLanes, Full{});
    if (before == 0) old_mean = old_m2 = zero;
    const Vec<double> delta = (to_double<A>(shift[v]) - old_mean) + total * inv_n;
    store_raw(old_mean + delta * weight, mean + v * kLanes, Full{});
    store_raw(old_m2 + nonnegative + delta * delta * (before * weight), m2 + v * kLanes, Full{});
  }
}

template <class T>
void stats_rows(const void* x_, int64_t channels, int64_t lo, int64_t hi, double* mean, double* m2) {
  const T* x = (const T*)x_;
  for (int64_t r = lo; r < hi; r += kTileRows) {
    const int64_t rows = hi - r < kTileRows ? hi - r : kTileRows, before = r - lo;
    const T* tile = x + r * channels;
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
      stats_tile<T, 2>(tile + c, channels, rows, before, mean + c, m2 + c, Full{});
    over_run(channels - c, [&](int64_t i, auto lanes) {
      stats_tile<T, 1>(tile + c + i, channels, rows, before, mean + c + i, m2 + c + i, lanes);
    });
  }
}

// Calls segment(run, begin, length) for all of channel c, and end_of_tile(elements) between tiles.
template <class Segment, class EndOfTile>
inline void over_channel(const Geometry& g, int64_t c, const Segment& segment,
                         const EndOfTile& end_of_tile) {
  int64_t pending = 0;
  for (int64_t run = c; run < g.runs; run += g.channels)
    for (int64_t i = 0; i < g.inner; i += kTileElements) {
      const int64_t length = g.inner - i < kTileElements ? g.inner - i : kTileElements;
      segment(run, i, length);
      pending += length;
      if (pending >= kTileElements) end_of_tile(pending), pending = 0;
    }
  if (pending) end_of_tile(pending);
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
void stats_channel(const void* x_, const Geometry& g, int64_t c, double* mean_out, double* m2_out) {
  using A = AccOf<T>;
  const T* x = (const T*)x_;
  double mean = 0, m2 = 0, seen = 0;
  {  // shift of the first tile: the mean of its first segment
    const int64_t length = g.inner < kTileElements ? g.inner : kTileElements;
    Vec<A> s[4] = {};
    over_segment(length, [&](int v, int64_t i, auto lanes) {
      s[v] += load(x + c * g.inner + i, lanes);
    });
    mean = take<A>(s) / length;
  }
  A shift = (A)mean;
  Vec<A> shifts = broadcast(shift), s[4] = {}, q[4] = {};
  over_channel(
      g, c,
      [&](int64_t run, int64_t begin, int64_t length) {
        const T* p = x + run * g.inner + begin;
        over_segment(length, [&](int v, int64_t i, auto lanes) {
          const Vec<A> d = keep<A>(first<A>(lanes), load(p + i, lanes) - shifts);
          s[v] += d;
          q[v] += d * d;
        });
      },
      [&](int64_t elements) {
        const double n = elements, total = take<A>(s), square = take<A>(q);
        const double tile_m2 = square - total * total / n;
        const double old_mean = seen == 0 ? 0 : mean;
        const double delta = ((double)shift - old_mean) + total / n, weight = n / (seen + n);
        mean = old_mean + delta * weight;
        m2 += (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * seen * weight;
        seen += n;
        shift = (A)mean;
        shifts = broadcast(shift);
      });
  *mean_out = mean;
  *m2_out = m2;
}

// --- forward --------------------------------------------------------------------------------------

template <class T, bool kChannelsLast, Residual kResidual, Act kAct>
void apply(const ForwardArgs& a, int64_t first_run, int64_t count, int64_t step) {
  using A = AccOf<T>;
  const int64_t inner = a.geometry.inner, mask_stride = (inner + 7) / 8;
  for (int64_t k = count - 1; k >= 0; k--) {
    const int64_t run = first_run + k * step;
    const int64_t c = kChannelsLast ? 0 : run % a.geometry.channels;
    const PerChannel<A, kChannelsLast> mean(a.norm.mean, c), scale(a.norm.scale, c),
        bias(a.norm.bias, c), mean2(a.residual_norm.mean, c), scale2(a.residual_norm.scale, c),
        bias2(a.residual_norm.bias, c);
    const T* x = (const T*)a.x + run * inner;
    const T* residual = (const T*)a.residual + (kResidual == Residual::none ? 0 : run * inner);
    T* y = (T*)a.y + run * inner;
    uint8_t* mask = a.mask ? a.mask + run * mask_stride : nullptr;
    over_run(inner, [&](int64_t i, auto lanes) {
      Vec<A> v = (load(x + i, lanes) - mean.at(i)) * scale.at(i) + bias.at(i), r = {};
      if constexpr (kResidual != Residual::none) r = load(residual + i, lanes);
      // bias already holds both BatchNorms' where the ReLU comes after the add
      if constexpr (kResidual == Residual::norm) r = (r - mean2.at(i)) * scale2.at(i);
      if constexpr (kResidual == Residual::norm && kAct == Act::relu_before_add)
        r += bias2.at(i);
      if constexpr (kResidual != Residual::none && kAct != Act::relu_before_add) v += r;
      if constexpr (kAct != Act::none) {
        const Mask<A> positive = ~(v <= Vec<A>{});  // NaN passes, as torch.relu lets it
        v = keep<A>(positive, v);
        if (mask) store_bits(to_bits<A>(positive), mask + i / 8, lanes);
      }
      if constexpr (kResidual != Residual::none && kAct == Act::relu_before_add) v += r;
      store(v, y + i, lanes);
    });
  }
}

template <class T, bool kChannelsLast>
void apply_residual(const ForwardArgs& a, int64_t first, int64_t count, int64_t step) {
  with_act(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if (a.residual_kind == Residual::none)
      apply<T, kChannelsLast, Residual::none, kAct>(a, first, count, step);
    else if (a.residual_kind == Residual::tensor)
      apply<T, kChannelsLast, Residual::tensor, kAct>(a, first, count, step);
    else
      apply<T, kChannelsLast, Residual::norm, kAct>(a, first, count, step);
  });
}

// --- backward -------------------------------------------------------------------------------------

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
  const PerChannel<A, true> mean(a.norm.mean, 0), mean2(a.second.mean, 0);
  const T *dy = (const T*)a.dy, *x = (const T*)a.x, *residual = (const T*)a.residual;
  for (int64_t tile = lo; tile < hi; tile += kTileRows) {
    const int64_t end = hi - tile < kTileRows ? hi : tile + kTileRows;
    over_run(channels, [&](int64_t c, auto lanes) {
      Accumulators<A> sums;
      const Vec<A> m = mean.at(c), m2 = kSecond ? mean2.at(c) : Vec<A>{};
      for (int64_t r = tile; r < end; r++) {
        const int64_t at = r * channels + c;
        accumulate<T, kAct, kSecond>(sums, dy + at, mask_of_run(a, r), c, x + at,
                                     residual + (kSecond ? at : 0), m, m2, lanes);
      }
      for (int k = 0; k < (kSecond ? kSums : 2); k++) {
        double* total = totals + k * stride + c;
        store_raw(load_raw<Vec<double>>(total, Full{}) + to_double<A>(sums[k]), total, Full{});
      }
    });
  }
}

template <class T, Act kAct, bool kSecond>
void sums_channel(const BackwardArgs& a, int64_t c, double* totals) {
  using A = AccOf<T>;
  const int64_t inner = a.geometry.inner;
  const PerChannel<A, false> mean(a.norm.mean, c), mean2(a.second.mean, c);
  const T *dy = (const T*)a.dy, *x = (const T*)a.x, *residual = (const T*)a.residual;
  Accumulators<A> sums[2];
  over_channel(
      a.geometry, c,
      [&](int64_t run, int64_t begin, int64_t length) {
        const int64_t base = run * inner + begin;
        const uint8_t* mask = mask_of_run(a, run);
        over_segment(length, [&](int v, int64_t i, auto lanes) {
          // lanes past the end: dy reads as zero there, so they add nothing
          accumulate<T, kAct, kSecond>(sums[v & 1], dy + base + i, mask, begin + i, x + base + i,
                                       residual + (kSecond ? base + i : 0), mean.at(0), mean2.at(0),
                                       lanes);
        });
      },
      [&](int64_t) {
        for (int k = 0; k < (kSecond ? kSums : 2); k++) totals[k] += sum<A>(sums[0][k] + sums[1][k]);
        sums[0] = sums[1] = Accumulators<A>{};
      });
}

template <class A, bool kChannelsLast>
struct InputGradient {
  const PerChannel<A, kChannelsLast> mean, scale, slope, offset;
  const bool training;
  InputGradient(const BackwardNorm& n, int64_t c)
      : mean(n.mean, c), scale(n.scale, c), slope(n.slope, c), offset(n.offset, c),
        training(n.training) {}
  template <class T, class Lanes>
  Vec<A> operator()(Vec<A> g, const T* x, int64_t i, Lanes lanes) const {
    Vec<A> d = scale.at(i) * g;
    if (training) d += slope.at(i) * (load(x + i, lanes) - mean.at(i)) + offset.at(i);
    return d;
  }
};

template <class T, bool kChannelsLast, Act kAct>
void gradients(const BackwardArgs& a, int64_t first_run, int64_t count, int64_t step) {
  using A = AccOf<T>;
  const int64_t inner = a.geometry.inner;
  for (int64_t k = count - 1; k >= 0; k--) {
    const int64_t run = first_run + k * step, base = run * inner;
    const int64_t c = kChannelsLast ? 0 : run % a.geometry.channels;
    const InputGradient<A, kChannelsLast> main(a.norm, c), second(a.second, c);
    const T *dy = (const T*)a.dy + base, *x = (const T*)a.x + base;
    const uint8_t* mask = mask_of_run(a, run);
    over_run(inner, [&](int64_t i, auto lanes) {
      const Vec<A> raw = load(dy + i, lanes), g = masked<A, kAct>(raw, mask, i, lanes);
      if (a.dx) store(main(g, x, i, lanes), (T*)a.dx + base + i, lanes);
      if (a.dresidual) {
        const Vec<A> g2 = kAct == Act::relu_before_add ? raw : g;
        store(a.residual_norm ? second(g2, (const T*)a.residual + base, i, lanes) : g2,
              (T*)a.dresidual + base + i, lanes);
      }
    });
  }
}

// --- one table per element type -----------------------------------------------------------------

template <class T>
constexpr BnActKernels table() {
  return {
      stats_rows<T>,
      stats_channel<T>,
      [](const ForwardArgs& a, int64_t first, int64_t count, int64_t step) {
        return a.geometry.channels_last ? apply_residual<T, true>(a, first, count, step)
                                        : apply_residual<T, false>(a, first, count, step);
      },
      [](const BackwardArgs& a, int64_t lo, int64_t hi, double* sums, int64_t stride) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          return a.residual_norm ? sums_rows<T, kAct, true>(a, lo, hi, sums, stride)
                                 : sums_rows<T, kAct, false>(a, lo, hi, sums, stride);
        });
      },
      [](const BackwardArgs& a, int64_t c, double* sums) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          return a.residual_norm ? sums_channel<T, kAct, true>(a, c, sums)
                                 : sums_channel<T, kAct, false>(a, c, sums);
        });
      },
      [](const BackwardArgs& a, int64_t first, int64_t count, int64_t step) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          return a.geometry.channels_last ? gradients<T, true, kAct>(a, first, count, step)
                                          : gradients<T, false, kAct>(a, first, count, step);
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
