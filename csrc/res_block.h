// A residual block, forward and backward, in one call each way: convolutions from the library, all
// the rest by bn_act. Schemas and their meaning: fused_res/ops/res_block.py.
//
// `Library` is a device's: bn_act_fwd, bn_act_bwd_later and bn_act_reapply; convolve and
// convolve_backward of a stage, and adds, whether the latter can add another gradient of the input;
// waits, whether it can have its output's gradient made bit by bit, by bn_act_bwd_later's Later;
// count(counters), which adds one to each, and Guard, which makes a tensor's device the current
// one; and convolution and convolution_backward of libtorch's C interface, past the dispatcher, for
// the stages' own.
#pragma once
#include <array>

#include "bn_act_checks.h"

namespace fused_res {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// What went wrong in the library, in its own words: torch 2.13 and newer tell.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

inline void check_library(AOTITorchError error, const char* op) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const auto what = torch_exception_get_what_without_backtrace;
  throw std::runtime_error(what ? what() : std::string(op) + " failed");
}

// A convolution and its BatchNorm, as laid out in the op's lists.
struct BlockStage {
  static constexpr int kParameters = 4, kIntegers = 8;
  Tensor conv_weight;
  OptTensor conv_bias, weight, bias, running_mean, running_var;
  const int64_t *stride, *padding, *dilation;  // two each
  int64_t groups;
  bool training;
  double momentum, eps;

  // Whether images (channels, height, width) of x's dtype and device can go through; what they
  // become.
  bool takes(const Tensor& x, std::array<int64_t, 3>& image) const {
    const auto fits = [&](const Tensor& t) {
      return t.scalar_type() == x.scalar_type() && same_device(t, x);
    };
    if (groups < 1 || !fits(conv_weight) || conv_weight.dim() != 4 ||
        conv_weight.size(1) * groups != image[0] || (conv_bias && !fits(*conv_bias)))
      return false;
    image[0] = conv_weight.size(0);
    for (int i = 0; i < 2; i++) {
      const int64_t reach = dilation[i] * (conv_weight.size(2 + i) - 1) + 1;
      const int64_t room = image[1 + i] + 2 * padding[i] - reach;
      if (stride[i] < 1 || room < 0) return false;
      image[1 + i] = room / stride[i] + 1;
    }
    const auto of_channels = [&](const OptTensor& t) {
      const bool wide =
          t && t->scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double;
      return !t || (t->dim() == 1 && t->size(0) == image[0] && same_device(*t, x) &&
                    (t->scalar_type() == x.scalar_type() || wide));
    };
    return of_channels(weight) && of_channels(bias) && of_channels(running_mean) &&
           of_channels(running_var) && weight.has_value() == bias.has_value() &&
           (training ? eps > 0 && x.size(0) * image[1] * image[2] > 1 : eps >= 0);
  }

  static constexpr int64_t kNoPadding[2] = {};

  // by the library
  template <class Library>
  Tensor convolve(const Tensor& x) const {
    AtenTensorHandle bias = conv_bias ? conv_bias->get() : nullptr, result;
    check_library(
        Library::convolution(x.get(), conv_weight.get(), conv_bias ? &bias : nullptr, stride, 2,
                             padding, 2, dilation, 2, false, kNoPadding, 2, groups, &result),
        "convolution");
    return Tensor(result);
  }
  // gradients of the input, the weight and the bias, where `wanted`; the others are undefined
  template <class Library>
  std::array<Tensor, 3> convolve_backward(const Tensor& dy, const Tensor& x,
                                          const std::array<bool, 3>& wanted) const {
    const int64_t channels = conv_weight.size(0), *bias_size = &channels;
    const int32_t mask[] = {wanted[0], wanted[1], wanted[2]};
    AtenTensorHandle dx, dweight, dbias;
    check_library(Library::convolution_backward(dy.get(), x.get(), conv_weight.get(),
                                                conv_bias ? &bias_size : nullptr, 1, stride, 2,
                                                padding, 2, dilation, 2, false, kNoPadding, 2,
                                                groups, mask, 3, &dx, &dweight, &dbias),
                  "convolution_backward");
    return {Tensor(dx), Tensor(dweight), Tensor(dbias)};
  }
};

// What is added to a branch: the input, a convolution of it with its BatchNorm, or nothing.
enum class Shortcut : int64_t { identity, projection, none };

template <class Library>
struct ResBlock {
  std::vector<BlockStage> branch;
  std::optional<BlockStage> shortcut;
  bool adds;

