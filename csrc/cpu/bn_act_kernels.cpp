// The arithmetic of bn_act on a CPU, compiled once per instruction set.
#include "bn_act_kernels.h"

#include "vec.h"

namespace fused_res::FUSED_RES_ISA {
namespace {

// Rows summed in the accumulation type before they are added to a double: bounds the rounding of a
// float sum.
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

// Whether the runs of an output start at multiples of a vector and are worth storing past the
// caches
inline bool streams(const Geometry& g, const void* output) {
  return g.large && g.inner % kLanes == 0 && (uintptr_t)output % 64 == 0;
}

// Calls body(run, i, values, lanes) for every vector of a part, where values = make(c, i) are
// loaded once for two rows (channels_last; from memory for each, to read it in order) or for a run
// (NCHW).
template <bool kChannelsLast, class Make, class Body>
inline __attribute__((always_inline)) void over_part(const Geometry& g, const Part2d& part,
                                                     const Make& make, const Body& body) {
  if constexpr (kChannelsLast) {
    const int64_t rows = g.large ? 1 : 2;
    for (int64_t tile = part.lo; tile < part.hi; tile += rows) {
      const int64_t end = part.hi - tile < rows ? part.hi : tile + rows;
      over_run(part.c_hi - part.c_lo, [&](int64_t i, auto lanes) {
        const auto values = make(0, part.c_lo + i);
        for (int64_t run = tile; run < end; run++) body(run, part.c_lo + i, values, lanes);
      });
    }
  } else {
    for (int64_t image = part.lo; image < part.hi; image++)
      for (int64_t c = part.c_lo; c < part.c_hi; c++) {
        const auto values = make(c, 0);
        over_run(g.inner,
                 [&](int64_t i, auto lanes) { body(image * g.channels + c, i, values, lanes); });
      }
  }
}

// --- statistics

// How many rows of a tile are summed column by column: their sums stay in registers meanwhile. From
// memory about 512 bytes, in order: the prefetcher follows one stream a page. In a cache all of
// them, but a few of long rows, whose neighbours in a column share a set of L1.
inline int64_t rows_of_group(const Geometry& g, int64_t row_bytes) {
  if (g.large) return row_bytes < 512 ? 512 / row_bytes : 1;
  return row_bytes < 512 ? kTileRows : row_bytes < 4096 ? 8 : 4;
}

// Calls body(run, i, sums, lanes) for columns [0, columns) of rows [lo, hi), a group of rows at a
// time, between sums = begin(i), which fetches those of columns i.., and end(i, sums).
template <class Begin, class Body, class End>
inline __attribute__((always_inline)) void over_columns(int64_t columns, int64_t lo, int64_t hi,
                                                        int64_t group, const Begin& begin,
                                                        const Body& body, const End& end) {
  for (int64_t first = lo; first < hi; first += group) {
    const int64_t last = hi - first < group ? hi : first + group;
    over_run(columns, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      auto sums = begin(i);
      for (int64_t run = first; run < last; run++) body(run, i, sums, lanes);
      end(i, sums);
    });
  }
}

// Of a pass over a tile: their sums stay in L1 (40 KB) or L2, and rows of so many channels are read
// whole. By 512 of 1024 or 2048 took two to four times as long, from memory.
constexpr int64_t kColumns = 2048;

// The sums of one tile, in the accumulation type: of x - shift and of its square, those of the
// first and second half of the rows apart.
template <class A>
struct TileSums {
  alignas(64) A shift[kColumns], sum[2][kColumns], square[2][kColumns];

