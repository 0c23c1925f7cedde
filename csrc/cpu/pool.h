// Memory of large outputs, kept when they are freed: the system clears every page it gives anew,
// which costs as much as a small convolution.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fused_res {

constexpr size_t kLeastPooled = 64 << 10;  // bytes; less comes from pages the allocator has

void* pool_take(size_t bytes);  // at a multiple of 64
void pool_give(void* data);
int64_t pool_release();  // frees what is kept; returns how many bytes

}  // namespace fused_res
