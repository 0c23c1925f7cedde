// The convolutions of a block in training on a CPU, forward and backward, where native kernels are
// faster than oneDNN.
#pragma once
#include <array>

#include "bn_act.h"  // Later
#include "tensors.h"

namespace fused_res {

// Whether native kernels run a convolution: float32, channels_last, stride 1, and sizes where they
// are faster.
bool trains(const Tensor& x, const Tensor& weight, const int64_t* stride, const int64_t* padding,
            const int64_t* dilation, int64_t groups);

// Whether they also compute its weight's gradient.
bool trains_weight(const Tensor& weight);

Tensor training_convolution(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                            const int64_t* padding);

// The number of a branch's convolutions that native kernels run. image: the first one's input;
// sizes: each one's weight (4), stride, padding and dilation (2 each) and groups.
int64_t training_convolutions(const std::vector<int64_t>& image, const std::vector<int64_t>& sizes);

// limits Winograd's tile (FUSED_RES_WINOGRAD): it is 2 here, or there is none. A limit < 0 changes
// nothing. Returns the one in use.
int64_t training_winograd(int64_t limit);

// Gradients of the input, the weight and the bias, where `wanted`; the others are undefined. `add`,
// of the input's shape, is added to its gradient. `later`, if any, writes dy, and may write `add`:
// trains_by_images says where that pays.
std::array<Tensor, 3> training_convolution_backward(const Tensor& dy, const Tensor& x,
                                                    const Tensor& weight, const int64_t* padding,
                                                    const std::array<bool, 3>& wanted,
                                                    const OptTensor& add, const Later& later);
bool trains_by_images(const Tensor& dy, const Tensor& weight);

}  // namespace fused_res
