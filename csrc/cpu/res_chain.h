// Residual blocks of a CPU, one after the other in one call. Schema: fused_res/ops/res_chain.py.
#pragma once
#include "tensors.h"

namespace fused_res {

Tensor packed_chain_cpu(const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases,
                        const std::vector<int64_t>& program, int64_t channels);
Tensor res_chain_cpu(const Tensor& x, const Tensor& chain);

}  // namespace fused_res
