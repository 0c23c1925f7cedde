// BatchNorm + add + ReLU, forward and backward. Schemas and their meaning: fused_res/ops/bn_act.py.
#pragma once
#include <array>
#include <functional>
#include <tuple>

#include "tensors.h"

namespace fused_res {

struct BatchNorm {
  const OptTensor &weight, &bias, &running_mean, &running_var;
  bool training;
  double momentum, eps;
};

struct BatchNormSaved {  // what the backward pass needs of it, beside the saved statistics
  const OptTensor& weight;
  bool training;
};

struct BnActWanted {
  bool x, residual, parameters;
};

constexpr int64_t stats_rows(bool residual_norm) { return residual_norm ? 7 : 5; }

using BnActForward = std::tuple<Tensor, Tensor, Tensor>;
using BnActBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BnActForward bn_act_fwd_cpu(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                            const OptTensor& running_mean, const OptTensor& running_var,
                            bool training, double momentum, double eps, const OptTensor& residual,
                            bool residual_norm, const OptTensor& residual_weight,
                            const OptTensor& residual_bias, const OptTensor& residual_running_mean,
                            const OptTensor& residual_running_var, bool residual_training,
                            double residual_momentum, double residual_eps, int64_t act,
                            bool save_mask);

BnActBackward bn_act_bwd_cpu(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                             bool training, const OptTensor& residual, bool residual_norm,
                             const OptTensor& residual_weight, bool residual_training,
                             const Tensor& stats, const Tensor& mask, int64_t act, bool need_x,
                             bool need_residual, bool need_parameters, const OptTensor& sums);

// The same, but that x's gradient and the residual's are not written yet where x is channels_last:
// `later`, which is then set, writes rows (pixels) [lo, hi) of both.
using Later = std::function<void(int64_t lo, int64_t hi)>;
BnActBackward bn_act_bwd_later_cpu(Later* later, const Tensor& dy, const Tensor& x,
                                   const OptTensor& weight, bool training,
                                   const OptTensor& residual, bool residual_norm,
                                   const OptTensor& residual_weight, bool residual_training,
                                   const Tensor& stats, const Tensor& mask, int64_t act,
                                   bool need_x, bool need_residual, bool need_parameters,
                                   const OptTensor& sums);

Tensor bn_act_statistics_cpu(const Tensor& x);

// y and mask of a bn_act with a ReLU and no residual once more, bit by bit, from its stats
std::array<Tensor, 2> bn_act_reapply_cpu(const Tensor& x, const Tensor& stats);

}  // namespace fused_res
