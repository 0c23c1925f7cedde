// A direct convolution on a CPU: packs its weight (schema: fused_res/ops/direct.py), and runs it,
// for convolutions.cpp.
#pragma once
#include "tensors.h"

namespace fused_res {

Tensor direct_weight_cpu(const std::vector<Tensor>& weights, const std::vector<OptTensor>& scales);
Tensor direct_cpu(const std::vector<Tensor>& inputs, const Tensor& u, const OptTensor& bias,
                  const OptTensor& residual, int64_t out_channels,
                  const std::vector<int64_t>& sizes, bool concat, int64_t act, bool inside);

// With weights that are used once: stride 1, no groups or dilation; filters of filters_of(weight).
struct Filters;
Tensor direct_once(const Tensor& x, const Filters& filters, const OptTensor& bias,
                   const OptTensor& add, const int64_t* padding);
struct DirectKernels;
const DirectKernels& direct_kernels_of_isa();
// The gradient of `weight`, of that convolution's output and input
Tensor direct_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight,
                              const int64_t* padding);

}  // namespace fused_res
