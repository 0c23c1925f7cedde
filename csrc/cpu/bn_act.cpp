// bn_act on the CPU: tensors in, tensors out, and how the work is cut up between threads. How it is
// cut depends on the shape alone, never on the number of threads, so every sum has one order.
#include "../bn_act_checks.h"

#include <cmath>

#include "bn_act.h"
#include "bn_act_kernels.h"
#include "isa.h"
#include "tensors.h"

namespace fused_res {
namespace {

const BnActKernels& kernels_for(ScalarType dtype) {
  Element element = Element::f32;
  if (dtype == ScalarType::BFloat16) element = Element::bf16;
  if (dtype == ScalarType::Half) element = Element::f16;
  if (dtype == ScalarType::Double) return plain::bn_act_kernels(Element::f64);
#ifdef FUSED_RES_X86
  if (isa() == Isa::avx512) return avx512::bn_act_kernels(element);
  if (isa() == Isa::avx2) return avx2::bn_act_kernels(element);
#endif
  return plain::bn_act_kernels(element);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t channels) { return ceil_div(channels, kMaxLanes) * kMaxLanes; }

// Bytes from which a tensor counts as large. A pass moves three or four of them; last-level caches
// hold 16 to 64 MB.
constexpr int64_t kLarge = 4 << 20;

Geometry geometry_of(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), hw = x.size(2) * x.size(3);
  const bool channels_last = hw == 1 || !x.is_contiguous();
  const bool large = x.numel() * (int64_t)x.element_size() >= kLarge;
  return channels_last ? Geometry{n * hw, c, c, true, large} : Geometry{n * c, hw, c, false, large};
}

constexpr int64_t kMerged = 64;  // channels whose chunks are merged at a time

// How a tensor is cut up: in chunks of rows (channels_last) or of images (NCHW), and these in
// blocks of channels. Sums are taken chunk by chunk and merged in their order, which depends on the
// shape alone; how many blocks there are changes no result.
struct Parts {
  Geometry g;
  int64_t rows, chunk, chunks, block, blocks;

  // At most about 64 parts, of 64 KB (float) or more.
  explicit Parts(const Geometry& g) : g(g), rows(g.channels_last ? g.runs : g.runs / g.channels) {
    constexpr int64_t kElements = 1 << 14, kMax = 64;
    const int64_t most = std::clamp<int64_t>(g.runs * g.inner / kElements, 1, kMax);
    // A chunk reads its first image (of 8 at least) twice.
    const int64_t least = std::min<int64_t>(rows, g.channels_last ? 128 : 8);
    chunk = std::max(ceil_div(rows, most), least);
    chunks = ceil_div(rows, chunk);
    // channels_last rows are read whole: by blocks of channels that stay in a core's cache from one
    // pass to the next was slower (threads share pairs of lines; 32x512x7x7: 0.19 to 0.16 ms)
    block =
        g.channels_last ? g.channels : ceil_div(g.channels, std::max<int64_t>(1, most / chunks));
    blocks = ceil_div(g.channels, block);
  }

  int64_t count() const { return chunks * blocks; }
  Part2d part(int64_t k, int64_t b) const {
    return {k * chunk, std::min(rows, (k + 1) * chunk), b * block,
            std::min(g.channels, (b + 1) * block)};
  }
  double values(int64_t k) const {  // per channel in chunk k
    const int64_t rows_of_chunk = std::min(rows, (k + 1) * chunk) - k * chunk;
    return rows_of_chunk * (g.channels_last ? 1 : g.inner);
  }

  // f(chunk, block) for every part, in parallel
  template <class F>
  void each(const F& f) const {
    parallel(count(), g.runs * g.inner, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; i++) f(i / blocks, i % blocks);
    });
  }

  // merge(first channel, channels) for all channels, few enough at a time for their sums to stay in
  // L1, in parallel
  template <class F>
  void merge(const F& f) const {
    parallel(ceil_div(g.channels, kMerged), g.channels * chunks, [&](int64_t lo, int64_t hi) {
      for (int64_t c = lo * kMerged; c < std::min(g.channels, hi * kMerged); c += kMerged)
        f(c, std::min(kMerged, g.channels - c));
    });
  }
};

