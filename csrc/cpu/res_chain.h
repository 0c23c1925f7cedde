// Residual blocks of a CPU, one after the other in one call. Schema: fused_res/ops/res_chain.py.
#pragma once
#include "tensors.h"

namespace fused_res {

Tensor packed_chain_cpu(const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases,
                        const std::vector<int64_t>& program, int64_t channels);
Tensor res_chain_cpu(const Tensor& x, const Tensor& chain);
int64_t team_size(int64_t threads);  // of a chain whose threads share its maps, now

}  // namespace fused_res
