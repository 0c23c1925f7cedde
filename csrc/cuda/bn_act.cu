// bn_act on a CUDA device: tensors in, tensors out. Nothing here waits for the device, and every
// launch and allocation can be captured in a CUDA graph. Kernels: bn_act_forward.cuh,
// bn_act_backward.cuh.
#include "bn_act.h"

#include <atomic>

#include "../bn_act_checks.h"
#include "bn_act_backward.cuh"
#include "bn_act_forward.cuh"
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

// elements of a run
int64_t run_of(const cuda::Shape& shape) {
  return shape.channels_last ? shape.channels : shape.pixels;
}

void check_backward(const BnActBackwardCall& call) {
  const Tensor& x = call.x;
  const bool residual_norm = call.residual_norm.has_value();
  check_input(x, call.act);
  check_like("dy", call.dy, x);
  check_channels("", "weight", call.norm.weight, x);
  if (residual_norm) check_channels("residual_", "weight", call.residual_norm->weight, x);
  check_residual(call.residual, residual_norm, x);
  check_sums(call.sums, residual_norm, x);
  check_stats(call.stats, residual_norm, x);
}

void check_mask(const Tensor& mask, const Tensor& x) {  // x is dense
  const int64_t run = run_of(shape_of(x));
  STD_TORCH_CHECK(mask.numel() == x.numel() / run * cuda::ceil_div(run, 8) &&
                      mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      same_device(mask, x),
                  "mask is not what bn_act_fwd returned for x");
}

bool needs_sums(const BnActBackwardCall& call) {
  const BnActWanted& wanted = call.wanted;
  return wanted.parameters || (wanted.x && call.norm.training) ||
         (wanted.residual && call.residual_norm && call.residual_norm->training);
}

// The gradients that a backward pass writes; those that are not wanted are empty.
struct Gradients {
  Tensor dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias;

  // outputs never alias
  Gradients(const BnActBackwardCall& call, const Tensor& x, const Allocator& device) {
    const auto nothing = [&] { return device.empty(0, x.scalar_type()); };
    const auto like_x = [&](bool wanted) { return wanted ? device.empty_like(x) : nothing(); };
    const auto like_weight = [&](const BatchNormSaved* norm) {
      const bool wanted = call.wanted.parameters && norm && norm->weight;
      return wanted ? device.empty(x.size(1), norm->weight->scalar_type()) : nothing();
    };
    const BatchNormSaved* second = call.residual_norm ? &*call.residual_norm : nullptr;
    dx = like_x(call.wanted.x), dresidual = like_x(call.wanted.residual);
    dweight = like_weight(&call.norm), dbias = like_weight(&call.norm);
    dresidual_weight = like_weight(second), dresidual_bias = like_weight(second);
  }
};

cuda::BackwardNorm backward_norm_of(const BatchNormSaved& bn, const Tensor& dweight,
                                    const Tensor& dbias) {
  const auto written = [](const Tensor& t) {
    return t.numel() ? channels_of(t, true) : cuda::Channels{};
  };
  return {channels_of(bn.weight), written(dweight), written(dbias), bn.training};
}

}  // namespace

BnActForward bn_act_fwd_cuda(const BnActForwardCall& call) {
  check_input(call.x, call.act);
  const bool residual_norm = call.residual_norm.has_value();
  check_norm("", call.norm, call.x);
  if (residual_norm) check_norm("residual_", *call.residual_norm, call.x);
  check_residual(call.residual, residual_norm, call.x);

  const Allocator device{call.x.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor x = dense(call.x);
  OptTensor residual;
  if (call.residual) residual = dense_like(*call.residual, x);
  const cuda::Shape shape = shape_of(x);
  const cuda::Device resources = resources_of(device.index);
  const int64_t run = run_of(shape);
  const bool masked = call.act != 0 && call.save_mask;
  Tensor y = device.empty_like(x);
  Tensor mask =
      device.empty(masked ? x.numel() / run : 0, cuda::ceil_div(run, 8), ScalarType::Byte);
  Tensor stats = device.empty(stats_rows(residual_norm), shape.channels, ScalarType::Float);
  Tensor scratch = device.empty(cuda::scratch_bytes(shape, resources), ScalarType::Byte);
  cuda::bn_act_forward(
      {element_of(x),
       shape,
       (cuda::Act)call.act,
       residual_norm ? cuda::Residual::norm
                     : (residual ? cuda::Residual::tensor : cuda::Residual::none),
       x.const_data_ptr(),
       data(residual),
       y.mutable_data_ptr(),
       masked ? (uint8_t*)mask.mutable_data_ptr() : nullptr,
       (float*)stats.mutable_data_ptr(),
       {norm_of(call.norm), residual_norm ? norm_of(*call.residual_norm) : cuda::ForwardNorm{}},
       scratch.mutable_data_ptr(),
       plan,
       resources},
      device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mask, stats};
}

BnActBackward bn_act_bwd_cuda(const BnActBackwardCall& call) {
  check_backward(call);
  const bool residual_norm = call.residual_norm.has_value();
  const Allocator device{call.x.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor x = dense(call.x), dy = dense_like(call.dy, x);
  if (call.act != 0) check_mask(call.mask, x);
  const cuda::Shape shape = shape_of(x);
  const cuda::Device resources = resources_of(device.index);
  OptTensor residual;  // only its BatchNorm reads it
  if (residual_norm) residual = dense_like(*call.residual, x);
  const Gradients g(call, x, device);
  Tensor scratch = device.empty(cuda::scratch_bytes(shape, resources), ScalarType::Byte);
  cuda::bn_act_backward(
      {element_of(x),
       shape,
       (cuda::Act)call.act,
       residual_norm,
       dy.const_data_ptr(),
       x.const_data_ptr(),
       data(residual),
       call.act == 0 ? nullptr : (const uint8_t*)call.mask.const_data_ptr(),
       call.wanted.x ? g.dx.mutable_data_ptr() : nullptr,
       call.wanted.residual ? g.dresidual.mutable_data_ptr() : nullptr,
       (const float*)call.stats.const_data_ptr(),
       {backward_norm_of(call.norm, g.dweight, g.dbias),
        residual_norm ? backward_norm_of(*call.residual_norm, g.dresidual_weight, g.dresidual_bias)
                      : cuda::BackwardNorm{}},
       !call.sums && needs_sums(call),
       (const double*)data(call.sums),
       scratch.mutable_data_ptr(),
       plan,
       resources},
      device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {g.dx, g.dweight, g.dbias, g.dresidual, g.dresidual_weight, g.dresidual_bias};
}

std::array<Tensor, 2> bn_act_reapply_cuda(const Tensor& x_, const Tensor& stats) {
  check_stats(stats, false, x_);
  const Allocator device{x_.get_device_index()};
  torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor x = dense(x_);
  const cuda::Shape shape = shape_of(x);
  const int64_t run = run_of(shape);
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

int64_t cuda_plan(int64_t wanted) {
  STD_TORCH_CHECK(-1 <= wanted && wanted <= (int64_t)cuda::Plan::split, "plan must be -1 to 3");
  if (wanted >= 0) plan = (cuda::Plan)wanted;
  return (int64_t)plan.load();
}

}  // namespace fused_res
