// res_chain on a CUDA device: tensors in, a tensor out. Nothing here waits for the device, and
// every launch and allocation can be captured in a CUDA graph. Kernels: res_chain_kernels.cuh.
#include "res_chain.h"

#include "../bn_act_checks.h"
#include "device.h"
#include "res_chain_kernels.cuh"

namespace fused_res {
namespace {

constexpr int kNumbers = 4, kNorm = 4;  // of a convolution, in the op's lists

// Whether the largest clusters fit on the current device, of which this may be a part.
bool has_clusters(int shared_bytes) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cuda::kMostCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = cuda::kMostCluster, config.blockDim = cuda::kChainThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  const auto kernel = cuda::kNewestKernel;
  int clusters = 0;
  if (cuda::allow_shared_memory((const void*)kernel) &&
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess)
    return clusters > 0;
  cudaGetLastError();  // forgotten: it goes without
  return false;
}

cuda::ChainDevice resources_of(int device) {
  return known(device, [](int device) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    // the architecture of the compiled code, which can be older than the device
    cudaFuncAttributes kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&kernel, cuda::kNewestKernel));
    if (kernel.ptxVersion < 80) return cuda::ChainDevice{};  // then nothing fits
    cuda::ChainDevice d = {ask(cudaDevAttrMultiProcessorCount),
                           ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), false};
    d.clusters =
        kernel.ptxVersion >= 90 && ask(cudaDevAttrClusterLaunch) && has_clusters(d.shared_bytes);
    return d;
  });
}

cuda::Kind kind_of(const Tensor& x, bool tf32) {
  if (x.scalar_type() == ScalarType::BFloat16) return cuda::Kind::bf16;
  if (x.scalar_type() == ScalarType::Half) return cuda::Kind::fp16;
  return tf32 ? cuda::Kind::tf32 : cuda::Kind::exact;
}

// The convolutions of a call, and the tensors that own their copies.
struct Convs {
  const Tensor& x;
  std::vector<cuda::Conv> convs;
  std::vector<Tensor> copies;

  cuda::Values values(const char* name, const OptTensor& t, int64_t channels) {
    if (!t) return {};
    const ScalarType dtype = t->scalar_type();
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels && same_device(*t, x) &&
                        (dtype == x.scalar_type() || dtype == ScalarType::Float),
                    name, " must have shape (", channels,
                    ",), be on x's device, and have x's dtype or be float32");
    copies.push_back(torch::stable::contiguous(*t));
    return {copies.back().const_data_ptr(), dtype == ScalarType::Float};
  }

  void add(const Tensor& weight, const OptTensor& bias, const OptTensor* norm, double eps,
           const int64_t* numbers) {
    const int64_t channels = convs.empty() ? x.size(1) : convs.back().out_channels;
    const int64_t size = numbers[0], out_channels = numbers[1];
    STD_TORCH_CHECK((size == 1 || size == 3) && 0 < out_channels &&
                        out_channels <= cuda::kMostChannels && 0 <= numbers[2] && numbers[2] <= 2 &&
                        (numbers[3] == 0 || numbers[3] == 1),
                    "size must be 1 or 3, channels 1 to 128, act 0, 1 or 2, last 0 or 1");
    STD_TORCH_CHECK(numbers[3] ? out_channels == x.size(1) : numbers[2] == 1,
                    "a block must end with the channels of x, and have ReLUs (act 1) within");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == out_channels &&
                        weight.size(1) == channels && weight.size(2) == size &&
                        weight.size(3) == size && weight.scalar_type() == x.scalar_type() &&
                        same_device(weight, x),
                    "weights must have shape (", out_channels, ", ", channels, ", ", size, ", ",
                    size, ") and x's dtype and device");
    STD_TORCH_CHECK(
        norm[0].has_value() == norm[1].has_value() && (norm[0] || !(norm[2] || norm[3])),
        "norms must have a mean and a variance, or be None");
    const Tensor w = dense(weight);
    copies.push_back(w);
    convs.push_back({(int)size, (int)channels, (int)out_channels, (int)numbers[2], numbers[3] == 1,
                     w.const_data_ptr(), !w.is_contiguous(), values("biases", bias, out_channels),
                     values("norms", norm[0], out_channels), values("norms", norm[1], out_channels),
                     values("norms", norm[2], out_channels), values("norms", norm[3], out_channels),
                     eps});
  }
};

}  // namespace

Tensor res_chain_params_cuda(const Tensor& x, const std::vector<Tensor>& weights,
                             const std::vector<OptTensor>& biases,
                             const std::vector<OptTensor>& norms, const std::vector<double>& eps,
                             const std::vector<int64_t>& program, bool tf32) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.is_cuda() && channels_last_contiguous(x),
                  "x must be a non-empty CUDA tensor (N, C, H, W), channels_last");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x must be float32, bfloat16 or float16 on a CUDA device");
  STD_TORCH_CHECK(x.size(1) <= cuda::kMostChannels && x.size(2) < 1 << 16 && x.size(3) < 1 << 16,
                  "x must have at most 128 channels");
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && biases.size() == count && norms.size() == kNorm * count &&
                      eps.size() == count && program.size() == kNumbers * count,
                  "weights must be at least one, with as many biases and eps, 4 norms and 4 "
                  "numbers each");
  const Allocator device{x.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  Convs given{x, {}, {}};
  for (size_t i = 0; i < count; i++)
    given.add(weights[i], biases[i], &norms[kNorm * i], eps[i], &program[kNumbers * i]);
  STD_TORCH_CHECK(given.convs.back().last, "the last convolution must end a block");

  const cuda::Kind kind = kind_of(x, tf32);
  const cuda::ChainShape shape = {x.size(0), (int)x.size(1), (int)x.size(2), (int)x.size(3)};
  const cuda::ChainPlan plan =
      cuda::plan_chain(kind, shape, given.convs, resources_of(device.index));
  STD_TORCH_CHECK(plan.fits, "maps of (", shape.channels, ", ", shape.height, ", ", shape.width,
                  ") do not fit in this device's shared memory");
  Tensor y = device.empty_like(x);
  Tensor workspace = device.empty(cuda::workspace_bytes(plan), ScalarType::Byte);
  cuda::res_chain(kind, plan, x.const_data_ptr(), y.mutable_data_ptr(),
                  workspace.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// Whether res_chain_params takes maps of these channels, height and width, of `bytes` an element,
// through convolutions of such channels out, on a device.
bool res_chain_fits(int64_t device, int64_t bytes, int64_t channels, int64_t height, int64_t width,
                    const std::vector<int64_t>& program) {
  const auto takes = [](int64_t n) { return 0 < n && n <= cuda::kMostChannels; };
  bool fits = !program.empty() && program.size() % kNumbers == 0 && takes(channels) &&
              height < 1 << 16 && width < 1 << 16;
  std::vector<cuda::Conv> convs;
  for (size_t i = 0; fits && i < program.size(); i += kNumbers) {
    const int64_t* n = &program[i];
    fits = takes(n[1]);
    cuda::Conv conv{};
    conv.size = n[0], conv.channels = convs.empty() ? channels : convs.back().out_channels;
    conv.out_channels = n[1], conv.act = n[2], conv.last = n[3];
    convs.push_back(conv);
  }
  const cuda::ChainShape shape = {1, (int)channels, (int)height, (int)width};
  const cuda::Kind kind = bytes == 2 ? cuda::Kind::bf16 : cuda::Kind::exact;
  torch::stable::accelerator::DeviceGuard guard(device);
  return fits && cuda::plan_chain(kind, shape, convs, resources_of(device)).fits;
}

}  // namespace fused_res
