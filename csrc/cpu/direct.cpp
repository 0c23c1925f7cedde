#include "direct.h"

#include "convolution.h"
#include "direct_kernels.h"

namespace fused_res {

const DirectKernels& direct_kernels_of_isa() {
#ifdef FUSED_RES_X86
  if (isa() == Isa::avx512) return avx512::direct_kernels();
  if (isa() == Isa::avx2) return avx2::direct_kernels();
#endif
  return plain::direct_kernels();
}

namespace {

// Gathered rows that stay in a core's second cache while the panels pass; enough of them that a
// panel pays, a multiple of the rows that registers hold.
constexpr int64_t kRowsBytes = 256 << 10, kLeastRows = 28, kMostRowsOfGroup = 112;
// Weights up to this stay there too, so few rows at a time will do: all channels of a pixel are
// then written together, which pays for more where there are many.
constexpr int64_t kCachedWeights = 512 << 10, kCachedOfWide = 2 << 20;
// Rows that are gathered for all threads, where there are too few for each to have its own.
constexpr int64_t kSharedBytes = 4 << 20;
// Pixels whose products make one sum of a weight's gradient, and sums added one after the other
constexpr int64_t kPixelsOfPart = 256, kMostParts = 16;
constexpr int kSizes = 9;  // integers of a source: channels, kernel, stride, padding, dilation

struct Direct {
  const DirectKernels& kernels;
  DirectArgs args;
  int64_t panels, rows, stride;

  // what a thread keeps beside its gathered rows: partial sums of one panel
  float* space(int64_t gathered, int64_t multiplied) const {
    return scratch(gathered * stride + multiplied * kPanel);
  }

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fit = kRowsBytes / (stride * (int64_t)sizeof(float));
    const int64_t most =
        args.cached ? kLeastRows
                    : std::clamp(fit / kLeastRows * kLeastRows, kLeastRows, kMostRowsOfGroup);
    const int64_t groups = ceil_div(ceil_div(rows, most), threads) * threads;
    if (rows / groups < kLeastRows) return run_shared(threads);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t g = lo; g < hi; g++) {
        const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
        float* v = space(count, count);
        kernels.gather(args, first, 0, count, v, stride);
        for (int64_t p = 0; p < panels; p++)
          kernels.multiply(args, first, 0, count, v, stride, p, !args.cached || g == lo,
                           v + count * stride);
      }
    });
  }

  void run_shared(int64_t threads) const {
    const int64_t fit = std::max<int64_t>(kSharedBytes / (stride * (int64_t)sizeof(float)), 1);
    const int64_t groups = ceil_div(rows, fit);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
      // the caller works on its part too, with partial sums after its rows
      const int64_t parts = std::clamp(ceil_div(2 * threads, panels), (int64_t)1, count);
      const int64_t most = ceil_div(count, parts);
      float* v = space(count, most);
      torch::stable::parallel_for(0, count, 1, [&](int64_t lo, int64_t hi) {
        kernels.gather(args, first, lo, hi, v, stride);
      });
      torch::stable::parallel_for(0, panels * parts, 1, [&](int64_t lo, int64_t hi) {
        float* m = scratch(0) == v ? v + count * stride : space(0, most);
        for (int64_t i = lo; i < hi; i++) {
          const int64_t part = i % parts;
          kernels.multiply(args, first, count * part / parts, count * (part + 1) / parts, v, stride,
                           i / parts, true, m);
        }
      });
    }
  }
};

}  // namespace

// The weights of one convolution, times their scales, into [panel][depth][kPanel] of `depth` in all
void pack_direct(const Filters& f, const std::vector<double>& scale, int64_t depth, float* u) {
  parallel(ceil_div(f.size[0], kPanel), f.size[0] * f.depth(), [&](int64_t lo, int64_t hi) {
    for (int64_t p = lo; p < hi; p++) {
      float* at = u + p * depth * kPanel;
      for (int64_t r = 0; r < f.size[2]; r++)
        for (int64_t s = 0; s < f.size[3]; s++)
          for (int64_t c = 0; c < f.size[1]; c++, at += kPanel)
            for (int64_t n = 0; n < kPanel; n++) {
              const int64_t k = p * kPanel + n;
              at[n] = k < f.size[0] ? (float)(scale[k] * f(k, c, r, s)) : 0;
            }
    }
  });
}

