#include "pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fused_res {
namespace {

constexpr size_t kMostKept = 256 << 20;  // bytes; the oldest go first
constexpr size_t kHeader = 64;           // in front of the data: how many bytes there are

struct Pool {
  std::mutex mutex;
  std::vector<char*> kept;  // oldest first
  size_t bytes = 0;
};

Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: tensors may outlive this library's statics
  return *p;
}

size_t& size_of(char* block) { return *(size_t*)block; }

}  // namespace

void* pool_take(size_t bytes) {
  Pool& p = pool();
  {
    const std::lock_guard lock(p.mutex);
    // the newest, which is in the caches; none much larger than is needed
    for (size_t i = p.kept.size(); i-- > 0;) {
      char* block = p.kept[i];
      if (size_of(block) < bytes || size_of(block) > bytes + bytes / 4) continue;
      p.kept.erase(p.kept.begin() + i);
      p.bytes -= size_of(block);
      return block + kHeader;
    }
  }
  const size_t size = (bytes + 4095) / 4096 * 4096;
  char* block = (char*)std::aligned_alloc(64, size + kHeader);
  if (!block) throw std::bad_alloc();
  size_of(block) = size;
  return block + kHeader;
}

void pool_give(void* data) {
  char* block = (char*)data - kHeader;
  Pool& p = pool();
  std::vector<char*> old;
  {
    const std::lock_guard lock(p.mutex);
    p.kept.push_back(block);
    p.bytes += size_of(block);
    size_t n = 0;
    for (; p.bytes > kMostKept; n++) p.bytes -= size_of(p.kept[n]);
    old.assign(p.kept.begin(), p.kept.begin() + n);
    p.kept.erase(p.kept.begin(), p.kept.begin() + n);
  }
  for (char* b : old) std::free(b);
}

int64_t pool_release() {
  Pool& p = pool();
  std::vector<char*> old;
  size_t bytes;
  {
    const std::lock_guard lock(p.mutex);
    old.swap(p.kept);
    bytes = std::exchange(p.bytes, 0);
  }
  for (char* b : old) std::free(b);
  return (int64_t)bytes;
}

void use_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = ((uintptr_t)data + kPage - 1) / kPage * kPage;
  const uintptr_t end = ((uintptr_t)data + bytes) / kPage * kPage;
  // fails where the system has none, or other pages than these: nothing is lost
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

}  // namespace fused_res
