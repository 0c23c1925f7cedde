// Which instruction set the CPU kernels use: the best this processor has, or less where asked.
#pragma once
#include <cstdint>

namespace fused_res {

enum class Isa : int64_t { plain = 0, avx2 = 1, avx512 = 2 };

Isa isa();
// limits it (FUSED_RES_CPU_ISA); a level < 0 changes nothing. Returns the one in use.
int64_t cpu_isa(int64_t level);

}  // namespace fused_res
