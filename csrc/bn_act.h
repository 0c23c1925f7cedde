// The calls of bn_act, as every device's implementation takes them. Schemas and their meaning:
// fused_res/ops/bn_act.py.
#pragma once
#include <array>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace fused_res {

struct BatchNorm {
  const OptTensor &weight, &bias, &running_mean, &running_var;
  bool training;
  double momentum, eps;
};

struct BatchNormSaved {  // what backward needs of it, beside the saved statistics
  const OptTensor& weight;
  bool training;
};

struct BnActWanted {
  bool x, residual, parameters;
};

// act: of ACTS in fused_res/reference.py, by place.
struct BnActForwardCall {
  const Tensor& x;
  BatchNorm norm;
  const OptTensor& residual;
  std::optional<BatchNorm> residual_norm;
  int64_t act;
  bool save_mask;
};

// sums: to take for those of x; optional.
struct BnActBackwardCall {
  const Tensor &dy, &x;
  BatchNormSaved norm;
  const OptTensor& residual;
  std::optional<BatchNormSaved> residual_norm;
  const Tensor &stats, &mask;
  int64_t act;
  BnActWanted wanted;
  const OptTensor& sums;
};

constexpr int64_t stats_rows(bool residual_norm) { return residual_norm ? 7 : 5; }

using BnActForward = std::tuple<Tensor, Tensor, Tensor>;
using BnActBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The ops, with the arguments of their schemas, by a device's implementation.
template <BnActForward (*kRun)(const BnActForwardCall&)>
BnActForward bn_act_fwd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                        const OptTensor& running_mean, const OptTensor& running_var, bool training,
                        double momentum, double eps, const OptTensor& residual, bool residual_norm,
                        const OptTensor& residual_weight, const OptTensor& residual_bias,
                        const OptTensor& residual_running_mean,
                        const OptTensor& residual_running_var, bool residual_training,
                        double residual_momentum, double residual_eps, int64_t act,
                        bool save_mask) {
  const BatchNorm norm{weight, bias, running_mean, running_var, training, momentum, eps};
  const BatchNorm second{residual_weight,      residual_bias,     residual_running_mean,
                         residual_running_var, residual_training, residual_momentum,
                         residual_eps};
  return kRun(
      {x, norm, residual, residual_norm ? std::optional(second) : std::nullopt, act, save_mask});
}

template <BnActBackward (*kRun)(const BnActBackwardCall&)>
BnActBackward bn_act_bwd(const Tensor& dy, const Tensor& x, const OptTensor& weight, bool training,
                         const OptTensor& residual, bool residual_norm,
                         const OptTensor& residual_weight, bool residual_training,
                         const Tensor& stats, const Tensor& mask, int64_t act, bool need_x,
                         bool need_residual, bool need_parameters, const OptTensor& sums) {
  const BatchNormSaved second{residual_weight, residual_training};
  return kRun({dy,
               x,
               {weight, training},
               residual,
               residual_norm ? std::optional(second) : std::nullopt,
               stats,
               mask,
               act,
               {need_x, need_residual, need_parameters},
               sums});
}

}  // namespace fused_res
