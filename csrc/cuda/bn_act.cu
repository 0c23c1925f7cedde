// bn_act on a CUDA device: tensors in, tensors out. Nothing here waits for the device, and every
// launch and allocation can be captured in a CUDA graph. Kernels: bn_act_kernels.cuh.
#include "../bn_act_checks.h"
#include "../res_block.h"

#include <atomic>

#include "bn_act_kernels.cuh"
#include "device.h"

namespace fused_res {
namespace {

cuda::Element element_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return cuda::Element::bf16;
  if (x.scalar_type() == ScalarType::Half) return cuda::Element::f16;
  return cuda::Element::f32;
}

cuda::Shape shape_of(const Tensor& x) {  // x is dense
  const int64_t pixels = x.size(2) * x.size(3);
  return {x.size(0), x.size(1), pixels, pixels == 1 || !x.is_contiguous()};
}

cuda::Device resources_of(int device) {
  return known(device, [](int device) {
    cuda::Device d;
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&d.shared_bytes,
                                          cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    return d;
  });
}

std::atomic<cuda::Plan> plan = cuda::Plan::automatic;

const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

cuda::Channels channels_of(const OptTensor& t, bool written = false) {
  if (!t) return {};
  void* data = written ? t->mutable_data_ptr() : const_cast<void*>(t->const_data_ptr());
  return {data, t->stride(0), t->scalar_type() == ScalarType::Float};
}

cuda::ForwardNorm norm_of(const BatchNorm& bn) {
  return {channels_of(bn.weight),
          channels_of(bn.bias),
          channels_of(bn.running_mean, bn.training),
          channels_of(bn.running_var, bn.training),
          bn.training,
          bn.momentum,
          bn.eps};
}

// checked before anything is done, as in bn_act_checks.h
void check_input(const Tensor& x, int64_t act) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.is_cuda(),
                  "x must be a non-empty CUDA tensor (N, C, H, W)");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x must be float32, bfloat16 or float16 on a CUDA device");
  // a grid has at most 2^31 blocks
  STD_TORCH_CHECK(x.size(1) < (int64_t)1 << 31, "x must have fewer than 2^31 channels");
  check_act(act);
}

void check_stats(const Tensor& stats, bool residual_norm, const Tensor& x) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == stats_rows(residual_norm) &&
                      stats.size(1) == x.size(1) && stats.is_contiguous() &&
                      stats.scalar_type() == ScalarType::Float && same_device(stats, x),
                  "stats is not what bn_act_fwd returned for x");
}

}  // namespace

