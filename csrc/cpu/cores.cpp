#include "cores.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

namespace fused_res {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

std::atomic<int64_t> shared_out{0};  // cores that some ShareOfCores has

int64_t whole_cpus(int64_t quota, int64_t period) {
  return quota > 0 && period > 0 ? std::max(quota / period, (int64_t)1) : kUnlimited;
}

int64_t quota_v1(const std::string& folder) {
  int64_t quota = 0, period = 0;  // stay 0 where there is no file; without a limit quota is -1
  std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
  std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  return whole_cpus(quota, period);
}

int64_t quota_v2(const std::string& folder) {
  int64_t quota = 0, period = 0;  // without a limit the file says "max"
  std::ifstream(folder + "/cpu.max") >> quota >> period;
  return whole_cpus(quota, period);
}

// The least quota of a group and those that it is in. A container sees its own group as the root of
// the tree, with or without the path that the host knows it by.
template <class Quota>
int64_t least_quota(const std::string& tree, std::string group, const Quota& quota) {
  int64_t least = quota(tree);
  for (; group.size() > 1; group.erase(group.rfind('/')))
    least = std::min(least, quota(tree + group));
  return least;
}

int64_t affinity() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return std::max((int64_t)std::thread::hardware_concurrency(), (int64_t)1);  // over 1024 CPUs
}

}  // namespace

int64_t cpu_quota(std::string root) {
  const std::string trees = root + "/sys/fs/cgroup";
  int64_t least = kUnlimited;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:cpu,cpuacct:/group", v2 "0::/group"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || line.compare(second + 1, 1, "/")) continue;
    const std::string group = line.substr(second + 1);
    if (second == first + 1) least = std::min(least, least_quota(trees, group, quota_v2));
    std::istringstream controllers(line.substr(first + 1, second - first - 1));
    for (std::string name; std::getline(controllers, name, ',');)
      if (name == "cpu") least = std::min(least, least_quota(trees + "/cpu", group, quota_v1));
  }
  return least;
}

int64_t cores() {
  using Clock = std::chrono::steady_clock;
  static thread_local int64_t count = 0;
  static thread_local Clock::time_point read_again;
  // Both may change while the process runs: a call a second or more after the last reading sees it.
  if (const auto now = Clock::now(); !count || now >= read_again) {
    count = std::min(affinity(), cpu_quota(""));
    read_again = now + std::chrono::seconds(1);
  }
  return count;
}

ShareOfCores::ShareOfCores(int64_t threads) {
  const int64_t all = cores();
  int64_t taken = shared_out.load(std::memory_order_relaxed);
  do {
    count_ = std::max(std::min(threads, all - taken), (int64_t)1);
  } while (!shared_out.compare_exchange_weak(taken, taken + count_, std::memory_order_relaxed));
}

ShareOfCores::~ShareOfCores() { shared_out.fetch_sub(count_, std::memory_order_relaxed); }

}  // namespace fused_res
