// Tells whether tensors may have changed. Schema: fused_res/run/weight_cache.py.
#pragma once
#include "tensors.h"

namespace fused_res {

int64_t fingerprint_cpu(const std::vector<Tensor>& tensors);

}  // namespace fused_res
