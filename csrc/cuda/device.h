// A CUDA device's resources, memory and stream, past the dispatcher.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <map>
#include <mutex>

#include "../tensors.h"

namespace fused_res {

// The answer of `query` about a device, asked once.
template <class Query>
auto known(int device, const Query& query) {
  static std::mutex mutex;
  static std::map<int, decltype(query(device))> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = answers.find(device);
  return found != answers.end() ? found->second : answers[device] = query(device);
}

// Uninitialised tensors, and the current stream.
struct Allocator {
  int32_t index;

  Tensor empty_strided(int64_t dim, const int64_t* size, const int64_t* stride,
                       ScalarType dtype) const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, stride, static_cast<int32_t>(dtype),
                                                    aoti_torch_device_type_cuda(), index, &handle));
    return Tensor(handle);
  }
  Tensor empty_like(const Tensor& x) const {  // x is dense
    return empty_strided(x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
  }
  Tensor empty(int64_t rows, int64_t columns, ScalarType dtype) const {
    const int64_t size[] = {rows, columns}, stride[] = {std::max<int64_t>(columns, 1), 1};
    return empty_strided(2, size, stride, dtype);
  }
  Tensor empty(int64_t length, ScalarType dtype) const {
    const int64_t stride = 1;
    return empty_strided(1, &length, &stride, dtype);
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return (cudaStream_t)stream;
  }
};

}  // namespace fused_res
