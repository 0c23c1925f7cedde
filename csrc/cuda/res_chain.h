// res_chain on a CUDA device. Schemas and their meaning: fused_res/ops/res_chain.py.
#pragma once
#include "../tensors.h"

namespace fused_res {

Tensor res_chain_params_cuda(const Tensor& x, const std::vector<Tensor>& weights,
                             const std::vector<OptTensor>& biases,
                             const std::vector<OptTensor>& norms, const std::vector<double>& eps,
                             const std::vector<int64_t>& program, bool tf32);

bool res_chain_fits(int64_t device, int64_t bytes, int64_t channels, int64_t height, int64_t width,
                    const std::vector<int64_t>& program);

}  // namespace fused_res
