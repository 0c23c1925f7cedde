// Threads that work on one small thing together, step by step: a parallel_for a step would cost
// several times what the step does. They spin while they wait, so each needs a core of its own.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

#include "cores.h"

namespace fused_res {

class Team {
 public:
  // f(team, member) on up to `most` threads at a time, members 0 to team.size() - 1. A team has
  // at most the cores that no other team has; one thread in a parallel region. f must not throw.
  template <class F>
  static void run(int64_t most, const F& f) {
    const ShareOfCores share(most);
    const int64_t threads = share.count();
    Team team;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t lo, int64_t hi) {
      const int64_t member = team.joined_.fetch_add(1);
      // a thread that stands for several says so; when all have come it is known how many they are
      team.tasks_.fetch_add(hi - lo);
      spin([&] { return team.tasks_.load() == threads; });
      [&]() noexcept { f(team, member); }();  // the others would wait for ever
    });
  }

  int64_t size() const { return joined_.load(std::memory_order_relaxed); }

  // until every member has called it
  void wait() {
    const int64_t phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1) == size() - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      spin([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }
  }

 private:
  // Another process may have a member's core, so after a while this one's is given away.
  template <class Done>
  static void spin(const Done& done) {
    for (int i = 0; !done(); i++) {
#ifdef FUSED_RES_X86
      __builtin_ia32_pause();
#endif
      if (i % 512 == 511) std::this_thread::yield();
    }
  }

  std::atomic<int64_t> joined_{0}, tasks_{0};
  alignas(64) std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<int64_t> phase_{0};
};

}  // namespace fused_res