// [panel][depth][kPanel] of the weights, one under the other, times their scales; rounded once.
Tensor direct_weight_cpu(const std::vector<Tensor>& weights, const std::vector<OptTensor>& scales) {
  STD_TORCH_CHECK((weights.size() == 1 || weights.size() == 2) && scales.size() == weights.size(),
                  "weights must be one or two, with as many scales");
  const int64_t channels = weights[0].dim() ? weights[0].size(0) : 0;
  STD_TORCH_CHECK(channels > 0, "weights must have output channels");
  int64_t depth = 0;
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(is_float(w) && w.dim() == 4 && w.size(0) == channels,
                    "weights must be float32 on a CPU, of shape (", channels, ", C, R, S)");
    depth += w.numel() / channels;
  }
  Tensor u = uninitialised(ceil_div(channels, kPanel), depth * kPanel, ScalarType::Float);
  float* out = (float*)u.mutable_data_ptr();
  for (size_t i = 0; i < weights.size(); i++) {
    STD_TORCH_CHECK(!scales[i] || (scales[i]->dim() == 1 && scales[i]->size(0) == channels),
                    "scales must have shape (", channels, ",)");
    const Filters f = filters_of(weights[i]);
    pack_direct(f, read_channels(scales[i], channels, 1.0), depth, out);
    out += f.depth() * kPanel;
  }
  return u;
}

namespace {

// args: the sources and the output's size. u: of pack_direct
Tensor run_direct(DirectArgs args, int64_t images, const float* u, const OptTensor& bias,
                  const OptTensor& residual, int64_t out_channels, bool concat, int64_t act,
                  bool inside) {
  const int64_t panels = ceil_div(out_channels, kPanel);
  const std::vector<float> shift = padded(bias, out_channels, panels * kPanel);
  const Output output = output_of(images, out_channels, args.out_height, args.out_width, residual,
                                  concat, act, inside);
  if (output.y.numel() == 0) return output.y;
  args.u = u;
  args.bias = shift.data();
  const int64_t weights = panels * kPanel * args.depth * (int64_t)sizeof(float);
  args.cached = weights <= (out_channels >= args.depth ? kCachedOfWide : kCachedWeights);
  args.y = output.data;
  args.out_channels = out_channels;
  args.y_stride = output.stride;
  if (residual && !concat) args.residual = (const float*)residual->const_data_ptr();
  args.residual_stride = out_channels;
  args.act = (Act)act;
  Direct{direct_kernels_of_isa(), args, panels, images * args.out_height * args.out_width,
         row_stride(args.depth)}
      .run();
  return output.y;
}

// A convolution of stride 1 without dilation
DirectArgs args_of(const Tensor& x, int64_t height, int64_t width, const int64_t* padding) {
  DirectArgs args = {};
  args.count = 1;
  args.sources[0] = {
      (const float*)x.const_data_ptr(), x.size(2), x.size(3), x.size(1), {height, width}, {1, 1},
      {padding[0], padding[1]},         {1, 1}};
  args.out_height = x.size(2) + 2 * padding[0] - height + 1;
  args.out_width = x.size(3) + 2 * padding[1] - width + 1;
  args.depth = args.sources[0].depth();
  return args;
}

}  // namespace

Tensor direct_cpu(const std::vector<Tensor>& inputs, const Tensor& u, const OptTensor& bias,
                  const OptTensor& residual, int64_t out_channels,
                  const std::vector<int64_t>& sizes, bool concat, int64_t act, bool inside) {
  STD_TORCH_CHECK(
      (inputs.size() == 1 || inputs.size() == 2) && sizes.size() == kSizes * inputs.size(),
      "inputs must be one or two, with 9 sizes each");
  DirectArgs args = {};
  for (size_t i = 0; i < inputs.size(); i++) {
    const Tensor& x = inputs[i];
    const int64_t* n = &sizes[kSizes * i];
    STD_TORCH_CHECK(is_nhwc(x) && x.size(0) == inputs[0].size(0) && x.size(1) == n[0],
                    "inputs must be float32 on a CPU, channels_last, of as many images and of "
                    "their convolutions' channels");
    DirectSource& s = args.sources[args.count++];
    s = {(const float*)x.const_data_ptr(),
         x.size(2),
         x.size(3),
         x.size(1),
         {n[1], n[2]},
         {n[3], n[4]},
         {n[5], n[6]},
         {n[7], n[8]}};
    int64_t out[2];
    for (int d = 0; d < 2; d++) {
      STD_TORCH_CHECK(s.kernel[d] > 0 && s.stride[d] > 0 && s.padding[d] >= 0 && s.dilation[d] > 0,
                      "sizes must be positive, padding at least 0");
      const int64_t room = x.size(2 + d) + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1;
      out[d] = room < 0 ? 0 : room / s.stride[d] + 1;
    }
    STD_TORCH_CHECK(i == 0 || (out[0] == args.out_height && out[1] == args.out_width),
                    "both inputs must make the same size");
    args.out_height = out[0];
    args.out_width = out[1];
    args.depth += s.depth();
  }
  STD_TORCH_CHECK(args.depth > 0 && out_channels > 0, "a convolution must have channels");
  STD_TORCH_CHECK(is_float(u) && u.is_contiguous() &&
                      u.numel() == ceil_div(out_channels, kPanel) * args.depth * kPanel,
                  "u must be what direct_weight made for ", args.depth, " -> ", out_channels);
  return run_direct(args, inputs[0].size(0), (const float*)u.const_data_ptr(), bias, residual,
                    out_channels, concat, act, inside);
}

