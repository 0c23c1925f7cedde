// Winograd's convolution of 3x3 kernels on a CPU: packs its weight (schema:
// fused_res/ops/winograd.py), and runs it, for convolutions.cpp.
#pragma once
#include "bn_act.h"  // Later
#include "tensors.h"

namespace fused_res {

// The tiles [begin, end) of a convolution, by the calling thread
struct WinogradArgs;
void winograd_alone(const WinogradArgs& args, int64_t tile, int64_t begin, int64_t end);

Tensor winograd_weight_cpu(const Tensor& weight, const OptTensor& scale, int64_t tile);
Tensor winograd_cpu(const Tensor& x, const Tensor& u, const OptTensor& bias,
                    const OptTensor& residual, int64_t out_channels,
                    const std::vector<int64_t>& padding, int64_t tile, bool concat, int64_t act,
                    bool inside);

// With weights that are used once
struct Filters;
Tensor winograd_once(const Tensor& x, const Filters& filters, const OptTensor& bias,
                     const OptTensor& add, const int64_t* padding, int64_t tile);

// The gradient of `weight`, of a convolution's output and input. Sums depend on the sizes alone.
Tensor winograd_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                const int64_t* padding);

// That and the input's gradient with `add`, some images at a time, whose rows (pixels) of dy and
// `add` are made by `later`: what the next one reads is in a core's cache. The same bits as one
// after the other; where winograd_by_images says so, as fast or faster.
std::array<Tensor, 2> winograd_gradients(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                         const OptTensor& add, const int64_t* padding,
                                         const Later& later);
bool winograd_by_images(const Tensor& dy);

}  // namespace fused_res