// Kept between calls: a fresh mapping a call would cost more in page faults than the sums do.
double* scratch(int64_t doubles) {
  thread_local std::vector<double> buffer;
  if ((int64_t)buffer.size() < doubles) buffer.resize(doubles);
  std::fill_n(buffer.begin(), doubles, 0.0);
  return buffer.data();
}

// Mean and sum of squared deviations of a few channels, of all chunks merged in their order.
struct Moments {
  double mean[kMerged] = {}, m2[kMerged] = {};

  // those of chunk k are at partial + k * stride, one array `width` behind the other
  void merge(const Parts& parts, const double* partial, int64_t stride, int64_t width, int64_t n) {
    double seen = 0;
    for (int64_t k = 0; k < parts.chunks; k++, partial += stride) {
      const double values = parts.values(k), weight = values / (seen + values);
      for (int64_t c = 0; c < n; c++) {
        const double delta = partial[c] - mean[c];
        mean[c] += delta * weight;
        m2[c] += partial[width + c] + delta * delta * (seen * weight);
      }
      seen += values;
    }
  }
};

// One BatchNorm of the forward pass: its arrays per channel, A the accumulation type.
template <class A>
struct ForwardNorm {
  const BatchNorm& bn;
  int64_t channels, count;
  std::vector<double> weight, bias, running_mean, running_var;
  std::vector<A> mean, scale, shift;
  A *saved_mean, *saved_invstd;

  ForwardNorm(const BatchNorm& bn, int64_t channels, int64_t count, A* saved)
      : bn(bn), channels(channels), count(count), weight(read_channels(bn.weight, channels, 1)),
        bias(read_channels(bn.bias, channels, 0)),
        running_mean(read_channels(bn.running_mean, channels, 0)),
        running_var(read_channels(bn.running_var, channels, 1)), mean(padded(channels)),
        scale(padded(channels)), shift(padded(channels)), saved_mean(saved),
        saved_invstd(saved + channels) {}

  // from the batch's mean and sum of squared deviations (training) or the running statistics
  void finish(int64_t c, double batch_mean, double m2) {
    double var = m2 / count;
    if (bn.training) {
      const double unbiased = m2 / (count - 1), momentum = bn.momentum;
      running_mean[c] = (1 - momentum) * running_mean[c] + momentum * batch_mean;
      running_var[c] = (1 - momentum) * running_var[c] + momentum * unbiased;
    } else {
      batch_mean = running_mean[c];
      var = running_var[c];
    }
    const double invstd = 1 / std::sqrt(var + bn.eps), s = weight[c] * invstd;
    saved_mean[c] = (A)batch_mean;
    saved_invstd[c] = (A)invstd;
    scale[c] = (A)s;
    // A mean under a standard deviation goes into the shift, which rounds once less than x - mean;
    // a larger one is subtracted first, and the shift takes what rounding it lost.
    mean[c] = std::abs(batch_mean) * invstd < 1 ? 0 : saved_mean[c];
    shift[c] = (A)(bias[c] + ((double)mean[c] - batch_mean) * s);
  }

  Affine affine() const { return {mean.data(), scale.data(), shift.data()}; }

  void write_affine(A* rows) const {
    for (const std::vector<A>* row : {&mean, &scale, &shift}) {
      std::copy_n(row->begin(), channels, rows);
      rows += channels;
    }
  }

  void write_running_statistics() const {
    if (!bn.training || !bn.running_mean) return;
    write_channels(running_mean, *bn.running_mean);
    write_channels(running_var, *bn.running_var);
  }
};

