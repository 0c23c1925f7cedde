// Finds accesses to the same memory that no barrier orders, whatever the order in which threads
// happen to run. The method is FastTrack's (Flanagan and Freund, 2009): of each granule of memory
// the last write and the reads since, each with the moment of its thread. Vector clocks are not
// needed: each barrier here joins all threads of its scope, so a number of barriers for each scope
// tells what was before what.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace emulator {

// A thread, and the barriers that it has passed: of its warp, block and cluster, where a barrier of
// a scope counts in those inside too. Blocks of a cooperative launch are a cluster here. Later
// launches see all that earlier ones did. Of several threads the first number that differs is
// kMany.
struct Moment {
  uint32_t launch = 0, cluster = 0;  // launch 0: never
  uint16_t cluster_barriers = 0, block_barriers = 0, warp_barriers = 0;
  uint16_t block = 0, warp = 0, lane = 0;

  static constexpr uint16_t kMany = 0xffff;
  static constexpr uint32_t kManyClusters = ~0u;

  void pass_warp_barrier() { warp_barriers++; }
  void pass_block_barrier() { block_barriers++, warp_barriers++; }
  void pass_cluster_barrier() { cluster_barriers++, block_barriers++, warp_barriers++; }

  // whether nothing orders what was done at `then` before what is done now
  bool races(const Moment& then) const {
    if (launch != then.launch) return false;
    if (cluster != then.cluster) return true;
    if (cluster_barriers != then.cluster_barriers) return false;
    if (block != then.block) return true;
    if (block_barriers != then.block_barriers) return false;
    if (warp != then.warp) return true;
    if (warp_barriers != then.warp_barriers) return false;
    return lane != then.lane || lane == kMany;
  }

  // Adds a thread's moment: what comes later and races with any that were added races with this.
  void add(const Moment& now) {
    if (launch != now.launch) {
      *this = now;
    } else if (cluster != now.cluster) {
      cluster = kManyClusters;
    } else if (cluster_barriers != now.cluster_barriers) {
      *this = now;
    } else if (block != now.block) {
      block = kMany;
    } else if (block_barriers != now.block_barriers) {
      *this = now;
    } else if (warp != now.warp) {
      warp = kMany;
    } else if (warp_barriers != now.warp_barriers) {
      *this = now;
    } else if (lane != now.lane) {
      lane = kMany;
    }
  }
};

enum class Access { read, write, copy };  // copy: an asynchronous write, until it has arrived

// The last accesses to some memory.
class Shadow {
 public:
  // Every access must be of whole granules.
  Shadow(const void* memory, size_t bytes, size_t granule)
      : begin_((const char*)memory), granule_(granule), records_(bytes / granule) {}

  // What an access races with; null: nothing.
  const char* check(const void* p, size_t bytes, Access access, const Moment& now) {
    if (bytes % granule_) return "nothing, but it is narrower than what is looked at";
    const size_t first = ((const char*)p - begin_) / granule_;
    for (size_t i = first; i < first + bytes / granule_; i++) {
      Record& record = records_[i];
      if (record.copied && record.write.launch == now.launch)
        return "a copy that was not waited for";
      if (now.races(record.write)) return "a write";
      if (access == Access::read) {
        record.reads.add(now);
        continue;
      }
      if (now.races(record.reads)) return "a read";
      record = {now, {}, access == Access::copy, ++writes_};
    }
    return nullptr;
  }

  // A copy has arrived, as its thread knows now.
  void arrive(const void* p, size_t bytes, const Moment& now) {
    const size_t first = ((const char*)p - begin_) / granule_;
    for (size_t i = first; i < first + bytes / granule_; i++)
      records_[i] = {now, {}, false, ++writes_};
  }

  // Writes so far; and whether memory was written after the first `writes` of them.
  uint64_t writes() const { return writes_; }
  bool written_since(uint64_t writes, const void* p, size_t bytes) const {
    const size_t first = ((const char*)p - begin_) / granule_;
    for (size_t i = first; i < first + bytes / granule_; i++)
      if (records_[i].number > writes) return true;
    return false;
  }

 private:
  struct Record {
    Moment write, reads;
    bool copied = false;
    uint64_t number = 0;  // of the write
  };
  const char* begin_;
  size_t granule_;
  std::vector<Record> records_;
  uint64_t writes_ = 0;
};

}  // namespace emulator
