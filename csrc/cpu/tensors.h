// Tensors and threads of the CPU ops.
#pragma once
#include "../elements.h"
#include "../tensors.h"
#include "pool.h"

namespace fused_res {

// Uninitialised CPU tensors, past the dispatcher: a boxed call costs as much as a small kernel.
inline Tensor empty_strided(int64_t dim, const int64_t* size, const int64_t* stride,
                            ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, stride, static_cast<int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor t(handle);
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  if (bytes >= (int64_t)kLeastHuge) use_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

inline Tensor uninitialised_like(const Tensor& x) {  // x is dense
  return empty_strided(x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
}

inline Tensor uninitialised(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t size[] = {rows, columns}, stride[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(2, size, stride, dtype);
}

inline Tensor uninitialised(int64_t length, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(1, &length, &stride, dtype);
}

template <class Call>
inline void with_element_type(ScalarType dtype, const Call& call) {
  switch (dtype) {
    case ScalarType::Float:
      return call(float{});
    case ScalarType::BFloat16:
      return call(bf16{});
    case ScalarType::Half:
      return call(fp16{});
    case ScalarType::Double:
      return call(double{});
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

// a per-channel tensor in double; `missing` where there is none
inline std::vector<double> read_channels(const OptTensor& t, int64_t channels, double missing) {
  std::vector<double> values(channels, missing);
  if (!t) return values;
  with_element_type(t->scalar_type(), [&](auto element) {
    const auto* p = (const decltype(element)*)t->const_data_ptr();
    const int64_t stride = t->stride(0);
    for (int64_t c = 0; c < channels; c++) values[c] = load_element(p + c * stride);
  });
  return values;
}

inline void write_channels(const std::vector<double>& values, const Tensor& t) {
  with_element_type(t.scalar_type(), [&](auto element) {
    auto* p = (decltype(element)*)t.mutable_data_ptr();
    const int64_t stride = t.stride(0);
    for (size_t c = 0; c < values.size(); c++) store_element(values[c], p + c * stride);
  });
}

constexpr int64_t kSerialBelow = 1 << 15;  // a fork costs about as much as this many elements

// f(begin, end) over [0, n), in parallel where the whole job touches enough elements to pay for it
template <class F>
inline void parallel(int64_t n, int64_t elements, const F& f) {
  if (n <= 1 || elements < kSerialBelow)
    f((int64_t)0, n);
  else
    torch::stable::parallel_for(0, n, 1, f);
}

}  // namespace fused_res