template <class A>
struct Forward {
  const BnActKernels& kernels;
  ForwardArgs args;
  ForwardNorm<A>& main;
  ForwardNorm<A>* second;  // the residual's, or null

  // all statistics of channel c are known: they become the affine of the pass
  void finish(int64_t c, const double* mean, const double* m2) {
    main.finish(c, mean[0], m2[0]);
    if (!second) return;
    second->finish(c, mean[1], m2[1]);
    if (args.act != Act::relu_before_add) main.shift[c] += second->shift[c];
  }

  void run() {
    const Parts parts(args.geometry);
    const auto apply = [&](int64_t k, int64_t b) { kernels.apply(args, parts.part(k, b)); };
    const bool second_trains = second && second->bn.training;
    if (!main.bn.training && !second_trains) {
      const double none[2] = {0, 0};
      for (int64_t c = 0; c < main.channels; c++) finish(c, none, none);
      return parts.each(apply);
    }
    const int64_t width = padded(main.channels);
    double* partial = scratch(parts.chunks * 4 * width);  // [chunk][mean, m2 of both][channel]
    parts.each([&](int64_t k, int64_t b) {
      double* p = partial + k * 4 * width;
      const Part2d part = parts.part(k, b);
      if (main.bn.training) kernels.stats(args.x, args.geometry, part, p, p + width);
      if (second_trains)
        kernels.stats(args.residual, args.geometry, part, p + 2 * width, p + 3 * width);
    });
    parts.merge([&](int64_t first, int64_t n) { merge(parts, partial, first, n); });
    parts.each(apply);
  }

  void merge(const Parts& parts, const double* partial, int64_t first, int64_t n) {
    const int64_t width = padded(main.channels);
    Moments moments[2];
    for (int which = 0; which < (second ? 2 : 1); which++)
      moments[which].merge(parts, partial + which * 2 * width + first, 4 * width, width, n);
    for (int64_t c = 0; c < n; c++) {
      const double means[2] = {moments[0].mean[c], moments[1].mean[c]};
      const double m2s[2] = {moments[0].m2[c], moments[1].m2[c]};
      finish(first + c, means, m2s);
    }
  }
};

// One BatchNorm of the backward pass.
template <class A>
struct BackwardChannels {
  const BatchNormSaved& bn;
  int64_t channels, count;
  std::vector<double> weight;
  const A *saved_mean, *saved_invstd;
  std::vector<A> mean, scale, slope, offset;
  std::vector<double> dweight, dbias;

  BackwardChannels(const BatchNormSaved& bn, int64_t channels, int64_t count, const A* saved)
      : bn(bn), channels(channels), count(count), weight(read_channels(bn.weight, channels, 1)),
        saved_mean(saved), saved_invstd(saved + channels), mean(padded(channels)),
        scale(padded(channels)), slope(padded(channels)), offset(padded(channels)),
        dweight(channels), dbias(channels) {
    for (int64_t c = 0; c < channels; c++) {
      mean[c] = saved_mean[c];
      scale[c] = (A)(weight[c] * saved_invstd[c]);
    }
  }

  void finish(int64_t c, double sum_g, double sum_gx) {
    const double invstd = saved_invstd[c];
    dbias[c] = sum_g;
    dweight[c] = sum_gx * invstd;
    slope[c] = (A)(weight[c] * invstd * invstd * dweight[c] / count);
    offset[c] = (A)(weight[c] * invstd * sum_g / count);
  }

  BackwardNorm arrays() const {
    return {mean.data(), scale.data(), slope.data(), offset.data(), bn.training};
  }
};

template <class A>
struct Backward {
  const BnActKernels& kernels;
  BackwardArgs args;
  BackwardChannels<A>& main;
  BackwardChannels<A>* second;
  bool writes;  // the gradients

  void finish(int64_t c, const double* sums, int64_t stride) {
    main.finish(c, sums[0], sums[stride]);
    if (second) second->finish(c, sums[2 * stride], sums[3 * stride]);
  }

