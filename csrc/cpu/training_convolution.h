// The convolutions of a block in training on a CPU, forward and backward, where ours win.
#pragma once
#include <array>

#include "tensors.h"

namespace fused_res {

// Whether ours run a convolution without groups or dilation: of stride 1, and in float32.
bool trains(const Tensor& x, const Tensor& weight, const int64_t* stride, const int64_t* padding);

// And whether its weight's gradient is ours too
bool trains_weight(const Tensor& weight);

Tensor training_convolution(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                            const int64_t* padding);

// limits Winograd's tile (FUSED_RES_WINOGRAD): it is 2 here, or there is none. A limit < 0 changes
// nothing. Returns the one in use.
int64_t training_winograd(int64_t limit);

// Gradients of the input, the weight and the bias, where `wanted`; the others are undefined. `add`,
// like the input, is added to its gradient.
std::array<Tensor, 3> training_convolution_backward(const Tensor& dy, const Tensor& x,
                                                    const Tensor& weight, const int64_t* padding,
                                                    const std::array<bool, 3>& wanted,
                                                    const OptTensor& add);

}  // namespace fused_res
