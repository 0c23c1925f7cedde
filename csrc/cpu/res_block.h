// The parts of a block on a CPU: bn_act, and convolutions, native ones where they win, else ATen's.
#pragma once
#include "../res_block.h"

#include "bn_act.h"
#include "training_convolution.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace fused_res {

struct CpuBackend {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static constexpr auto bn_act_fwd = bn_act_fwd_cpu;
  static constexpr auto bn_act_reapply = bn_act_reapply_cpu;
  static constexpr auto convolution = aoti_torch_cpu_convolution;
  static constexpr auto convolution_backward = aoti_torch_cpu_convolution_backward;
  static bool native(const BlockStage& s, const Tensor& x) {
    return trains(x, s.conv_weight, s.stride, s.padding, s.dilation, s.groups);
  }
  static Tensor convolve(const BlockStage& s, const Tensor& x) {
    if (!native(s, x)) return s.convolve<CpuBackend>(x);
    return training_convolution(x, s.conv_weight, s.conv_bias, s.padding);
  }
  static bool native_backward(const BlockStage& s, const Tensor& dy, const Tensor& x) {
    return native(s, x) && channels_last_contiguous(dy);
  }
  static bool adds(const BlockStage& s, const Tensor& dy, const Tensor& x, const Tensor& other) {
    return native_backward(s, dy, x) && channels_last_contiguous(other);
  }
  // Whether convolve_backward can call the Later that writes dy. dy is laid out as `output`, the
  // input's gradient as `input`.
  using Later = fused_res::Later;
  static bool waits(const BlockStage& s, const Tensor& output, const Tensor& input) {
    return native_backward(s, output, input) && trains_by_images(output, s.conv_weight);
  }
  static constexpr auto bn_act_bwd_later = bn_act_bwd_later_cpu;
  static std::array<Tensor, 3> convolve_backward(const BlockStage& s, const Tensor& dy,
                                                 const Tensor& x, const std::array<bool, 3>& wanted,
                                                 const OptTensor& add, const Later& later) {
    if (!native_backward(s, dy, x)) {  // the setting has changed since forward
      if (later) later(0, dy.numel() / dy.size(1));
      return s.convolve_backward<CpuBackend>(dy, x, wanted);
    }
    if (trains_weight(s.conv_weight))
      return training_convolution_backward(dy, x, s.conv_weight, s.padding, wanted, add, later);
    std::array<Tensor, 3> gradients;
    if (wanted[1] || wanted[2])
      gradients = s.convolve_backward<CpuBackend>(dy, x, {false, wanted[1], wanted[2]});
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
