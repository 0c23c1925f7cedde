// bn_act on the CPU.
#pragma once
#include <functional>

#include "../bn_act.h"

namespace fused_res {

BnActForward bn_act_fwd_cpu(const BnActForwardCall& call);
BnActBackward bn_act_bwd_cpu(const BnActBackwardCall& call);

// The same, but where x is channels_last the gradients of x and of the residual are not written
// yet: `later` is set, and writes rows (pixels) [lo, hi) of both.
using Later = std::function<void(int64_t lo, int64_t hi)>;
BnActBackward bn_act_bwd_later_cpu(Later* later, const BnActBackwardCall& call);

Tensor bn_act_statistics_cpu(const Tensor& x);

// y and mask of a bn_act with a ReLU and no residual once more, bit by bit, from its stats
std::array<Tensor, 2> bn_act_reapply_cpu(const Tensor& x, const Tensor& stats);

}  // namespace fused_res
