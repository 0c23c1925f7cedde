#pragma once
#include <stdint.h>

namespace fused_res {

constexpr int64_t kPanel =
    32;  // output channels whose weights lie together: u[panel][depth][kPanel]

}  // namespace fused_res
