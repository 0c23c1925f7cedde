// y = act(x * scale + shift + residual), scale and shift per channel: BatchNorm in eval mode with
// the rest of the block's end. The first op of the CUDA library; backends.py does not dispatch to
// it yet.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace fused_res {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element i of a dense tensor belongs to channel i / inner % channels: inner is 1 where the tensor
// is channels_last and H*W where it is NCHW.
template <class T>
__global__ void affine_act_kernel(const T* __restrict__ x, const float* __restrict__ scale,
                                  const float* __restrict__ shift, const T* __restrict__ residual,
                                  T* __restrict__ y, int64_t elements, int64_t inner,
                                  int64_t channels, bool relu) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += step) {
    const int64_t c = i / inner % channels;
    float v = (float)x[i] * scale[c] + shift[c];
    if (residual) v += (float)residual[i];
    if (relu && v <= 0.f) v = 0.f;  // NaN stays NaN
    y[i] = (T)v;
  }
}

template <class T>
void launch(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor* residual,
            Tensor& y, int64_t inner, bool relu, cudaStream_t stream) {
  constexpr int64_t kThreads = 256, kMaxBlocks = 65536;
  const int64_t needed = (x.numel() + kThreads - 1) / kThreads;
  const dim3 blocks(needed < kMaxBlocks ? needed : kMaxBlocks), threads(kThreads);
  affine_act_kernel<T><<<blocks, threads, 0, stream>>>(
      (const T*)x.const_data_ptr(), (const float*)scale.const_data_ptr(),
      (const float*)shift.const_data_ptr(),
      residual ? (const T*)residual->const_data_ptr() : nullptr, (T*)y.mutable_data_ptr(),
      x.numel(), inner, x.size(1), relu);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void check_channels(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cuda() && t.is_contiguous() &&
                      t.get_device_index() == x.get_device_index() && t.numel() == x.size(1),
                  name, " must be float32, contiguous, on x's device and hold one value a channel");
}

}  // namespace

Tensor affine_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                  const std::optional<Tensor>& residual, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), "x must be a CUDA tensor (N, C, H, W)");
  const bool channels_last = x.stride(1) == 1 && !x.is_contiguous();
  const auto format = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                    : torch::headeronly::MemoryFormat::Contiguous;
  const Tensor dense = torch::stable::contiguous(x, format);
  check_channels("scale", scale, x);
  check_channels("shift", shift, x);
  std::optional<Tensor> other;
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type() && residual->is_cuda() &&
                        residual->get_device_index() == x.get_device_index() &&
                        residual->dim() == 4,
                    "residual must have x's dtype, device and shape");
    for (int d = 0; d < 4; d++)
      STD_TORCH_CHECK(residual->size(d) == x.size(d), "residual must have x's shape");
    other = torch::stable::contiguous(*residual, format);
  }
  Tensor y = torch::stable::empty_like(dense);
  if (x.numel() == 0) return y;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int64_t inner = channels_last ? 1 : x.size(2) * x.size(3);
  const Tensor* r = other ? &*other : nullptr;
  const auto s = (cudaStream_t)stream;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch<float>(dense, scale, shift, r, y, inner, relu, s);
      break;
    case ScalarType::Half:
      launch<__half>(dense, scale, shift, r, y, inner, relu, s);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(dense, scale, shift, r, y, inner, relu, s);
      break;
    default:
      STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16");
  }
  return y;
}

}  // namespace fused_res

STABLE_TORCH_LIBRARY(fused_res_cuda, m) {
  m.def("affine_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool relu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_res_cuda, CUDA, m) {
  m.impl("affine_act", TORCH_BOX(&fused_res::affine_act));
}
