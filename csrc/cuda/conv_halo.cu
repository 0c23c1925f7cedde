// conv_halo on a CUDA device: tensors in, tensors out. Nothing here waits for the device, and every
// launch and allocation can be captured in a CUDA graph. Kernel: conv_halo_kernels.cuh.
#include "conv_halo.h"

#include "../bn_act_checks.h"
#include "conv_halo_kernels.cuh"
#include "device.h"

namespace fused_res {
namespace {

using cuda::Epilogue;

cuda::HaloDevice halo_device(int device) {
  return known(device, [](int device) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    // the architecture of the compiled code, which can be older than the device
    cudaFuncAttributes kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(
        &kernel, cuda::conv_halo_fwd_bwd_kernel<cuda::HalfProducts<bf16>, 4, Epilogue::affine>));
    return cuda::HaloDevice{
        ask(cudaDevAttrMultiProcessorCount),
        kernel.ptxVersion < 80 ? 0 : ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
}

cuda::Kind halo_kind(const Tensor& x, bool tf32) {
  if (x.scalar_type() == ScalarType::BFloat16) return cuda::Kind::bf16;
  if (x.scalar_type() == ScalarType::Half) return cuda::Kind::fp16;
  return tf32 ? cuda::Kind::tf32 : cuda::Kind::exact;
}

void check_map(const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda() && channels_last_contiguous(x) &&
                      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                       dtype == ScalarType::Half),
                  name, " must be a float32, bfloat16 or float16 CUDA tensor (N, C, H, W), ",
                  "channels_last");
}

// Values by channel, and the tensors that own their copies.
struct Given {
  const Tensor& x;
  int64_t channels;
  std::vector<Tensor> copies = {};

  cuda::Values values(const char* name, const OptTensor& t) {
    if (!t) return {};
    const ScalarType dtype = t->scalar_type();
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels && same_device(*t, x) &&
                        (dtype == x.scalar_type() || dtype == ScalarType::Float),
                    name, " must have shape (", channels,
                    ",), be on x's device, and have x's dtype or be float32");
    copies.push_back(torch::stable::contiguous(*t));
    return {copies.back().const_data_ptr(), dtype == ScalarType::Float};
  }
};

struct Result {
  Tensor y;
  std::optional<Tensor> partial;
};

