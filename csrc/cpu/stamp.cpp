#include "stamp.h"

#include <cstring>

namespace fused_res {

constexpr int64_t kWhole = 4096;  // bytes up to which every value is looked at
constexpr int64_t kMostSamples = 8192;

// A number made of the tensors' addresses, sizes, types and values: all of a small tensor or a
// vector, and of others as many as their longest dimension has, spread so that every index of every
// dimension is among them. A change of a whole filter, channel or tap is seen.
int64_t stamp_cpu(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  for (const Tensor& t : tensors) {
    const char* p = (const char*)t.const_data_ptr();
    const auto size = t.sizes(), stride = t.strides();
    mix((uint64_t)p);
    mix((uint64_t)t.scalar_type());
    for (size_t d = 0; d < size.size(); d++) mix(size[d]), mix(stride[d]);
    const int64_t bytes = t.element_size(), count = t.numel();
    if (!t.is_cpu() || count == 0 || bytes < 2) continue;
    const bool dense = t.is_contiguous() || (t.dim() == 4 && channels_last_contiguous(t));
    if (dense && (t.dim() == 1 || count * bytes <= kWhole)) {
      const int64_t end = count * bytes;
      uint64_t value;
      for (int64_t i = 0; i + 8 <= end; i += 8) {
        std::memcpy(&value, p + i, 8);
        mix(value);
      }
      for (int64_t i = end / 8 * 8; i < end; i++) mix((unsigned char)p[i]);
      continue;
    }
    // the last two dimensions, a kernel's, are counted through as one: each tap is seen
    const size_t outer = size.size() > 2 ? size.size() - 2 : 0;
    int64_t taps = 1;
    for (size_t d = outer; d < size.size(); d++) taps *= size[d];
    int64_t samples = taps;
    for (size_t d = 0; d < outer; d++) samples = std::max(samples, size[d]);
    samples = std::min<int64_t>(samples, kMostSamples);
    std::vector<int64_t> index(size.size());
    int64_t at = 0;
    const auto step = [&](size_t d) {  // whether it turned over
      at += stride[d];
      if (++index[d] < size[d]) return false;
      index[d] = 0;
      at -= size[d] * stride[d];
      return true;
    };
    for (int64_t i = 0; i < samples; i++) {
      uint64_t value = 0;
      uint16_t half;
      for (int64_t b = 0; b < bytes; b += 2) {
        std::memcpy(&half, p + at * bytes + b, 2);
        value = value << 16 | half;
      }
      mix(value);
      for (size_t d = 0; d < outer; d++) step(d);
      for (size_t d = size.size(); d-- > outer;)
        if (!step(d)) break;
    }
  }
  return (int64_t)hash;
}

}  // namespace fused_res