Tensor direct_once(const Tensor& x, const Filters& filters, const OptTensor& bias,
                   const OptTensor& add, const int64_t* padding) {
  const int64_t channels = filters.size[0];
  Pooled u(ceil_div(channels, kPanel) * filters.depth() * kPanel);
  pack_direct(filters, std::vector<double>(channels, 1.0), filters.depth(), u.data());
  return run_direct(args_of(x, filters.size[2], filters.size[3], padding), x.size(0), u.data(),
                    bias, add, channels, false, 0, false);
}

// Pixels are summed in parts, which threads share; then the parts are summed in order. The number
// of parts depends on the sizes alone, so the result does not depend on the number of threads.
Tensor direct_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight,
                              const int64_t* padding) {
  const DirectKernels& kernels = direct_kernels_of_isa();
  const DirectArgs args = args_of(x, weight.size(2), weight.size(3), padding);
  const int64_t channels = weight.size(0), panels = ceil_div(channels, kPanel);
  const int64_t pixels = x.size(0) * args.out_height * args.out_width, depth = args.depth;
  const int64_t parts = std::clamp(pixels / kPixelsOfPart, (int64_t)1, kMostParts);
  const int64_t stride = row_stride(depth), size = panels * depth * kPanel;
  const int64_t most =
      std::clamp(kRowsBytes / (stride * (int64_t)sizeof(float)), (int64_t)16, kMostRowsOfGroup);
  const float* dy_data = (const float*)dy.const_data_ptr();
  Pooled sums(parts * size);
  // where there are few parts, threads share a part's panels too
  const int64_t shares = parts < kMostParts / 2 ? panels : 1;
  torch::stable::parallel_for(0, parts * shares, 1, [&](int64_t lo, int64_t hi) {
    float* v = scratch(most * (stride + kPanel));
    float* rows = v + most * stride;  // of dy, of one panel
    for (int64_t task = lo; task < hi; task++) {
      const int64_t part = task / shares, share = task % shares;
      const int64_t begin = pixels * part / parts, end = pixels * (part + 1) / parts;
      for (int64_t first = begin; first < end; first += most) {
        const int64_t count = std::min(most, end - first);
        kernels.gather(args, first, 0, count, v, stride);
        for (int64_t p = panels * share / shares; p < panels * (share + 1) / shares; p++) {
          const int64_t width = std::min(kPanel, channels - p * kPanel);
          float* to = rows;
          for (int64_t i = 0; i < count; i++, to += kPanel) {
            const float* from = dy_data + (first + i) * channels + p * kPanel;
            std::copy(from, from + width, to);
            std::fill(to + width, to + kPanel, 0.f);
          }
          kernels.accumulate(depth, count, v, stride, rows, first == begin,
                             sums.data() + part * size + p * depth * kPanel);
        }
      }
    }
  });
  Tensor dweight = uninitialised_like(weight);
  float* out = (float*)dweight.mutable_data_ptr();
  const auto n = weight.sizes(), to = dweight.strides();
  parallel(panels * n[2] * n[3], parts * size, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) {
      const int64_t p = i / (n[2] * n[3]), r = i / n[3] % n[2], s = i % n[3];
      const int64_t width = std::min(kPanel, channels - p * kPanel);
      for (int64_t c = 0; c < n[1]; c++) {
        const float* at = sums.data() + (p * depth + (r * n[3] + s) * n[1] + c) * kPanel;
        float total[kPanel] = {};
        for (int64_t part = 0; part < parts; part++)
          for (int64_t k = 0; k < kPanel; k++) total[k] += at[part * size + k];
        for (int64_t k = 0; k < width; k++)
          out[(p * kPanel + k) * to[0] + c * to[1] + r * to[2] + s * to[3]] = total[k];
      }
    }
  });
  return dweight;
}

}  // namespace fused_res