  void run(bool sums_wanted, const double* given) {
    const Parts parts(args.geometry);
    const auto apply = [&](int64_t k, int64_t b) {
      if (writes && (args.dx || args.dresidual)) kernels.gradients(args, parts.part(k, b));
    };
    if (given) {
      for (int64_t c = 0; c < main.channels; c++) finish(c, given + c, main.channels);
      return parts.each(apply);
    }
    if (!sums_wanted) return parts.each(apply);
    const int64_t width = padded(main.channels);
    double* partial = scratch(parts.chunks * kSums * width);
    parts.each([&](int64_t k, int64_t b) {
      kernels.sums(args, parts.part(k, b), partial + k * kSums * width, width);
    });
    parts.merge([&](int64_t first, int64_t n) {
      double sums[kSums][kMerged] = {};
      for (int64_t k = 0; k < parts.chunks; k++)
        for (int i = 0; i < (second ? kSums : 2); i++) {
          const double* p = partial + (k * kSums + i) * width + first;
          for (int64_t c = 0; c < n; c++) sums[i][c] += p[c];
        }
      for (int64_t c = 0; c < n; c++) finish(first + c, &sums[0][c], kMerged);
    });
    parts.each(apply);
  }
};

// Of a call whose tensors are dense.
template <class A>
BnActForward forward(const BnActForwardCall& call) {
  const Tensor& x = call.x;
  const OptTensor& residual = call.residual;
  const BatchNorm* residual_bn = call.residual_norm ? &*call.residual_norm : nullptr;
  const Act act = (Act)call.act;
  const Geometry g = geometry_of(x);
  const int64_t channels = g.channels, elements = g.runs * g.inner, count = elements / channels;
  const bool masked = act != Act::none && call.save_mask;
  Tensor y = uninitialised_like(x);
  Tensor mask = uninitialised(masked ? g.runs : 0, ceil_div(g.inner, 8), ScalarType::Byte);
  Tensor stats = uninitialised(stats_rows(residual_bn), channels,
                               std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* saved = (A*)stats.mutable_data_ptr();
  ForwardNorm<A> main(call.norm, channels, count, saved);
  std::optional<ForwardNorm<A>> second;
  if (residual_bn) second.emplace(*residual_bn, channels, count, saved + 2 * channels);
  const ForwardArgs args{
      g,
      act,
      residual_bn ? Residual::norm : (residual ? Residual::tensor : Residual::none),
      x.const_data_ptr(),
      residual ? residual->const_data_ptr() : nullptr,
      y.mutable_data_ptr(),
      masked ? (uint8_t*)mask.mutable_data_ptr() : nullptr,
      main.affine(),
      second ? second->affine() : Affine{}};
  Forward<A>{kernels_for(x.scalar_type()), args, main, second ? &*second : nullptr}.run();
  main.write_affine(saved + (residual_bn ? 4 : 2) * channels);
  main.write_running_statistics();
  if (second) second->write_running_statistics();
  return {y, mask, stats};
}

template <class A>
std::array<Tensor, 2> reapply(const Tensor& x, const Tensor& stats) {
  const Geometry g = geometry_of(x);
  Tensor y = uninitialised_like(x);
  Tensor mask = uninitialised(g.runs, ceil_div(g.inner, 8), ScalarType::Byte);
  std::vector<A> affine(3 * padded(g.channels));
  const A* rows[3];
  for (int i = 0; i < 3; i++) {
    A* row = affine.data() + i * padded(g.channels);
    rows[i] = row;
    std::copy_n((const A*)stats.const_data_ptr() + (2 + i) * g.channels, g.channels, row);
  }
  const ForwardArgs args{g,
                         Act::relu,
                         Residual::none,
                         x.const_data_ptr(),
                         nullptr,
                         y.mutable_data_ptr(),
                         (uint8_t*)mask.mutable_data_ptr(),
                         {rows[0], rows[1], rows[2]},
                         {}};
  const Parts parts(g);
  const BnActKernels& kernels = kernels_for(x.scalar_type());
  parts.each([&](int64_t k, int64_t b) { kernels.apply(args, parts.part(k, b)); });
  return {y, mask};
}

// Both BatchNorms of a backward pass.
template <class A>
struct BackwardNorms {
  BackwardChannels<A> main;
  std::optional<BackwardChannels<A>> second;

  BackwardNorms(const BnActBackwardCall& call, int64_t channels, int64_t count)
      : main(call.norm, channels, count, (const A*)call.stats.const_data_ptr()) {
    const A* saved = (const A*)call.stats.const_data_ptr() + 2 * channels;
    if (call.residual_norm) second.emplace(*call.residual_norm, channels, count, saved);
  }

  BackwardChannels<A>* shortcut() { return second ? &*second : nullptr; }
};

bool needs_sums(const BnActBackwardCall& call) {
  const BnActWanted& wanted = call.wanted;
  return wanted.parameters || (wanted.x && call.norm.training) ||
         (wanted.residual && call.residual_norm && call.residual_norm->training);
}

// Of a call whose tensors are dense.
template <class A>
BnActBackward backward(const BnActBackwardCall& call, Later* later) {
  const Tensor& x = call.x;
  const BnActWanted& wanted = call.wanted;
  const Geometry g = geometry_of(x);
  const int64_t channels = g.channels, count = g.runs * g.inner / channels;
  const auto nothing = [&] { return uninitialised(0, x.scalar_type()); };  // outputs never alias
  const Tensor dx = wanted.x ? uninitialised_like(x) : nothing();
  const Tensor dresidual = wanted.residual ? uninitialised_like(x) : nothing();
  const auto norms = std::make_shared<BackwardNorms<A>>(call, channels, count);
  BackwardChannels<A>& main = norms->main;
  BackwardChannels<A>* shortcut = norms->shortcut();
  const bool deferred = later && g.channels_last, relu = (Act)call.act != Act::none;
  BackwardArgs args{g,
                    (Act)call.act,
                    shortcut != nullptr,
                    call.dy.const_data_ptr(),
                    x.const_data_ptr(),
                    call.residual ? call.residual->const_data_ptr() : nullptr,
                    relu ? (const uint8_t*)call.mask.const_data_ptr() : nullptr,
                    wanted.x ? dx.mutable_data_ptr() : nullptr,
                    wanted.residual ? dresidual.mutable_data_ptr() : nullptr,
                    main.arrays(),
                    shortcut ? shortcut->arrays() : BackwardNorm{}};
  const BnActKernels& kernels = kernels_for(x.scalar_type());
  Backward<A>{kernels, args, main, shortcut, !deferred}.run(
      needs_sums(call), call.sums ? (const double*)call.sums->const_data_ptr() : nullptr);
  if (deferred) {
    args.geometry.large = false;  // what reads the gradients does so while they are in a cache
    *later = [norms, args, &kernels, keep = std::array{call.dy, x, call.mask, dx, dresidual},
              residual = call.residual](int64_t lo, int64_t hi) {
      kernels.gradients(args, {lo, hi, 0, args.geometry.channels});
    };
  }
  const auto parameter = [&](const BackwardChannels<A>* norm, bool weight) {
    if (!norm || !norm->bn.weight || !wanted.parameters) return nothing();
    Tensor gradient = uninitialised(channels, norm->bn.weight->scalar_type());
    write_channels(weight ? norm->dweight : norm->dbias, gradient);
    return gradient;
  };
  return {dx,        parameter(&main, true),    parameter(&main, false),
          dresidual, parameter(shortcut, true), parameter(shortcut, false)};
}

void check_input(const Tensor& x, int64_t act) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be a non-empty tensor (N, C, H, W)");
  check_act(act);
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

bool are_stats(const Tensor& stats, bool residual_norm, const Tensor& x) {
  return stats.dim() == 2 && stats.size(0) == stats_rows(residual_norm) &&
         stats.size(1) == x.size(1) && stats.is_contiguous() && is_double(stats) == is_double(x);
}

}  // namespace

