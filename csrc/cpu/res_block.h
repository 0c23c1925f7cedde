// What a block is made of on a CPU.
#pragma once
#include "../res_block.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace fused_res {

struct CpuLibrary {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static constexpr auto bn_act_fwd = bn_act_fwd_cpu;
  static constexpr auto bn_act_bwd = bn_act_bwd_cpu;
  static constexpr auto convolution = aoti_torch_cpu_convolution;
  static constexpr auto convolution_backward = aoti_torch_cpu_convolution_backward;
  static void count(const Tensors& counters) {
    for (const Tensor& t : counters) ++*(int64_t*)t.mutable_data_ptr();
  }
};

}  // namespace fused_res
