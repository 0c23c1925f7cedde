// How many CPUs a thread and those it starts may use at a time.
#pragma once
#include <cstdint>
#include <string>

namespace fused_res {

int64_t cores();  // at least 1

// Whole CPUs that the cgroups of this process, v1 or v2, give it; without a limit the largest
// number. `root` is the folder that holds proc and sys.
int64_t cpu_quota(std::string root);

// Up to `threads` of the cores that no other share has, at least one, while this is there.
class ShareOfCores {
 public:
  explicit ShareOfCores(int64_t threads);
  ShareOfCores(const ShareOfCores&) = delete;
  ~ShareOfCores();
  int64_t count() const { return count_; }

 private:
  int64_t count_;
};

}  // namespace fused_res
