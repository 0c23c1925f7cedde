// csrc/cpu's count of cores, and its teams of threads, for test_cpu_threads.py.
#include "../../csrc/cpu/cores.cpp"
#include "../../csrc/cpu/team.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int64_t cpu_quota(const char* root) { return fused_res::cpu_quota(root); }

EXPORTED int64_t team_size(int64_t threads) {
  std::atomic<int64_t> size{0};
  fused_res::Team::run(threads, [&](fused_res::Team& team, int64_t) { size = team.size(); });
  return size;
}