  ResBlock(const std::vector<OptTensor>& parameters, const Tensors& running,
           const Integers& integers, const std::vector<double>& numbers, Shortcut kind)
      : adds(kind != Shortcut::none) {
    const bool has_shortcut = kind == Shortcut::projection;
    const size_t stages = numbers.size() / 2;
    STD_TORCH_CHECK(stages > (size_t)has_shortcut && numbers.size() == 2 * stages &&
                        running.size() == 2 * stages &&
                        parameters.size() == BlockStage::kParameters * stages &&
                        integers.size() == BlockStage::kIntegers * stages,
                    "the lists of a block have 4 parameters, 2 running statistics, 8 integers and "
                    "2 numbers for each stage");
    for (size_t i = 0; i < stages; i++) {
      const auto p = parameters.begin() + BlockStage::kParameters * i;
      const auto n = integers.begin() + BlockStage::kIntegers * i;
      STD_TORCH_CHECK(p[0].has_value(), "a convolution must have a weight");
      branch.push_back({*p[0], p[1], p[2], p[3], running[2 * i], running[2 * i + 1], &n[0], &n[2],
                        &n[4], n[6], n[7] != 0, numbers[2 * i], numbers[2 * i + 1]});
    }
    if (!has_shortcut) return;
    shortcut = std::move(branch.back());
    branch.pop_back();
  }

  // Whether x can go through. If not, it is for the caller to run the stages one by one, and to say
  // in PyTorch's words what is wrong, or to follow its rules of promotion and broadcasting.
  bool takes(const Tensor& x) const {
    if (x.dim() != 4 || x.numel() == 0) return false;
    std::array<int64_t, 3> out = {x.size(1), x.size(2), x.size(3)}, to_add = out;
    for (const BlockStage& s : branch)
      if (!s.takes(x, out)) return false;
    return (!shortcut || shortcut->takes(x, to_add)) && (!adds || out == to_add);
  }

  // y; and if `save`: the convolutions' outputs, those of the shortcut last (the last of the branch
  // not, if they are to be computed again), the stats of each bn_act, and the last one's mask
  Tensors forward(const Tensor& x, int64_t act, bool save, bool recompute) const {
    const OptTensor none;
    Tensors outputs, kept;
    Tensor z = x;
    for (size_t i = 0; i < branch.size(); i++) {
      const BlockStage& s = branch[i];
      outputs.push_back(Library::convolve(s, z));
      const Tensor& a = outputs.back();
      const bool last = i + 1 == branch.size();
      OptTensor residual;
      if (last && adds) residual = shortcut ? Library::convolve(*shortcut, x) : x;
      const bool second = last && shortcut;
      const BlockStage& r = second ? *shortcut : s;
      auto [y, mask, stats] = Library::bn_act_fwd(
          a, s.weight, s.bias, s.running_mean, s.running_var, s.training, s.momentum, s.eps,
          residual, second, second ? r.weight : none, second ? r.bias : none,
          second ? r.running_mean : none, second ? r.running_var : none, second && r.training,
          r.momentum, r.eps, last ? act : 1, last && save);
      z = y;
      kept.push_back(stats);
      if (!save || (last && recompute)) outputs.pop_back();
      if (second) outputs.push_back(*residual);
      if (last) kept.push_back(mask);
    }
    Tensors result{z};
    if (!save) return result;
    for (const Tensors* list : {&outputs, &kept})
      result.insert(result.end(), list->begin(), list->end());
    return result;
  }

