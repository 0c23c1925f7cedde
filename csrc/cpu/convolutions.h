// Convolutions of a CPU, one after the other. Schema: fused_res/ops/convolutions.py.
#pragma once
#include "tensors.h"

namespace fused_res {

Tensor convolutions_cpu(const Tensor& x, const OptTensor& residual,
                        const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases,
                        const std::vector<int64_t>& program);

}  // namespace fused_res
