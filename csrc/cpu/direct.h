// A direct convolution on a CPU: what makes its weight (schema: fused_res/ops/direct.py), and the
// convolution, for convolutions.cpp.
#pragma once
#include "tensors.h"

namespace fused_res {

Tensor direct_weight_cpu(const std::vector<Tensor>& weights, const std::vector<OptTensor>& scales);
Tensor direct_cpu(const std::vector<Tensor>& inputs, const Tensor& u, const OptTensor& bias,
                  const OptTensor& residual, int64_t out_channels,
                  const std::vector<int64_t>& sizes, bool concat, int64_t act);

}  // namespace fused_res
