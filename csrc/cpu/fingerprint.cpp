#include "fingerprint.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace fused_res {
namespace {

constexpr int64_t kWhole = 4096;  // bytes up to which every value is looked at
// Of a large network each sample is a page that is in no cache: more than these cost a percent.
constexpr int64_t kMostSamples = 512, kAhead = 24;
constexpr size_t kDims = 4;
constexpr int64_t kLeastShared = 64;  // tensors: those of a whole network

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

// The bytes at which the samples of a tensor lie; returns how many they are. The last two
// dimensions, a kernel's, are counted through as one: each tap is seen.
int64_t spread(const Tensor& t, int64_t* at) {
  const size_t dims = t.dim(), before = kDims - dims;
  int64_t size[kDims], stride[kDims];
  for (size_t d = 0; d < kDims; d++) {
    size[d] = d < before ? 1 : t.size(d - before);
    stride[d] = d < before ? 0 : t.stride(d - before) * t.element_size();
  }
  const int64_t most = std::max({size[0], size[1], size[2] * size[3]});
  const int64_t samples = std::min(most, kMostSamples);
  const int64_t by[] = {coprime(size[0], 0.618), coprime(size[1], 0.755)};
  int64_t k = 0, c = 0, r = 0, s = 0;
  for (int64_t i = 0; i < samples; i++) {
    at[i] = k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
    k += by[0], k -= k < size[0] ? 0 : size[0];
    c += by[1], c -= c < size[1] ? 0 : size[1];
    if (++s == size[3]) {
      s = 0;
      if (++r == size[2]) r = 0;
    }
  }
  return samples;
}

uint64_t fingerprint(const Tensor& t) {
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
  if (size.size() > kDims) return of.value;  // no convolution's
  int64_t at[kMostSamples];
  const int64_t samples = spread(t, at);
  const auto mix = [&](auto value) {
    for (int64_t i = 0; i < samples; i++) {
      if (i + kAhead < samples) __builtin_prefetch(p + at[i + kAhead]);  // these are in no cache
      std::memcpy(&value, p + at[i], sizeof value);
      of.mix(value);
    }
  };
  if (bytes == 2)
    mix(uint16_t());
  else if (bytes == 4)
    mix(uint32_t());
  else
    mix(uint64_t());
  return of.value;
}

}  // namespace

// A hash of the tensors' addresses, sizes, types and values: all values of a small tensor or a
// vector; of others as many samples as the longest dimension is long (up to kMostSamples), spread
// so that every index of every dimension is among them. A change of a whole filter, channel or tap
// is seen.
int64_t fingerprint_cpu(const std::vector<Tensor>& tensors) {
  const int64_t count = tensors.size();
  const int64_t parts = count < kLeastShared ? 1 : torch::stable::get_num_threads();
  std::vector<uint64_t> each(count);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t part = lo; part < hi; part++)  // in turns: a network's later weights are larger
      for (int64_t i = part; i < count; i += parts) each[i] = fingerprint(tensors[i]);
  });
  Hash all;
  for (uint64_t one : each) all.mix(one);
  return (int64_t)all.value;
}

}  // namespace fused_res
