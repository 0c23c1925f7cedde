#include "isa.h"

#include <algorithm>
#include <atomic>

namespace fused_res {
namespace {

Isa best() {
#ifdef FUSED_RES_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::plain;
}

std::atomic<int64_t> current{(int64_t)best()};

}  // namespace

Isa isa() { return (Isa)current.load(std::memory_order_relaxed); }

int64_t cpu_isa(int64_t level) {
  if (level >= 0) current = std::min(level, (int64_t)best());
  return current;
}

}  // namespace fused_res