BnActForward bn_act_fwd_cpu(const BnActForwardCall& call) {
  check_input(call.x, call.act);
  const Tensor x = dense(call.x);
  const bool residual_norm = call.residual_norm.has_value();
  check_norm("", call.norm, x);
  if (residual_norm) check_norm("residual_", *call.residual_norm, x);
  check_residual(call.residual, residual_norm, x);
  OptTensor residual;
  if (call.residual) residual = dense_like(*call.residual, x);
  const auto run = is_double(x) ? forward<double> : forward<float>;
  return run({x, call.norm, residual, call.residual_norm, call.act, call.save_mask});
}

BnActBackward bn_act_bwd_cpu(const BnActBackwardCall& call) {
  return bn_act_bwd_later_cpu(nullptr, call);
}

BnActBackward bn_act_bwd_later_cpu(Later* later, const BnActBackwardCall& call) {
  check_input(call.x, call.act);
  const Tensor x = dense(call.x);
  const bool residual_norm = call.residual_norm.has_value();
  check_like("dy", call.dy, x);
  check_channels("", "weight", call.norm.weight, x);
  if (residual_norm) check_channels("residual_", "weight", call.residual_norm->weight, x);
  check_residual(call.residual, residual_norm, x);
  check_sums(call.sums, residual_norm, x);
  STD_TORCH_CHECK(are_stats(call.stats, residual_norm, x),
                  "stats is not what bn_act_fwd returned for x");
  const Geometry g = geometry_of(x);
  STD_TORCH_CHECK(call.act == 0 || call.mask.numel() == g.runs * ceil_div(g.inner, 8),
                  "mask is not what bn_act_fwd returned for x");
  const Tensor dy = dense_like(call.dy, x);
  OptTensor residual;
  if (call.residual) residual = dense_like(*call.residual, x);
  const auto run = is_double(x) ? backward<double> : backward<float>;
  return run({dy, x, call.norm, residual, call.residual_norm, call.stats, call.mask, call.act,
              call.wanted, call.sums},
             later);
}

