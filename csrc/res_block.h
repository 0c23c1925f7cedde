// A residual block, forward and backward, in one call each way: its convolutions, and bn_act for
// all the rest. Schemas and their meaning: fused_res/ops/res_block.py.
//
// `Backend` is a device's implementation of the parts:
// - bn_act_fwd and bn_act_reapply; bn_act_bwd_later, which may leave the gradients to a `Later`;
// - convolve and convolve_backward of a stage, by a native kernel or by ATen;
// - convolution and convolution_backward: ATen's, through libtorch's C interface;
// - adds: whether convolve_backward can add another gradient of the input;
// - waits: whether convolve_backward can call the `Later` that writes its output's gradient;
// - count: adds one to each of some counters; Guard: makes a tensor's device the current one.
#pragma once
#include <array>

#include "bn_act_checks.h"

namespace fused_res {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// The message of an error inside ATen: torch 2.13 and newer have one.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

inline void check_aten(AOTITorchError error, const char* op) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const auto what = torch_exception_get_what_without_backtrace;
  throw std::runtime_error(what ? what() : std::string(op) + " failed");
}

constexpr int64_t kRelu = 1;  // an act

// A convolution and its BatchNorm, as laid out in the op's lists.
struct BlockStage {
  static constexpr int kParameters = 4, kIntegers = 8;
  Tensor conv_weight;
  OptTensor conv_bias, weight, bias, running_mean, running_var;
  const int64_t *stride, *padding, *dilation;  // two each
  int64_t groups;
  bool training;
  double momentum, eps;

  BatchNorm norm() const {
    return {weight, bias, running_mean, running_var, training, momentum, eps};
  }
  BatchNormSaved norm_saved() const { return {weight, training}; }

  // Whether images (channels, height, width) of x's dtype and device can go through; `image`
  // becomes the output's.
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

  // by ATen
  template <class Backend>
  Tensor convolve(const Tensor& x) const {
    AtenTensorHandle bias = conv_bias ? conv_bias->get() : nullptr, result;
    check_aten(
        Backend::convolution(x.get(), conv_weight.get(), conv_bias ? &bias : nullptr, stride, 2,
                             padding, 2, dilation, 2, false, kNoPadding, 2, groups, &result),
        "convolution");
    return Tensor(result);
  }
  // gradients of the input, the weight and the bias, where `wanted`; the others are undefined
  template <class Backend>
  std::array<Tensor, 3> convolve_backward(const Tensor& dy, const Tensor& x,
                                          const std::array<bool, 3>& wanted) const {
    const int64_t channels = conv_weight.size(0), *bias_size = &channels;
    const int32_t mask[] = {wanted[0], wanted[1], wanted[2]};
    AtenTensorHandle dx, dweight, dbias;
    check_aten(Backend::convolution_backward(dy.get(), x.get(), conv_weight.get(),
                                             conv_bias ? &bias_size : nullptr, 1, stride, 2,
                                             padding, 2, dilation, 2, false, kNoPadding, 2, groups,
                                             mask, 3, &dx, &dweight, &dbias),
               "convolution_backward");
    return {Tensor(dx), Tensor(dweight), Tensor(dbias)};
  }
};

// The tensor added to a branch: the input, a convolution of it with its BatchNorm, or none.
enum class Shortcut : int64_t { identity, projection, none };