  // The gradients that `needs` names, in its order: bit 0 is x's, which may come in two to be
  // added, by way of the branch and of what is added (empty where that is dy itself); then of each
  // stage the convolution's weight, its bias, and the BatchNorm's weight and bias, which are one
  // bit.
  //
  // The inner activations are computed again, each when its convolution's turn comes.
  Tensors backward(const Tensor& dy, const Tensor& x, const Tensors& saved, int64_t act,
                   bool recompute, int64_t needs) const {
    const size_t n = branch.size(), stages = n + shortcut.has_value(), outputs = stages - recompute;
    STD_TORCH_CHECK(saved.size() == outputs + n + 1, "saved is not what forward returned");
    const auto output = [&](size_t i) { return saved[i - (recompute && i == n)]; };
    const auto stats = [&](size_t i) { return saved[outputs + i]; };
    enum { kConv, kConvBias, kNorm };
    const auto wants = [&](size_t stage, int which) -> bool {
      return needs >> (1 + 3 * stage + which) & 1;
    };
    const bool wants_x = needs & 1;
    const OptTensor none;
    // whether anything before stage i of the branch wants a gradient
    const auto before = [&](size_t i) { return (needs & ((int64_t(1) << (1 + 3 * i)) - 1)) != 0; };
    const auto conv_wants = [&](size_t i, bool input) {
      return std::array<bool, 3>{input, wants(i, kConv), wants(i, kConvBias)};
    };
    const auto any = [](const std::array<bool, 3>& w) { return w[0] || w[1] || w[2]; };

    std::vector<OptTensor> gradients(BlockStage::kParameters * stages);
    const auto put = [&](size_t stage, int which, const Tensor& t) {
      gradients[BlockStage::kParameters * stage + which] = t;
    };
    const auto put_norm = [&](size_t stage, const Tensor& dweight, const Tensor& dbias) {
      if (wants(stage, kNorm)) put(stage, 2, dweight), put(stage, 3, dbias);
    };
    // the input's gradient
    const auto convolve_backward = [&](size_t i, const BlockStage& s, const Tensor& dy,
                                       const Tensor& z, const std::array<bool, 3>& wanted,
                                       const OptTensor& add = {},
                                       const typename Library::Later& later = {}) {
      auto [dz, dweight, dbias] = Library::convolve_backward(s, dy, z, wanted, add, later);
      if (wanted[1]) put(i, 0, dweight);
      if (wanted[2]) put(i, 1, dbias);
      return dz;
    };

    Tensor g = dy, d_residual = dy, mask = saved.back();
    bool added = false;
    for (size_t i = n; i-- > 0;) {
      const BlockStage& s = branch[i];
      const bool last = i + 1 == n, second = last && shortcut;
      const auto of_conv = conv_wants(i, before(i));
      const bool of_residual =
          second ? any(conv_wants(n, wants_x)) : last && adds && wants_x && act == 1;
      const bool of_norms = wants(i, kNorm) || (second && wants(n, kNorm));
      if (!any(of_conv) && !of_residual && !of_norms) break;
      // what the convolution read, and the mask of the ReLU before it
      std::array<Tensor, 2> input;
      const auto find_input = [&] {
        input = i ? Library::bn_act_reapply(output(i - 1), stats(i - 1)) : std::array{x, Tensor()};
      };
      const bool again = last && recompute;
      if (again) find_input();
      const Tensor a = again ? Library::convolve(s, input[0]) : output(i);
      const bool waits = of_conv[0] && of_conv[1] && !(second && of_residual) &&
                         Library::waits(s, a, i ? output(i - 1) : x);
      typename Library::Later later = {};
      auto [dx, dweight, dbias, dresidual, dweight2, dbias2] = Library::bn_act_bwd_later(
          waits ? &later : nullptr, g, a, s.weight, s.training,
          second ? OptTensor(output(n)) : OptTensor(), second,
          second ? shortcut->weight : OptTensor(), second && shortcut->training, stats(i), mask,
          last ? act : 1, any(of_conv), of_residual, of_norms, std::nullopt);
      put_norm(i, dweight, dbias);
      if (second) put_norm(n, dweight2, dbias2);
      if (of_residual) d_residual = dresidual;
      if (second && of_residual)
        d_residual = convolve_backward(n, *shortcut, d_residual, x, conv_wants(n, wants_x));
      if (!any(of_conv)) break;
      if (!again) find_input();
      added = i == 0 && adds && wants_x && Library::adds(s, dx, x, d_residual);
      g = convolve_backward(i, s, dx, input[0], of_conv, added ? OptTensor(d_residual) : none,
                            later);
      mask = input[1];
    }
    Tensors result;
    if (wants_x) result.push_back(g);
    if (wants_x && adds && !added)
      result.push_back(shortcut || act == 1 ? d_residual : torch::stable::new_empty(x, {0}));
    for (const OptTensor& t : gradients)
      if (t) result.push_back(*t);
    return result;
  }
};

// The two ops of a device. Forward gives nothing, and does nothing, where the block does not take
// x.
template <class Library>
Tensors res_block_fwd(const Tensor& x, const std::vector<OptTensor>& parameters,
                      const Tensors& running, const Tensors& counters, const Integers& integers,
                      const std::vector<double>& numbers, int64_t shortcut, int64_t act, bool save,
                      bool recompute) {
  const ResBlock<Library> block(parameters, running, integers, numbers, (Shortcut)shortcut);
  for (const Tensor& t : counters)
    if (t.scalar_type() != ScalarType::Long || t.numel() != 1 || !same_device(t, x)) return {};
  if (!block.takes(x)) return {};
  const typename Library::Guard guard(x);
  if (!counters.empty()) Library::count(counters);
  return block.forward(x, act, save, recompute);
}
template <class Library>
Tensors res_block_bwd(const Tensor& dy, const Tensor& x, const std::vector<OptTensor>& parameters,
                      const Tensors& saved, const Integers& integers, int64_t shortcut, int64_t act,
                      bool recompute, int64_t needs) {
  const std::vector<double> numbers(integers.size() / BlockStage::kIntegers * 2);
  const Tensors running(numbers.size(), x);  // not used
  const typename Library::Guard guard(x);
  return ResBlock<Library>(parameters, running, integers, numbers, (Shortcut)shortcut)
      .backward(dy, x, saved, act, recompute, needs);
}

}  // namespace fused_res
