// bn_act on a CUDA device.
#pragma once
#include "../bn_act.h"

namespace fused_res {

BnActForward bn_act_fwd_cuda(const BnActForwardCall& call);
BnActBackward bn_act_bwd_cuda(const BnActBackwardCall& call);
Tensor bn_act_statistics_cuda(const Tensor& x);

// y and mask of a bn_act with a ReLU and no residual once more, bit by bit, from its stats
std::array<Tensor, 2> bn_act_reapply_cuda(const Tensor& x, const Tensor& stats);

// Sets how calls are launched (cuda::Plan; tests want each), if `wanted` is not -1; how they are.
int64_t cuda_plan(int64_t wanted);

}  // namespace fused_res
