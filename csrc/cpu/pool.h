// Large memory that stays inside an op, kept when it is freed: the system clears every page it
// gives anew, which costs as much as a small convolution. Tensors that leave an op are PyTorch's
// memory, which can be resized, freed and shared; the stable ABI cannot make such tensors of this.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fused_res {

constexpr size_t kLeastPooled = 64 << 10;  // bytes; less comes from pages the allocator has
constexpr size_t kLeastHuge = 4 << 20;     // bytes

void* pool_take(size_t bytes);  // at a multiple of 64
void pool_give(void* data);
int64_t pool_release();  // frees all kept memory; returns how many bytes

// Asks for pages of 2 MB under fresh memory, which are cleared several times as fast as small ones.
void use_huge_pages(void* data, size_t bytes);

}  // namespace fused_res