// A convolution of x by weight, or where `epilogue` is gradient by its transpose, with the taps in
// reverse.
Result run(Epilogue epilogue, const Tensor& x, const Tensor& weight, bool tf32,
           const OptTensor& residual, cuda::HaloCall call) {
  check_map("x", x);
  const bool back = epilogue == Epilogue::gradient;
  const int64_t size = weight.dim() == 4 ? weight.size(2) : 0;
  STD_TORCH_CHECK(
      (size == 1 || size == 3) && weight.size(3) == size &&
          weight.size(back ? 0 : 1) == x.size(1) && weight.scalar_type() == x.scalar_type() &&
          same_device(weight, x),
      "weight must be of a 1x1 or 3x3 convolution, with x's dtype, device and channels");
  const int64_t channels = weight.size(back ? 1 : 0);
  const Allocator device{x.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const int64_t shape[] = {x.size(0), channels, x.size(2), x.size(3)};
  const int64_t row = shape[3] * channels;
  const int64_t strides[] = {shape[2] * row, 1, row, channels};
  Tensor y = device.empty_strided(4, shape, strides, x.scalar_type());
  if (residual) {
    check_map("residual", *residual);
    check_like("residual", *residual, y);
    call.residual = residual->const_data_ptr();
  }
  const int rows = cuda::kSumsOf[(int)epilogue];
  Result result{y, {}};
  const cuda::Kind kind = halo_kind(x, tf32);
  const cuda::HaloPlan plan = cuda::plan_halo(
      kind, {shape[0], (int)shape[2], (int)shape[3], (int)x.size(1), (int)channels, (int)size},
      epilogue, residual.has_value(), halo_device(device.index));
  if (rows) {
    const int64_t sizes[] = {plan.blocks, rows, channels}, steps[] = {rows * channels, channels, 1};
    result.partial = device.empty_strided(3, sizes, steps, ScalarType::Float);
    call.partial = (float*)result.partial->mutable_data_ptr();
  }
  if (y.numel() == 0) return result;
  STD_TORCH_CHECK(plan.fits, "convolutions of ", x.size(1), " to ", channels,
                  " channels are too large for this device's shared memory");
  call.x = x.const_data_ptr(), call.y = y.mutable_data_ptr();
  call.out_stride = weight.stride(back ? 1 : 0), call.in_stride = weight.stride(back ? 0 : 1);
  call.row_stride = weight.stride(2), call.column_stride = weight.stride(3);
  const char* first = (const char*)weight.const_data_ptr();
  if (back) {
    first += (size - 1) * (call.row_stride + call.column_stride) * cuda::element_bytes(kind);
    call.row_stride *= -1, call.column_stride *= -1;
  }
  call.weight = first;
  cuda::conv_halo(kind, epilogue, plan, call, device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

Tensor conv_halo_cuda(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                      const OptTensor& mean, const OptTensor& var, const OptTensor& norm_weight,
                      const OptTensor& norm_bias, double eps, const OptTensor& residual,
                      int64_t act, bool tf32) {
  check_act(act);
  STD_TORCH_CHECK(mean.has_value() == var.has_value() && (mean || !(norm_weight || norm_bias)),
                  "a norm must have a mean and a variance");
  Given given{x, weight.size(0)};
  cuda::HaloCall call{};
  call.values = {given.values("bias", bias),
                 given.values("mean", mean),
                 given.values("var", var),
                 given.values("norm_weight", norm_weight),
                 given.values("norm_bias", norm_bias),
                 eps};
  call.act = (int)act;
  return run(Epilogue::affine, x, weight, tf32, residual, call).y;
}

std::tuple<Tensor, Tensor> conv_halo_statistics_cuda(const Tensor& x, const Tensor& weight,
                                                     const OptTensor& bias, bool tf32) {
  Given given{x, weight.size(0)};
  cuda::HaloCall call{};
  call.values.bias = given.values("bias", bias);
  const Result result = run(Epilogue::statistics, x, weight, tf32, {}, call);
  return {result.y, *result.partial};
}

std::tuple<Tensor, Tensor> conv_halo_gradient_cuda(const Tensor& dy, const Tensor& weight,
                                                   const Tensor& a, const Tensor& stats,
                                                   bool tf32) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 5 && stats.size(1) == weight.size(1) &&
                      stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      same_device(stats, dy),
                  "stats must be of bn_act: float32 of shape (5, ", weight.size(1), ")");
  cuda::HaloCall call{};
  call.stats = (const float*)stats.const_data_ptr();
  const Result result = run(Epilogue::gradient, dy, weight, tf32, a, call);
  return {result.y, *result.partial};
}

// Whether conv_halo takes maps of such sizes, of `bytes` an element, on a device.
bool conv_halo_fits(int64_t device, int64_t bytes, int64_t images, int64_t height, int64_t width,
                    int64_t channels, int64_t out_channels, int64_t size, int64_t epilogue) {
  STD_TORCH_CHECK(0 <= epilogue && epilogue <= 2, "epilogue must be 0, 1 or 2");
  torch::stable::accelerator::DeviceGuard guard(device);
  const cuda::Kind kind = bytes == 2 ? cuda::Kind::bf16 : cuda::Kind::exact;
  const cuda::HaloConv conv = {images,        (int)height,       (int)width,
                               (int)channels, (int)out_channels, (int)size};
  return cuda::plan_halo(kind, conv, (Epilogue)epilogue, 0, halo_device(device)).fits;
}

}  // namespace fused_res