Tensor bn_act_statistics_cpu(const Tensor& x_) {
  check_input(x_, 0);
  const Tensor x = dense(x_);
  const Parts parts(geometry_of(x));
  const BnActKernels& kernels = kernels_for(x.scalar_type());
  const int64_t channels = parts.g.channels, width = padded(channels);
  Tensor result = uninitialised(3, channels, ScalarType::Double);
  double* out = (double*)result.mutable_data_ptr();
  double* partial = scratch(parts.chunks * 2 * width);
  parts.each([&](int64_t k, int64_t b) {
    double* p = partial + k * 2 * width;
    kernels.stats(x.const_data_ptr(), parts.g, parts.part(k, b), p, p + width);
  });
  parts.merge([&](int64_t first, int64_t n) {
    Moments moments;
    moments.merge(parts, partial + first, 2 * width, width, n);
    for (int64_t c = 0; c < n; c++) {
      out[first + c] = moments.mean[c];
      out[channels + first + c] = moments.m2[c];
      out[2 * channels + first + c] = (double)(x.numel() / channels);
    }
  });
  return result;
}

std::array<Tensor, 2> bn_act_reapply_cpu(const Tensor& x_, const Tensor& stats) {
  const Tensor x = dense(x_);
  STD_TORCH_CHECK(are_stats(stats, false, x), "stats is not what bn_act_fwd returned for x");
  return is_double(x) ? reapply<double>(x, stats) : reapply<float>(x, stats);
}

}  // namespace fused_res