template <class Backend>
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

  // Returns y. If `save`, then also: the convolutions' outputs, the shortcut's last (without the
  // branch's last one if `recompute`); the stats of each bn_act; the mask of the last one.
  Tensors forward(const Tensor& x, int64_t act, bool save, bool recompute) const {
    Tensors outputs, kept;
    Tensor z = x;
    for (size_t i = 0; i < branch.size(); i++) {
      const BlockStage& s = branch[i];
      outputs.push_back(Backend::convolve(s, z));
      const Tensor& a = outputs.back();
      const bool last = i + 1 == branch.size();
      OptTensor residual;
      if (last && adds) residual = shortcut ? Backend::convolve(*shortcut, x) : x;
      const bool second = last && shortcut;
      auto [y, mask, stats] = Backend::bn_act_fwd(
          {a, s.norm(), residual, second ? std::optional(shortcut->norm()) : std::nullopt,
           last ? act : kRelu, last && save});
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
};

// The backward pass of a block, from its end to its input.
//
// The inner activations are computed again, each when its convolution's turn comes.
template <class Backend>
class ResBlockBackward {
 public:
  using Later = typename Backend::Later;

  ResBlockBackward(const ResBlock<Backend>& block, const Tensor& x, const Tensors& saved,
                   int64_t act, bool recompute, int64_t needs)
      : block_(block), x_(x), saved_(saved), act_(act), recompute_(recompute), needs_(needs),
        n_(block.branch.size()), stages_(n_ + block.shortcut.has_value()),
        outputs_(stages_ - recompute), gradients_(BlockStage::kParameters * stages_) {
    STD_TORCH_CHECK(saved.size() == outputs_ + n_ + 1, "saved is not what forward returned");
  }

  // The gradients that `needs` names, in its order: bit 0 is x's, which may come in two to be
  // added, by way of the branch and of what is added to it (empty where that is dy itself); then of
  // each stage the convolution's weight, its bias, and the BatchNorm's weight and bias, which are
  // one bit.
  Tensors run(const Tensor& dy) {
    g_ = dy, d_residual_ = dy, mask_ = saved_.back();
    for (size_t i = n_; i-- > 0;)
      if (!stage(i)) break;
    return results();
  }

 private:
  enum Which { kConv, kConvBias, kNorm };

  bool wants(size_t stage, Which which) const { return needs_ >> (1 + 3 * stage + which) & 1; }
  bool wants_x() const { return needs_ & 1; }
  // whether anything before stage i of the branch wants a gradient
  bool wants_before(size_t i) const { return (needs_ & ((int64_t(1) << (1 + 3 * i)) - 1)) != 0; }
  std::array<bool, 3> conv_wants(size_t i, bool input) const {
    return {input, wants(i, kConv), wants(i, kConvBias)};
  }
  static bool any(const std::array<bool, 3>& w) { return w[0] || w[1] || w[2]; }

  const Tensor& output(size_t i) const { return saved_[i - (recompute_ && i == n_)]; }
  const Tensor& stats(size_t i) const { return saved_[outputs_ + i]; }

  // The input of convolution i, and the mask of the ReLU before it.
  std::array<Tensor, 2> input(size_t i) const {
    if (i == 0) return {x_, Tensor()};
    return Backend::bn_act_reapply(output(i - 1), stats(i - 1));
  }

  void put_norm(size_t stage, const Tensor& dweight, const Tensor& dbias) {
    if (!wants(stage, kNorm)) return;
    gradients_[BlockStage::kParameters * stage + 2] = dweight;
    gradients_[BlockStage::kParameters * stage + 3] = dbias;
  }

  // The input's gradient of convolution i, which read z.
  Tensor convolve_backward(size_t i, const BlockStage& s, const Tensor& dy, const Tensor& z,
                           const std::array<bool, 3>& wanted, const OptTensor& add = {},
                           const Later& later = {}) {
    auto [dz, dweight, dbias] = Backend::convolve_backward(s, dy, z, wanted, add, later);
    if (wanted[1]) gradients_[BlockStage::kParameters * i] = dweight;
    if (wanted[2]) gradients_[BlockStage::kParameters * i + 1] = dbias;
    return dz;
  }

  // The BatchNorm and ReLU after convolution i, of the last also what was added and its BatchNorm,
  // then the convolution. False: nothing before it wants a gradient.
  bool stage(size_t i) {
    const BlockStage& s = block_.branch[i];
    const std::optional<BlockStage>& shortcut = block_.shortcut;
    const bool last = i + 1 == n_, second = last && shortcut, again = last && recompute_;
    const auto of_conv = conv_wants(i, wants_before(i));
    const bool of_residual =
        second ? any(conv_wants(n_, wants_x())) : last && block_.adds && wants_x() && act_ == kRelu;
    const bool of_norms = wants(i, kNorm) || (second && wants(n_, kNorm));
    if (!any(of_conv) && !of_residual && !of_norms) return false;
    std::array<Tensor, 2> read;
    if (again) read = input(i);
    const Tensor a = again ? Backend::convolve(s, read[0]) : output(i);
    const bool waits = of_conv[0] && of_conv[1] && !(second && of_residual) &&
                       Backend::waits(s, a, i ? output(i - 1) : x_);
    Later later = {};
    const OptTensor none, a_shortcut = second ? OptTensor(output(n_)) : none;
    auto [dx, dweight, dbias, dresidual, dweight2, dbias2] = Backend::bn_act_bwd_later(
        waits ? &later : nullptr, {g_,
                                   a,
                                   s.norm_saved(),
                                   a_shortcut,
                                   second ? std::optional(shortcut->norm_saved()) : std::nullopt,
                                   stats(i),
                                   mask_,
                                   last ? act_ : kRelu,
                                   {any(of_conv), of_residual, of_norms},
                                   none});
    put_norm(i, dweight, dbias);
    if (second) put_norm(n_, dweight2, dbias2);
    if (of_residual) d_residual_ = dresidual;
    if (second && of_residual)
      d_residual_ = convolve_backward(n_, *shortcut, d_residual_, x_, conv_wants(n_, wants_x()));
    if (!any(of_conv)) return false;
    if (!again) read = input(i);
    added_ = i == 0 && block_.adds && wants_x() && Backend::adds(s, dx, x_, d_residual_);
    g_ = convolve_backward(i, s, dx, read[0], of_conv, added_ ? OptTensor(d_residual_) : none,
                           later);
    mask_ = read[1];
    return true;
  }

  Tensors results() const {
    Tensors result;
    if (wants_x()) result.push_back(g_);
    if (wants_x() && block_.adds && !added_)
      result.push_back(block_.shortcut || act_ == kRelu ? d_residual_
                                                        : torch::stable::new_empty(x_, {0}));
    for (const OptTensor& t : gradients_)
      if (t) result.push_back(*t);
    return result;
  }

  const ResBlock<Backend>& block_;
  const Tensor& x_;
  const Tensors& saved_;
  const int64_t act_;
  const bool recompute_;
  const int64_t needs_;
  const size_t n_, stages_, outputs_;  // stages of the branch, of all, convolutions' outputs saved
  std::vector<OptTensor> gradients_;
  Tensor g_, d_residual_, mask_;
  bool added_ = false;  // d_residual_ to g_ already
};

// The two ops of a device. Forward gives nothing, and does nothing, where the block does not take
// x.
template <class Backend>
Tensors res_block_fwd(const Tensor& x, const std::vector<OptTensor>& parameters,
                      const Tensors& running, const Tensors& counters, const Integers& integers,
                      const std::vector<double>& numbers, int64_t shortcut, int64_t act, bool save,
                      bool recompute) {
  const ResBlock<Backend> block(parameters, running, integers, numbers, (Shortcut)shortcut);
  for (const Tensor& t : counters)
    if (t.scalar_type() != ScalarType::Long || t.numel() != 1 || !same_device(t, x)) return {};
  if (!block.takes(x)) return {};
  const typename Backend::Guard guard(x);
  if (!counters.empty()) Backend::count(counters);
  return block.forward(x, act, save, recompute);
}
template <class Backend>
Tensors res_block_bwd(const Tensor& dy, const Tensor& x, const std::vector<OptTensor>& parameters,
                      const Tensors& saved, const Integers& integers, int64_t shortcut, int64_t act,
                      bool recompute, int64_t needs) {
  const std::vector<double> numbers(integers.size() / BlockStage::kIntegers * 2);
  const Tensors running(numbers.size(), x);  // not used
  const typename Backend::Guard guard(x);
  const ResBlock<Backend> block(parameters, running, integers, numbers, (Shortcut)shortcut);
  return ResBlockBackward<Backend>(block, x, saved, act, recompute, needs).run(dy);
}

}  // namespace fused_res
