// Tells whether tensors may have changed. Schema: fused_res/folds.py.
#pragma once
#include "tensors.h"

namespace fused_res {

int64_t stamp_cpu(const std::vector<Tensor>& tensors);

}  // namespace fused_res
