// Tensors over libtorch's stable ABI, on any device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace fused_res {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline bool channels_last_contiguous(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (size[d] != 1 && stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

// x itself where it is contiguous in NCHW or channels_last order, else a copy in the nearer of the
// two
inline Tensor dense(const Tensor& x) {
  if (x.is_contiguous() || channels_last_contiguous(x)) return x;
  return torch::stable::contiguous(
      x, x.stride(1) == 1 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// x laid out as `like`, which is dense
inline Tensor dense_like(const Tensor& x, const Tensor& like) {
  if (like.is_contiguous()) return torch::stable::contiguous(x, MemoryFormat::Contiguous);
  return channels_last_contiguous(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

inline bool same_device(const Tensor& t, const Tensor& x) {
  return t.is_cuda() == x.is_cuda() && t.is_cpu() == x.is_cpu() &&
         (!t.is_cuda() || t.get_device_index() == x.get_device_index());
}

}  // namespace fused_res
