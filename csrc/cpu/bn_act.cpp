// bn_act on the CPU: tensors in, tensors out, and how the work is cut up between threads. How it is
// cut depends on the shape alone, never on the number of threads, so every sum has one order.
#include "bn_act.h"

#include <cmath>

#include "bn_act_kernels.h"
#include "isa.h"

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

int64_t padded(int64_t channels) { return (channels + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

Geometry geometry_of(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), hw = x.size(2) * x.size(3);
  const bool channels_last = hw == 1 || !x.is_contiguous();
  return channels_last ? Geometry{n * hw, c, c, true} : Geometry{n * c, hw, c, false};
}

// Rows of a channels_last tensor in chunks of at least 64 KB (float), at most 64 of them.
struct Chunks {
  int64_t rows, size, count;
  explicit Chunks(const Geometry& g) : rows(g.runs) {
    constexpr int64_t kTile = 32, kElements = 1 << 14, kMaxChunks = 64;
    size = std::max((kElements + g.inner - 1) / g.inner, (rows + kMaxChunks - 1) / kMaxChunks);
    size = (size + kTile - 1) / kTile * kTile;
    count = (rows + size - 1) / size;
  }
  int64_t begin(int64_t k) const { return k * size; }
  int64_t end(int64_t k) const { return std::min(rows, (k + 1) * size); }
};

// Kept between calls: a fresh mapping a call would cost more in page faults than the sums do.
double* scratch(int64_t doubles) {
  thread_local std::vector<double> buffer;
  if ((int64_t)buffer.size() < doubles) buffer.resize(doubles);
  std::fill_n(buffer.begin(), doubles, 0.0);
  return buffer.data();
}

// One BatchNorm of the forward pass: its arrays per channel, A the accumulation type.
template <class A>
struct ForwardNorm {
  const BatchNorm& bn;
  int64_t channels, count;
  std::vector<double> weight, bias, running_mean, running_var;
  std::vector<A> mean, scale, shift;
  Tensor mean_out, invstd_out;

  ForwardNorm(const BatchNorm& bn, int64_t channels, int64_t count, const Tensor& like)
      : bn(bn), channels(channels), count(count),
        weight(read_channels(bn.weight, channels, 1)), bias(read_channels(bn.bias, channels, 0)),
        running_mean(read_channels(bn.running_mean, channels, 0)),
        running_var(read_channels(bn.running_var, channels, 1)), mean(padded(channels)),
        scale(padded(channels)), shift(padded(channels)) {
    const auto dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    mean_out = empty({channels}, dtype, like);
    invstd_out = empty({channels}, dtype, like);
  }

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
    mean[c] = (A)batch_mean;
    scale[c] = (A)s;
    shift[c] = (A)(bias[c] + ((double)mean[c] - batch_mean) * s);  // what rounding the mean lost
    ((A*)mean_out.mutable_data_ptr())[c] = mean[c];
    ((A*)invstd_out.mutable_data_ptr())[c] = (A)invstd;
  }

  Affine affine() const { return {mean.data(), scale.data(), shift.data()}; }

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
  const int64_t elements;

  // all statistics of channel c are known: fold them into the affine of the pass
  void finish(int64_t c, const double* mean, const double* m2) {
    main.finish(c, mean[0], m2[0]);
    if (!second) return;
    second->finish(c, mean[1], m2[1]);
    if (args.act != Act::relu_before_add) main.shift[c] += second->shift[c];
  }

  void run() {
    const bool any_training = main.bn.training || (second && second->bn.training);
    if (!any_training)
      eval();
    else if (args.geometry.channels_last)
      train_rows();
    else
      train_channels();
  }

  void eval() {
    const double none[2] = {0, 0};
    for (int64_t c = 0; c < main.channels; c++) finish(c, none, none);
    parallel(args.geometry.runs, elements,
             [&](int64_t lo, int64_t hi) { kernels.apply(args, lo, hi - lo, 1); });
  }

  void train_channels() {  // a channel is read twice while it is in cache
    const int64_t channels = main.channels, images = args.geometry.runs / channels;
    parallel(channels, elements, [&](int64_t lo, int64_t hi) {
      for (int64_t c = lo; c < hi; c++) {
        double mean[2] = {}, m2[2] = {};
        if (main.bn.training) kernels.stats_channel(args.x, args.geometry, c, mean, m2);
        if (second && second->bn.training)
          kernels.stats_channel(args.residual, args.geometry, c, mean + 1, m2 + 1);
        finish(c, mean, m2);
        kernels.apply(args, c, images, channels);
      }
    });
  }

  void train_rows() {
    const int64_t channels = main.channels, width = padded(channels);
    const Chunks chunks(args.geometry);
    double* partial = scratch(chunks.count * 4 * width);  // [chunk][mean, m2, of both][channel]
    parallel(chunks.count, elements, [&](int64_t lo, int64_t hi) {
      for (int64_t k = lo; k < hi; k++) {
        double* p = partial + k * 4 * width;
        if (main.bn.training)
          kernels.stats_rows(args.x, channels, chunks.begin(k), chunks.end(k), p, p + width);
        if (second && second->bn.training)
          kernels.stats_rows(args.residual, channels, chunks.begin(k), chunks.end(k), p + 2 * width,
                             p + 3 * width);
      }
    });
    parallel(channels, chunks.count * channels, [&](int64_t lo, int64_t hi) {
      for (int64_t c = lo; c < hi; c++) {
        double mean[2] = {}, m2[2] = {};
        for (int which = 0; which < (second ? 2 : 1); which++) {
          double seen = 0;
          for (int64_t k = 0; k < chunks.count; k++) {
            const double* p = partial + (k * 4 + which * 2) * width + c;
            const double n = chunks.end(k) - chunks.begin(k), delta = p[0] - mean[which];
            mean[which] += delta * (n / (seen + n));
            m2[which] += p[width] + delta * delta * (seen * n / (seen + n));
            seen += n;
          }
        }
        finish(c, mean, m2);
      }
    });
    parallel(chunks.count, elements, [&](int64_t lo, int64_t hi) {
      kernels.apply(args, chunks.begin(lo), chunks.end(hi - 1) - chunks.begin(lo), 1);
    });
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

  BackwardChannels(const BatchNormSaved& bn, int64_t channels, int64_t count)
      : bn(bn), channels(channels), count(count), weight(read_channels(bn.weight, channels, 1)),
        saved_mean((const A*)bn.mean.const_data_ptr()),
        saved_invstd((const A*)bn.invstd.const_data_ptr()), mean(padded(channels)),
        scale(padded(channels)), slope(padded(channels)), offset(padded(channels)),
        dweight(channels), dbias(channels) {
    for (int64_t c = 0; c < channels; c++) {
      mean[c] = saved_mean[c];
      scale[c] = (A)(weight[c] * saved_invstd[c]);
    }
  }

  void finish(int64_t c, double sum_g, double sum_gx) {
    const double invstd = saved_invstd[c], s = weight[c] * invstd;
    dbias[c] = sum_g;
    dweight[c] = sum_gx * invstd;
    slope[c] = (A)(-s * invstd * dweight[c] / count);
    offset[c] = (A)(-s * sum_g / count);
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
  const int64_t elements;

  void finish(int64_t c, const double* sums, int64_t stride) {
    main.finish(c, sums[0], sums[stride]);
    if (second) second->finish(c, sums[2 * stride], sums[3 * stride]);
  }

  bool writes() const { return args.dx || args.dresidual; }

  void run(bool sums_wanted) {
    if (!sums_wanted) {
      if (writes())
        parallel(args.geometry.runs, elements,
                 [&](int64_t lo, int64_t hi) { kernels.gradients(args, lo, hi - lo, 1); });
    } else if (args.geometry.channels_last) {
      rows();
    } else {
      channels();
    }
  }

  void channels() {
    const int64_t channels = main.channels, images = args.geometry.runs / channels;
    parallel(channels, elements, [&](int64_t lo, int64_t hi) {
      for (int64_t c = lo; c < hi; c++) {
        double sums[kSums] = {};
        kernels.sums_channel(args, c, sums);
        finish(c, sums, 1);
        if (writes()) kernels.gradients(args, c, images, channels);
      }
    });
  }

  void rows() {
    const int64_t channels = main.channels, width = padded(channels);
    const Chunks chunks(args.geometry);
    double* partial = scratch(chunks.count * kSums * width);
    parallel(chunks.count, elements, [&](int64_t lo, int64_t hi) {
      for (int64_t k = lo; k < hi; k++)
        kernels.sums_rows(args, chunks.begin(k), chunks.end(k), partial + k * kSums * width, width);
    });
    parallel(channels, chunks.count * channels, [&](int64_t lo, int64_t hi) {
      for (int64_t c = lo; c < hi; c++) {
        double sums[kSums] = {};
        for (int64_t k = 0; k < chunks.count; k++)
          for (int s = 0; s < kSums; s++) sums[s] += partial[(k * kSums + s) * width + c];
        finish(c, sums, 1);
      }
    });
    if (!writes()) return;
    parallel(chunks.count, elements, [&](int64_t lo, int64_t hi) {
      kernels.gradients(args, chunks.begin(lo), chunks.end(hi - 1) - chunks.begin(lo), 1);
    });
  }
};

template <class A>
std::vector<Tensor> forward(const Tensor& x, const BatchNorm& bn, const OptTensor& residual,
                            const BatchNorm* residual_bn, Act act, bool save_mask) {
  const Geometry g = geometry_of(x);
  const int64_t channels = x.size(1), count = x.numel() / std::max<int64_t>(channels, 1);
  const bool masked = act != Act::none && save_mask;
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = empty({masked ? g.runs : 0, (g.inner + 7) / 8}, ScalarType::Byte, x);
  ForwardNorm<A> main(bn, channels, count, x);
  std::optional<ForwardNorm<A>> second;
  if (residual_bn) second.emplace(*residual_bn, channels, count, x);
  const Tensor nothing = empty({0}, ScalarType::Float, x);
  if (x.numel() > 0) {
    const Residual kind =
        residual_bn ? Residual::norm : (residual ? Residual::tensor : Residual::none);
    const ForwardArgs args{g,
                           act,
                           kind,
                           x.const_data_ptr(),
                           residual ? residual->const_data_ptr() : nullptr,
                           y.mutable_data_ptr(),
                           masked ? (uint8_t*)mask.mutable_data_ptr() : nullptr,
                           main.affine(),
                           second ? second->affine() : Affine{}};
    Forward<A>{kernels_for(x.scalar_type()), args, main, second ? &*second : nullptr, x.numel()}
        .run();
    main.write_running_statistics();
    if (second) second->write_running_statistics();
  }
  return {y,
          mask,
          main.mean_out,
          main.invstd_out,
          second ? second->mean_out : nothing,
          second ? second->invstd_out : nothing};
}

template <class A>
std::vector<Tensor> backward(const Tensor& dy, const Tensor& x, const BatchNormSaved& bn,
                             const OptTensor& residual, const BatchNormSaved* residual_bn,
                             const Tensor& mask, Act act, BnActWanted wanted) {
  const Geometry g = geometry_of(x);
  const int64_t channels = x.size(1), count = x.numel() / std::max<int64_t>(channels, 1);
  const Tensor nothing = empty({0}, x.scalar_type(), x);
  const Tensor dx = wanted.x ? torch::stable::empty_like(x) : nothing;
  const Tensor dresidual = wanted.residual ? torch::stable::empty_like(x) : nothing;
  BackwardChannels<A> main(bn, channels, count);
  std::optional<BackwardChannels<A>> second;
  if (residual_bn) second.emplace(*residual_bn, channels, count);
  if (x.numel() > 0) {
    const BackwardArgs args{g,
                            act,
                            residual_bn != nullptr,
                            dy.const_data_ptr(),
                            x.const_data_ptr(),
                            residual ? residual->const_data_ptr() : nullptr,
                            act == Act::none ? nullptr : (const uint8_t*)mask.const_data_ptr(),
                            wanted.x ? dx.mutable_data_ptr() : nullptr,
                            wanted.residual ? dresidual.mutable_data_ptr() : nullptr,
                            main.arrays(),
                            second ? second->arrays() : BackwardNorm{}};
    const bool sums = wanted.parameters || (wanted.x && bn.training) ||
                      (wanted.residual && second && residual_bn->training);
    Backward<A>{kernels_for(x.scalar_type()), args, main, second ? &*second : nullptr, x.numel()}
        .run(sums);
  }
  const auto parameter = [&](const BackwardChannels<A>* norm, bool weight) {
    if (!norm || !norm->bn.weight || !wanted.parameters) return nothing;
    Tensor gradient = empty({channels}, norm->bn.weight->scalar_type(), x);
    write_channels(weight ? norm->dweight : norm->dbias, gradient);
    return gradient;
  };
  const BackwardChannels<A>* shortcut = second ? &*second : nullptr;
  return {dx,        parameter(&main, true),    parameter(&main, false),
          dresidual, parameter(shortcut, true), parameter(shortcut, false)};
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

}  // namespace

BnActForward bn_act_fwd_cpu(const Tensor& x_, const OptTensor& weight, const OptTensor& bias,
                            const OptTensor& running_mean, const OptTensor& running_var,
                            bool training, double momentum, double eps,
                            const OptTensor& residual_, bool residual_norm,
                            const OptTensor& residual_weight, const OptTensor& residual_bias,
                            const OptTensor& residual_running_mean,
                            const OptTensor& residual_running_var, bool residual_training,
                            double residual_momentum, double residual_eps, int64_t act,
                            bool save_mask) {
  const Tensor x = dense(x_);
  const OptTensor residual = residual_ ? OptTensor(dense_like(*residual_, x)) : std::nullopt;
  const BatchNorm bn{weight, bias, running_mean, running_var, training, momentum, eps};
  const BatchNorm residual_bn{residual_weight,       residual_bias,     residual_running_mean,
                              residual_running_var,  residual_training, residual_momentum,
                              residual_eps};
  const auto run = is_double(x) ? forward<double> : forward<float>;
  const auto out = run(x, bn, residual, residual_norm ? &residual_bn : nullptr, (Act)act, save_mask);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

BnActBackward bn_act_bwd_cpu(const Tensor& dy, const Tensor& x_, const OptTensor& weight,
                             const Tensor& mean, const Tensor& invstd, bool training,
                             const OptTensor& residual_, const OptTensor& residual_weight,
                             const OptTensor& residual_mean, const OptTensor& residual_invstd,
                             bool residual_training, const Tensor& mask, int64_t act, bool need_x,
                             bool need_residual, bool need_parameters) {
  const Tensor x = dense(x_);
  const OptTensor residual = residual_ ? OptTensor(dense_like(*residual_, x)) : std::nullopt;
  const BatchNormSaved bn{weight, mean, invstd, training};
  const bool residual_norm = residual_mean.has_value();
  const BatchNormSaved residual_bn{residual_weight, residual_norm ? *residual_mean : mean,
                                   residual_norm ? *residual_invstd : invstd, residual_training};
  const auto run = is_double(x) ? backward<double> : backward<float>;
  const auto out = run(dense_like(dy, x), x, bn, residual, residual_norm ? &residual_bn : nullptr,
                       mask, (Act)act, {need_x, need_residual, need_parameters});
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

}  // namespace fused_res
