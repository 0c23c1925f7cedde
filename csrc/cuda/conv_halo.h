// conv_halo on a CUDA device. Schemas and their meaning: fused_res/ops/conv_halo.py.
#pragma once
#include <tuple>

#include "../tensors.h"

namespace fused_res {

Tensor conv_halo_cuda(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                      const OptTensor& mean, const OptTensor& var, const OptTensor& norm_weight,
                      const OptTensor& norm_bias, double eps, const OptTensor& residual,
                      int64_t act, bool tf32);

std::tuple<Tensor, Tensor> conv_halo_statistics_cuda(const Tensor& x, const Tensor& weight,
                                                     const OptTensor& bias, bool tf32);

std::tuple<Tensor, Tensor> conv_halo_gradient_cuda(const Tensor& dy, const Tensor& weight,
                                                   const Tensor& a, const Tensor& stats, bool tf32);

bool conv_halo_fits(int64_t device, int64_t bytes, int64_t images, int64_t height, int64_t width,
                    int64_t channels, int64_t out_channels, int64_t size, int64_t epilogue);

}  // namespace fused_res
