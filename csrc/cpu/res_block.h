// What a block is made of on a CPU.
#pragma once
#include "../res_block.h"

#include "training_convolution.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace fused_res {

struct CpuLibrary {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static constexpr auto bn_act_fwd = bn_act_fwd_cpu;
  static constexpr auto bn_act_reapply = bn_act_reapply_cpu;
  static constexpr auto convolution = aoti_torch_cpu_convolution;
  static constexpr auto convolution_backward = aoti_torch_cpu_convolution_backward;
  static bool ours(const BlockStage& s, const Tensor& x) {
    return trains(x, s.conv_weight, s.stride, s.padding, s.dilation, s.groups);
  }
  static Tensor convolve(const BlockStage& s, const Tensor& x) {
    if (!ours(s, x)) return s.convolve<CpuLibrary>(x);
    return training_convolution(x, s.conv_weight, s.conv_bias, s.padding);
  }
  static bool ours_backward(const BlockStage& s, const Tensor& dy, const Tensor& x) {
    return ours(s, x) && channels_last_contiguous(dy);
  }
  static bool adds(const BlockStage& s, const Tensor& dy, const Tensor& x, const Tensor& other) {
    return ours_backward(s, dy, x) && channels_last_contiguous(other);
  }
  // whether a convolution's output's gradient may be made where that of its input is: both are like
  // the output and the input
  using Later = fused_res::Later;
  static bool waits(const BlockStage& s, const Tensor& output, const Tensor& input) {
    return ours_backward(s, output, input) && trains_by_images(output, s.conv_weight);
  }
  static constexpr auto bn_act_bwd_later = bn_act_bwd_later_cpu;
  static std::array<Tensor, 3> convolve_backward(const BlockStage& s, const Tensor& dy,
                                                 const Tensor& x, const std::array<bool, 3>& wanted,
                                                 const OptTensor& add, const Later& later) {
    if (!ours_backward(s, dy, x)) {  // any more: a setting was changed
      if (later) later(0, dy.numel() / dy.size(1));
      return s.convolve_backward<CpuLibrary>(dy, x, wanted);
    }
    if (trains_weight(s.conv_weight))
      return training_convolution_backward(dy, x, s.conv_weight, s.padding, wanted, add, later);
    std::array<Tensor, 3> gradients;
    if (wanted[1] || wanted[2])
      gradients = s.convolve_backward<CpuLibrary>(dy, x, {false, wanted[1], wanted[2]});
    if (wanted[0])
      gradients[0] = training_convolution_backward(dy, x, s.conv_weight, s.padding,
                                                   {true, false, false}, add, {})[0];
    return gradients;
  }
  static void count(const Tensors& counters) {
    for (const Tensor& t : counters) ++*(int64_t*)t.mutable_data_ptr();
  }
};

}  // namespace fused_res