BnActForward bn_act_fwd_cuda(const Tensor& x_, const OptTensor& weight, const OptTensor& bias,
                             const OptTensor& running_mean, const OptTensor& running_var,
                             bool training, double momentum, double eps, const OptTensor& residual_,
                             bool residual_norm, const OptTensor& residual_weight,
                             const OptTensor& residual_bias, const OptTensor& residual_running_mean,
                             const OptTensor& residual_running_var, bool residual_training,
                             double residual_momentum, double residual_eps, int64_t act,
                             bool save_mask) {
  check_input(x_, act);
  const BatchNorm bn{weight, bias, running_mean, running_var, training, momentum, eps};
  const BatchNorm residual_bn{residual_weight,      residual_bias,     residual_running_mean,
                              residual_running_var, residual_training, residual_momentum,
                              residual_eps};
  check_norm("", bn, x_);
  if (residual_norm) check_norm("residual_", residual_bn, x_);
  check_residual(residual_, residual_norm, x_);

  const Allocator device{x_.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor x = dense(x_);
  OptTensor residual;
  if (residual_) residual = dense_like(*residual_, x);
  const cuda::Shape shape = shape_of(x);
  const cuda::Device resources = resources_of(device.index);
  const int64_t run = shape.channels_last ? shape.channels : shape.pixels;
  const bool masked = act != 0 && save_mask;
  Tensor y = device.empty_like(x);
  Tensor mask =
      device.empty(masked ? x.numel() / run : 0, cuda::ceil_div(run, 8), ScalarType::Byte);
  Tensor stats = device.empty(stats_rows(residual_norm), shape.channels, ScalarType::Float);
  Tensor scratch = device.empty(cuda::scratch_bytes(shape, resources), ScalarType::Byte);
  cuda::bn_act_forward({element_of(x),
                        shape,
                        (cuda::Act)act,
                        residual_norm ? cuda::Residual::norm
                                      : (residual ? cuda::Residual::tensor : cuda::Residual::none),
                        x.const_data_ptr(),
                        data(residual),
                        y.mutable_data_ptr(),
                        masked ? (uint8_t*)mask.mutable_data_ptr() : nullptr,
                        (float*)stats.mutable_data_ptr(),
                        {norm_of(bn), residual_norm ? norm_of(residual_bn) : cuda::ForwardNorm{}},
                        scratch.mutable_data_ptr(),
                        plan,
                        resources},
                       device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mask, stats};
}

BnActBackward bn_act_bwd_cuda(const Tensor& dy_, const Tensor& x_, const OptTensor& weight,
                              bool training, const OptTensor& residual_, bool residual_norm,
                              const OptTensor& residual_weight, bool residual_training,
                              const Tensor& stats, const Tensor& mask, int64_t act, bool need_x,
                              bool need_residual, bool need_parameters, const OptTensor& sums) {
  check_input(x_, act);
  check_like("dy", dy_, x_);
  check_channels("", "weight", weight, x_);
  check_channels("residual_", "weight", residual_weight, x_);
  check_residual(residual_, residual_norm, x_);
  check_sums(sums, residual_norm, x_);
  check_stats(stats, residual_norm, x_);

  const Allocator device{x_.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor x = dense(x_), dy = dense_like(dy_, x);
  const cuda::Shape shape = shape_of(x);
  const cuda::Device resources = resources_of(device.index);
  const int64_t run = shape.channels_last ? shape.channels : shape.pixels;
  STD_TORCH_CHECK(act == 0 || (mask.numel() == x.numel() / run * cuda::ceil_div(run, 8) &&
                               mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                               same_device(mask, x)),
                  "mask is not what bn_act_fwd returned for x");
  OptTensor residual;  // only its BatchNorm reads it
  if (residual_norm) residual = dense_like(*residual_, x);
  const auto nothing = [&] { return device.empty(0, x.scalar_type()); };  // outputs never alias
  const auto like_x = [&](bool wanted) { return wanted ? device.empty_like(x) : nothing(); };
  const auto like_weight = [&](const OptTensor& w, bool used) {
    return w && used && need_parameters ? device.empty(shape.channels, w->scalar_type())
                                        : nothing();
  };
  Tensor dx = like_x(need_x), dresidual = like_x(need_residual);
  Tensor dweight = like_weight(weight, true), dbias = like_weight(weight, true);
  Tensor dresidual_weight = like_weight(residual_weight, residual_norm);
  Tensor dresidual_bias = like_weight(residual_weight, residual_norm);
  Tensor scratch = device.empty(cuda::scratch_bytes(shape, resources), ScalarType::Byte);
  const auto written = [](const Tensor& t) {
    return t.numel() ? channels_of(t, true) : cuda::Channels{};
  };
  const bool second_trains = residual_norm && residual_training;
  cuda::bn_act_backward(
      {element_of(x),
       shape,
       (cuda::Act)act,
       residual_norm,
       dy.const_data_ptr(),
       x.const_data_ptr(),
       data(residual),
       act == 0 ? nullptr : (const uint8_t*)mask.const_data_ptr(),
       need_x ? dx.mutable_data_ptr() : nullptr,
       need_residual ? dresidual.mutable_data_ptr() : nullptr,
       (const float*)stats.const_data_ptr(),
       {{channels_of(weight), written(dweight), written(dbias), training},
        {channels_of(residual_weight), written(dresidual_weight), written(dresidual_bias),
         residual_training}},
       !sums && (need_parameters || (need_x && training) || (need_residual && second_trains)),
       (const double*)data(sums),
       scratch.mutable_data_ptr(),
       plan,
       resources},
      device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias};
}

std::array<Tensor, 2> bn_act_reapply_cuda(const Tensor& x_, const Tensor& stats) {
  check_stats(stats, false, x_);
  const Allocator device{x_.get_device_index()};
  const Tensor x = dense(x_);
  const cuda::Shape shape = shape_of(x);
  const int64_t run = shape.channels_last ? shape.channels : shape.pixels;
  Tensor y = device.empty_like(x);
  Tensor mask = device.empty(x.numel() / run, cuda::ceil_div(run, 8), ScalarType::Byte);
  cuda::ForwardArgs args{};
  args.element = element_of(x);
  args.shape = shape;
  args.act = cuda::Act::relu;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.mask = (uint8_t*)mask.mutable_data_ptr();
  args.stats = (float*)const_cast<void*>(stats.const_data_ptr());
  cuda::bn_act_reapply(args, device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mask};
}

Tensor bn_act_statistics_cuda(const Tensor& x_) {
  check_input(x_, 0);
  const Allocator device{x_.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor x = dense(x_);
  cuda::ForwardArgs args{};
  args.element = element_of(x);
  args.shape = shape_of(x);
  args.x = x.const_data_ptr();
  args.norm[0].training = true;
  const int64_t bytes = cuda::scratch_bytes(args.shape, resources_of(device.index));
  const Tensor scratch = device.empty(bytes, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  Tensor statistics = device.empty(3, args.shape.channels, ScalarType::Double);
  cuda::bn_act_statistics(args, (double*)statistics.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return statistics;
}

// --- what a block is made of

constexpr int kCounters = 32;
struct Counters {
  int64_t* counters[kCounters];
};
__global__ void count_kernel(const Counters counters) { ++*counters.counters[threadIdx.x]; }

struct CudaLibrary {
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& x) : DeviceGuard(x.get_device_index()) {}
  };
  static constexpr auto bn_act_fwd = bn_act_fwd_cuda;
  struct Later {};
  static bool waits(const BlockStage&, const Tensor&, const Tensor&) { return false; }
  template <class... Args>
  static auto bn_act_bwd_later(Later*, const Args&... args) {
    return bn_act_bwd_cuda(args...);
  }
  static constexpr auto bn_act_reapply = bn_act_reapply_cuda;
  static Tensor convolve(const BlockStage& s, const Tensor& x) {
    return s.convolve<CudaLibrary>(x);
  }
  static bool adds(const BlockStage&, const Tensor&, const Tensor&, const Tensor&) { return false; }
  static std::array<Tensor, 3> convolve_backward(const BlockStage& s, const Tensor& dy,
                                                 const Tensor& x, const std::array<bool, 3>& wanted,
                                                 const OptTensor&, const Later&) {
    return s.convolve_backward<CudaLibrary>(dy, x, wanted);
  }
  static constexpr auto convolution = aoti_torch_cuda_convolution;
  static constexpr auto convolution_backward = aoti_torch_cuda_convolution_backward;
  static void count(const Tensors& tensors) {
    STD_TORCH_CHECK(tensors.size() <= kCounters, "a block has at most 32 BatchNorms that train");
    const Allocator device{tensors[0].get_device_index()};
    Counters counters{};
    for (size_t i = 0; i < tensors.size(); i++)
      counters.counters[i] = (int64_t*)tensors[i].mutable_data_ptr();
    count_kernel<<<1, (unsigned)tensors.size(), 0, device.stream()>>>(counters);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

int64_t cuda_plan(int64_t wanted) {
  STD_TORCH_CHECK(-1 <= wanted && wanted <= (int64_t)cuda::Plan::split, "plan must be -1 to 3");
  if (wanted >= 0) plan = (cuda::Plan)wanted;
  return (int64_t)plan.load();
}

}  // namespace fused_res

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) {
  m.impl("bn_act_fwd", TORCH_BOX(&fused_res::bn_act_fwd_cuda));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_res::bn_act_bwd_cuda));
  m.impl("bn_act_statistics", TORCH_BOX(&fused_res::bn_act_statistics_cuda));
  m.impl("res_block_fwd", TORCH_BOX(&fused_res::res_block_fwd<fused_res::CudaLibrary>));
  m.impl("res_block_bwd", TORCH_BOX(&fused_res::res_block_bwd<fused_res::CudaLibrary>));
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&fused_res::cuda_plan));
}
