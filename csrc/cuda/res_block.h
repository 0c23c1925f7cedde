// The parts of a block on a CUDA device: bn_act, and convolutions from ATen.
#pragma once
#include "../res_block.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include "bn_act.h"

namespace fused_res {

struct CudaBackend {
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& x) : DeviceGuard(x.get_device_index()) {}
  };
  struct Later {};
  static constexpr auto bn_act_fwd = bn_act_fwd_cuda;
  static constexpr auto bn_act_reapply = bn_act_reapply_cuda;
  static constexpr auto convolution = aoti_torch_cuda_convolution;
  static constexpr auto convolution_backward = aoti_torch_cuda_convolution_backward;

  static BnActBackward bn_act_bwd_later(Later*, const BnActBackwardCall& call) {
    return bn_act_bwd_cuda(call);
  }
  static bool waits(const BlockStage&, const Tensor&, const Tensor&) { return false; }
  static bool adds(const BlockStage&, const Tensor&, const Tensor&, const Tensor&) { return false; }
  static Tensor convolve(const BlockStage& s, const Tensor& x) {
    return s.convolve<CudaBackend>(x);
  }
  static std::array<Tensor, 3> convolve_backward(const BlockStage& s, const Tensor& dy,
                                                 const Tensor& x, const std::array<bool, 3>& wanted,
                                                 const OptTensor&, const Later&) {
    return s.convolve_backward<CudaBackend>(dy, x, wanted);
  }
  static void count(const Tensors& counters);
};

}  // namespace fused_res
