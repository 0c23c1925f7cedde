#include "stamp.h"

#include <cstring>
#include <numeric>

namespace fused_res {
namespace {

constexpr int64_t kWhole = 4096;  // bytes up to which every value is looked at
// Of a large network each sample is a page that is in no cache: more than these cost a percent.
constexpr int64_t kMostSamples = 512, kAhead = 24;

struct Hash {
  uint64_t value = 0xcbf29ce484222325u;
  void mix(uint64_t more) {
    value = (value ^ more) * 0x9e3779b97f4a7c15u;
    value ^= value >> 32;
  }
};

// Steps that visit every index of a dimension once, far from the last each time: no block and no
// stride of two dimensions goes unseen for long.
int64_t coprime(int64_t size, double part) {
  for (int64_t by = (int64_t)(size * part); by > 1; by--)
    if (std::gcd(by, size) == 1) return by;
  return 1;
}

uint64_t stamp(const Tensor& t) {
  Hash of;
  const char* p = (const char*)t.const_data_ptr();
  const auto size = t.sizes(), stride = t.strides();
  of.mix((uint64_t)p);
  of.mix((uint64_t)t.scalar_type());
  for (size_t d = 0; d < size.size(); d++) of.mix(size[d]), of.mix(stride[d]);
  const int64_t bytes = t.element_size(), count = t.numel();
  if (!t.is_cpu() || count == 0 || bytes < 2) return of.value;
  const bool dense = t.is_contiguous() || (t.dim() == 4 && channels_last_contiguous(t));
  if (dense && (t.dim() == 1 || count * bytes <= kWhole)) {
    const int64_t end = count * bytes;
    uint64_t value;
    for (int64_t i = 0; i + 8 <= end; i += 8) {
      std::memcpy(&value, p + i, 8);
      of.mix(value);
    }
    for (int64_t i = end / 8 * 8; i < end; i++) of.mix((unsigned char)p[i]);
    return of.value;
  }
  // the last two dimensions, a kernel's, are counted through as one: each tap is seen
  const size_t outer = size.size() > 2 ? size.size() - 2 : 0;
  int64_t taps = 1;
  for (size_t d = outer; d < size.size(); d++) taps *= size[d];
  int64_t samples = taps;
  for (size_t d = 0; d < outer; d++) samples = std::max(samples, size[d]);
  samples = std::min<int64_t>(samples, kMostSamples);
  std::vector<int64_t> by(size.size(), 1);
  for (size_t d = 0; d < outer; d++) by[d] = coprime(size[d], d % 2 ? 0.755 : 0.618);
  struct Walk {
    std::vector<int64_t> index;
    int64_t at;
  };
  const auto step = [&](Walk& walk, size_t d) {  // whether it turned over
    const int64_t before = walk.index[d], next = before + by[d];
    walk.index[d] = next < size[d] ? next : next - size[d];
    walk.at += (walk.index[d] - before) * stride[d];
    return next >= size[d];
  };
  const auto next = [&](Walk& walk) {
    for (size_t d = 0; d < outer; d++) step(walk, d);
    for (size_t d = size.size(); d-- > outer;)
      if (!step(walk, d)) break;
  };
  Walk here{std::vector<int64_t>(size.size()), 0}, ahead = here;
  for (int64_t i = 0; i < kAhead; i++) next(ahead);
  for (int64_t i = 0; i < samples; i++) {
    __builtin_prefetch(p + ahead.at * bytes);  // these are in no cache
    uint64_t value = 0;
    uint16_t half;
    for (int64_t b = 0; b < bytes; b += 2) {
      std::memcpy(&half, p + here.at * bytes + b, 2);
      value = value << 16 | half;
    }
    of.mix(value);
    next(here);
    next(ahead);
  }
  return of.value;
}

}  // namespace

// A number made of the tensors' addresses, sizes, types and values: all of a small tensor or a
// vector, and of others as many as their longest dimension has, spread so that every index of every
// dimension is among them (of up to kMostSamples). So a change of a whole filter, channel or tap is
// seen.
int64_t stamp_cpu(const std::vector<Tensor>& tensors) {
  Hash all;
  for (const Tensor& t : tensors) all.mix(stamp(t));
  return (int64_t)all.value;
}

}  // namespace fused_res