  // adds a tile of `rows` rows to mean and m2 of the `before` rows seen so far: Chan, Golub and
  // LeVeque's merge, in double
  void merge(int64_t rows, int64_t before, int64_t columns, double* mean, double* m2) const {
    const double n = rows, weight = n / (before + n), inv_n = 1 / n;
    for (int64_t c = 0; c < columns; c += kHalf) {  // the arrays are padded
      const HalfDoubles zero = {}, total = doubles(sum[0] + c) + doubles(sum[1] + c);
      const HalfDoubles squares = doubles(square[0] + c) + doubles(square[1] + c);
      const HalfDoubles tile_m2 = squares - total * total * inv_n;
      const HalfDoubles nonnegative = tile_m2 < zero ? zero : tile_m2;  // NaN stays NaN
      const HalfDoubles old_mean = before ? load_raw<HalfDoubles>(mean + c, Full{}) : zero;
      const HalfDoubles old_m2 = before ? load_raw<HalfDoubles>(m2 + c, Full{}) : zero;
      const HalfDoubles delta = (doubles(shift + c) - old_mean) + total * inv_n;
      store_raw(old_mean + delta * weight, mean + c, Full{});
      store_raw(old_m2 + nonnegative + delta * delta * (before * weight), m2 + c, Full{});
    }
  }
};

template <class T>
void stats_rows(const void* x_, const Geometry& g, const Part2d& part, double* mean_, double* m2_) {
  using A = AccOf<T>;
  struct Sums {
    Vec<A> shift, s, q;
  };
  TileSums<A> sums;
  const int64_t tile_rows = rows_of_tile(g);
  for (int64_t c = part.c_lo; c < part.c_hi; c += kColumns) {
    const int64_t columns = part.c_hi - c < kColumns ? part.c_hi - c : kColumns;
    const int64_t group = rows_of_group(g, columns * sizeof(T));
    const T* x = (const T*)x_ + c;
    double *mean = mean_ + c, *m2 = m2_ + c;
    for (int64_t r = part.lo; r < part.hi; r += tile_rows) {
      const int64_t end = part.hi - r < tile_rows ? part.hi : r + tile_rows;
      // shift by the median of three rows, which an outlier does not move; later by the mean so far
      over_run(columns, [&](int64_t i, auto lanes) {
        const auto row = [&](int64_t k) { return load(x + (r + k) * g.channels + i, lanes); };
        Vec<A> v = r == part.lo ? row(0) : load_doubles<A>(mean + i);
        if (r == part.lo && end - r >= 3) v = median<A>(v, row(1), row(2));
        store_raw(v, sums.shift + i, Full{});
        for (int half = 0; half < 2; half++) {
          store_raw(Vec<A>{}, sums.sum[half] + i, Full{});
          store_raw(Vec<A>{}, sums.square[half] + i, Full{});
        }
      });
      const int64_t middle = r + (end - r) / 2;
      for (int half = 0; half < 2; half++)
        over_columns(
            columns, half ? middle : r, half ? end : middle, group,
            [&](int64_t i) {
              return Sums{load_raw<Vec<A>>(sums.shift + i, Full{}),
                          load_raw<Vec<A>>(sums.sum[half] + i, Full{}),
                          load_raw<Vec<A>>(sums.square[half] + i, Full{})};
            },
            [&](int64_t run, int64_t i, Sums& v, auto lanes) __attribute__((always_inline)) {
              const Vec<A> d = load(x + run * g.channels + i, lanes) - v.shift;
              v.s += d;
              v.q += d * d;
            },
            [&](int64_t i, const Sums& v) {
              store_raw(v.s, sums.sum[half] + i, Full{});
              store_raw(v.q, sums.square[half] + i, Full{});
            });
      sums.merge(end - r, r - part.lo, columns, mean, m2);
    }
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

template <class T>
inline double mean_of_segment(const T* x, int64_t length) {
  using A = AccOf<T>;
  Vec<A> s[4] = {};
  over_segment(length, [&](int v, int64_t i, auto lanes) { s[v] += load(x + i, lanes); });
  return sum<A>((s[0] + s[1]) + (s[2] + s[3])) / length;
}

// A tile of an NCHW tensor: (part of) one run of a channel, or its runs in several images where
// they are short. Horizontal sums and merges come once a tile.
struct Tile {
  int64_t image, image_end, c, c_end, i, i_end;  // elements [i, i_end) of the runs
  int64_t length() const { return i_end - i; }
  int64_t values() const { return (image_end - image) * length(); }
};

constexpr int64_t kTileChannels = 64;  // of several images: their sums stay in L1

// body(tile) for all tiles of a part
template <class Body>
inline __attribute__((always_inline)) void over_tiles(const Geometry& g, const Part2d& part,
                                                      const Body& body) {
  // A quarter of a long tile: their sums take turns in fewer registers. And few images, because a
  // lane sums a value of each in float; as in rows_of_tile.
  const int64_t few = g.runs / g.channels * g.inner <= 2048 ? 2 : 8;
  const int64_t most = kTileElements / 4 / g.inner, images = most < 1 ? 1 : most < few ? most : few;
  const int64_t channels = images > 1 ? kTileChannels : 1;
  for (int64_t image = part.lo; image < part.hi; image += images)
    for (int64_t c = part.c_lo; c < part.c_hi; c += channels)
      for (int64_t i = 0; i < g.inner; i += kTileElements)
        body(Tile{image, part.hi - image < images ? part.hi : image + images, c,
                  part.c_hi - c < channels ? part.c_hi : c + channels, i,
                  g.inner - i < kTileElements ? g.inner : i + kTileElements});
}

template <class T>
void stats_images(const void* x_, const Geometry& g, const Part2d& part, double* mean_,
                  double* m2_) {
  using A = AccOf<T>;
  struct Sums {  // of x, in double as PyTorch sums it here (the mean must not be worse than its)
    A shift;
    HalfDoubles s;
    Vec<A> q;  // of the square of x - shift
  };
  const auto start = [](Sums& sums, A shift) {
    sums.shift = shift;
    sums.s = HalfDoubles{};
    sums.q = Vec<A>{};
  };
  const T* x = (const T*)x_;
  over_tiles(g, part, [&](const Tile& t) __attribute__((always_inline)) {
    const double before = (t.image - part.lo) * g.inner + t.i, n = t.values();
    const double weight = n / (before + n), inv_n = 1 / n;
    Sums sums[kTileChannels];
    double *mean = mean_ + t.c, *m2 = m2_ + t.c;
    const int64_t channels = t.c_end - t.c;
    for (int64_t image = t.image; image < t.image_end; image++) {
      const T* p = x + (image * g.channels + t.c) * g.inner + t.i;
      for (int64_t c = 0; c < channels; c++, p += g.inner) {
        if (image == t.image)
          start(sums[c], (A)(before == 0 ? mean_of_segment(p, t.length()) : mean[c]));
        const Vec<A> shifts = broadcast(sums[c].shift);
        HalfDoubles s[4][2] = {};
        Vec<A> q[4] = {};
        over_segment(t.length(), [&](int v, int64_t j, auto lanes) {
          const Vec<A> value = load(p + j, lanes), d = first<A>(value - shifts, lanes);
          for (int h = 0; h < 2; h++) s[v][h] += half_of<A>(value, h);
          q[v] += d * d;
        });
        sums[c].s += ((s[0][0] + s[0][1]) + (s[1][0] + s[1][1])) +
                     ((s[2][0] + s[2][1]) + (s[3][0] + s[3][1]));
        sums[c].q += (q[0] + q[1]) + (q[2] + q[3]);
      }
    }
    for (int64_t c = 0; c < channels; c++) {
      const double shift = sums[c].shift, total = sum_halves<kHalf>(sums[c].s) - n * shift;
      const double tile_m2 = sum<A>(sums[c].q) - total * total * inv_n;
      const double old_mean = before == 0 ? 0 : mean[c], old_m2 = before == 0 ? 0 : m2[c];
      const double delta = (shift - old_mean) + total * inv_n;
      mean[c] = old_mean + delta * weight;
      m2[c] = old_m2 + (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * (before * weight);
    }
  });
}

// --- forward

template <class T, bool kChannelsLast, Residual kResidual, Act kAct, bool kMask>
void apply(const ForwardArgs& a, const Part2d& part) {
  using A = AccOf<T>;
  struct Values {
    Vec<A> mean, scale, bias, mean2, scale2, bias2;
  };
  const int64_t inner = a.geometry.inner, mask_stride = (inner + 7) / 8;
  const bool streamed = streams(a.geometry, a.y);
  const auto make = [&](int64_t c, int64_t i) {
    const auto at = [&](const void* array) { return per_channel<A, kChannelsLast>(array, c, i); };
    const Affine &n = a.norm, &n2 = a.residual_norm;
    return Values{at(n.mean), at(n.scale), at(n.bias), at(n2.mean), at(n2.scale), at(n2.bias)};
  };
  over_part<kChannelsLast>(
      a.geometry, part, make,
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
        store(v, (T*)a.y + at, lanes, streamed);
      });
  if (streamed) fence();
}

template <class T, bool kChannelsLast, Residual kResidual, Act kAct>
void apply_mask(const ForwardArgs& a, const Part2d& part) {
  if (kAct != Act::none && a.mask)
    apply<T, kChannelsLast, kResidual, kAct, true>(a, part);
  else
    apply<T, kChannelsLast, kResidual, kAct, false>(a, part);
}

template <class T, bool kChannelsLast>
void apply_residual(const ForwardArgs& a, const Part2d& part) {
  with_act(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if (a.residual_kind == Residual::none)
      apply_mask<T, kChannelsLast, Residual::none, kAct>(a, part);
    else if (a.residual_kind == Residual::tensor)
      apply_mask<T, kChannelsLast, Residual::tensor, kAct>(a, part);
    else
      apply_mask<T, kChannelsLast, Residual::norm, kAct>(a, part);
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
void sums_rows(const BackwardArgs& a, const Part2d& part, double* totals, int64_t stride) {
  using A = AccOf<T>;
  constexpr int kWanted = kSecond ? kSums : 2;
  const int64_t channels = a.geometry.inner, tile_rows = rows_of_tile(a.geometry);
  const T *dy = (const T*)a.dy, *x = (const T*)a.x, *residual = (const T*)a.residual;
  alignas(64) A sums[kWanted][kColumns];
  for (int64_t c = part.c_lo; c < part.c_hi; c += kColumns) {
    const int64_t columns = part.c_hi - c < kColumns ? part.c_hi - c : kColumns;
    const int64_t group = rows_of_group(a.geometry, columns * sizeof(T));
    const int64_t padded_columns = (columns + kLanes - 1) / kLanes * kLanes;
    for (int64_t tile = part.lo; tile < part.hi; tile += tile_rows) {
      const int64_t end = part.hi - tile < tile_rows ? part.hi : tile + tile_rows;
      for (int k = 0; k < kWanted; k++) memset(sums[k], 0, padded_columns * sizeof(A));
      over_columns(
          columns, tile, end, group,
          [&](int64_t i) {
            Accumulators<A> v;
            for (int k = 0; k < kWanted; k++) v[k] = load_raw<Vec<A>>(sums[k] + i, Full{});
            return v;
          },
          [&](int64_t run, int64_t i, Accumulators<A>& v, auto lanes)
              __attribute__((always_inline)) {
                const int64_t at = run * channels + c + i;
                accumulate<T, kAct, kSecond>(v, dy + at, mask_of_run(a, run), c + i, x + at,
                                             residual + (kSecond ? at : 0),
                                             per_channel<A, true>(a.norm.mean, 0, c + i),
                                             per_channel<A, true>(a.second.mean, 0, c + i), lanes);
              },
          [&](int64_t i, Accumulators<A>& v) {
            for (int k = 0; k < kWanted; k++) store_raw(v[k], sums[k] + i, Full{});
          });
      for (int k = 0; k < kWanted; k++)
        for (int64_t i = 0; i < columns; i += kHalf) {
          double* total = totals + k * stride + c + i;
          store_raw(load_raw<HalfDoubles>(total, Full{}) + doubles(sums[k] + i), total, Full{});
        }
    }
  }
}

template <class T, Act kAct, bool kSecond>
void sums_images(const BackwardArgs& a, const Part2d& part, double* totals, int64_t stride) {
  using A = AccOf<T>;
  constexpr int kWanted = kSecond ? kSums : 2;
  const Geometry& g = a.geometry;
  const T *dy = (const T*)a.dy, *x = (const T*)a.x, *residual = (const T*)a.residual;
  over_tiles(g, part, [&](const Tile& t) __attribute__((always_inline)) {
    Vec<A> sums[kTileChannels][kWanted];
    const int64_t channels = t.c_end - t.c;
    for (int64_t image = t.image; image < t.image_end; image++)
      for (int64_t c = 0; c < channels; c++) {
        const int64_t run = image * g.channels + t.c + c, base = run * g.inner + t.i;
        const Vec<A> mean = per_channel<A, false>(a.norm.mean, t.c + c, 0);
        const Vec<A> mean2 = per_channel<A, false>(a.second.mean, t.c + c, 0);
        const uint8_t* mask = mask_of_run(a, run);
        Accumulators<A> s[2];
        over_segment(t.length(), [&](int v, int64_t i, auto lanes) {
          // lanes past the end: dy reads as zero there, so they add nothing
          accumulate<T, kAct, kSecond>(s[v & 1], dy + base + i, mask, t.i + i, x + base + i,
                                       residual + (kSecond ? base + i : 0), mean, mean2, lanes);
        });
        for (int k = 0; k < kWanted; k++)
          sums[c][k] = (image == t.image ? Vec<A>{} : sums[c][k]) + (s[0][k] + s[1][k]);
      }
    for (int64_t c = 0; c < channels; c++)
      for (int k = 0; k < kWanted; k++) totals[k * stride + t.c + c] += sum<A>(sums[c][k]);
  });
}

template <class A>
struct GradientValues {
  Vec<A> mean, scale, slope, offset;
};

// the gradient of a BatchNorm's input from g, its output's
template <bool kTraining, class T, class Lanes>
inline Vec<AccOf<T>> input_gradient(const GradientValues<AccOf<T>>& p, Vec<AccOf<T>> g, const T* x,
                                    Lanes lanes) {
  if constexpr (!kTraining) return p.scale * g;
  return p.scale * g - ((load(x, lanes) - p.mean) * p.slope + p.offset);
}

template <class T, bool kChannelsLast, Act kAct, bool kTraining>
void gradients(const BackwardArgs& a, const Part2d& part) {
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
  const bool streamed = streams(a.geometry, a.dx) && streams(a.geometry, a.dresidual);
  over_part<kChannelsLast>(
      a.geometry, part, make,
      [&](int64_t run, int64_t i, const Values& p, auto lanes) __attribute__((always_inline)) {
        const int64_t at = run * a.geometry.inner + i;
        const Vec<A> raw = load((const T*)a.dy + at, lanes);
        const Vec<A> g = masked<A, kAct>(raw, mask_of_run(a, run), i, lanes);
        if (a.dx)
          store(input_gradient<kTraining>(p.main, g, (const T*)a.x + at, lanes), (T*)a.dx + at,
                lanes, streamed);
        if (a.dresidual) {
          Vec<A> d = kAct == Act::relu_before_add ? raw : g;
          const T* residual = (const T*)a.residual + (a.residual_norm ? at : 0);
          if (a.residual_norm && a.second.training)
            d = input_gradient<true>(p.second, d, residual, lanes);
          else if (a.residual_norm)
            d = input_gradient<false>(p.second, d, residual, lanes);
          store(d, (T*)a.dresidual + at, lanes, streamed);
        }
      });
  if (streamed) fence();
}

// --- one table per element type

template <class T>
constexpr BnActKernels table() {
  return {
      [](const void* x, const Geometry& g, const Part2d& part, double* mean, double* m2) {
        return g.channels_last ? stats_rows<T>(x, g, part, mean, m2)
                               : stats_images<T>(x, g, part, mean, m2);
      },
      [](const ForwardArgs& a, const Part2d& part) {
        return a.geometry.channels_last ? apply_residual<T, true>(a, part)
                                        : apply_residual<T, false>(a, part);
      },
      [](const BackwardArgs& a, const Part2d& part, double* sums, int64_t stride) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          if (a.geometry.channels_last)
            return a.residual_norm ? sums_rows<T, kAct, true>(a, part, sums, stride)
                                   : sums_rows<T, kAct, false>(a, part, sums, stride);
          return a.residual_norm ? sums_images<T, kAct, true>(a, part, sums, stride)
                                 : sums_images<T, kAct, false>(a, part, sums, stride);
        });
      },
      [](const BackwardArgs& a, const Part2d& part) {
        with_act(a.act, [&](auto act) {
          constexpr Act kAct = decltype(act)::value;
          if (a.norm.training)
            return a.geometry.channels_last ? gradients<T, true, kAct, true>(a, part)
                                            : gradients<T, false, kAct, true>(a, part);
          return a.geometry.channels_last ? gradients<T, true, kAct, false>(a, part)
                                          : gradients<T, false, kAct, false>(a, part);
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
