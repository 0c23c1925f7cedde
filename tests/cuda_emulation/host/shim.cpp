// Every op of csrc/cuda/ops.cu on CPU tensors, under another namespace: the real host code, whose
// calls of libtorch's C interface and of the CUDA runtime come here. To the host code a CPU tensor
// is on a CUDA device, and every address that it asks for is memory that kernels may use: to read
// where it asked for a const one. tests/cuda_emulation/host.py is the other side.
#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/library.h>

#include <set>

#undef STABLE_TORCH_LIBRARY_IMPL
#define KEY_CUDA CPU
#define KEY_CompositeExplicitAutograd CompositeExplicitAutograd
#define IMPL_AS(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns, k, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) IMPL_AS(EMULATED_NAMESPACE, KEY_##k, m)
#include "../../../csrc/cuda/ops.cu"

namespace host {

constexpr int64_t kMostShadowed = 4 << 20;  // bytes of memory whose accesses may race
constexpr int kCpu = -1, kStaticLimit = 48 << 10, kStaticOfNorm = 17 << 10;

struct Device {
  int multiprocessors, block_bytes, multiprocessor_bytes;  // of shared memory
  int ptx;                                                 // version of the compiled code
  bool clusters;
  cudaStream_t stream = nullptr;  // the current one
};

struct State {
  std::vector<Device> devices;
  int current = 0, of_tensors = 0;
  bool runs = true, fakes = false;  // kernels run; allocations are addresses alone
  uint64_t seed = 0;
  int most_together = 1 << 30;           // blocks of a cooperative launch
  std::map<std::string, int> refused;    // errors of functions, by name
  std::map<const void*, int> elsewhere;  // devices of tensors that are not on of_tensors
  std::set<std::string> planted;         // faults
  std::map<std::pair<const void*, int>, int> allowed;  // bytes of dynamic shared memory
  cudaError_t last_error = cudaSuccess;
  std::vector<AtenTensorHandle> kept;  // tensors of this call, whose memory is not used again
  std::string report;                  // lines of this call
};

State state;

void say(const std::string& line) { state.report += line + "\n"; }
void violation(const std::string& what) { say("violation " + what); }
bool planted(const char* fault) { return state.planted.count(fault) > 0; }

// What a function returns, and whether it was called for the device that the tensors are on.
cudaError_t answer(const char* function, cudaError_t error = cudaSuccess) {
  say(std::string("call ") + function + " " + std::to_string(state.current));
  if (state.current != state.of_tensors)
    violation(std::string(function) + " on device " + std::to_string(state.current) +
              ", tensors are on " + std::to_string(state.of_tensors));
  const auto found = state.refused.find(function);
  if (found != state.refused.end()) error = (cudaError_t)found->second;
  if (error != cudaSuccess) state.last_error = error;
  return error;
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "unknown";
  char* text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  std::string name = text ? text : info.dli_sname;
  free(text);
  const size_t last = name.find("_kernel"), first = name.rfind(':', last);
  return name.substr(first == std::string::npos ? 0 : first + 1, last - first - 1);
}

// Static shared memory of a kernel: as much as the host code counts on.
int static_bytes(const std::string& name) { return name.find("bn_act") == 0 ? kStaticOfNorm : 0; }

int cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
}

int allowed_bytes(const void* kernel) {
  const auto found = state.allowed.find({kernel, state.current});
  return found != state.allowed.end() ? found->second
                                      : kStaticLimit - static_bytes(name_of(kernel));
}

// Whether the current device has such launches.
cudaError_t check(const void* kernel, const cudaLaunchConfig_t& config, bool cooperative) {
  const Device& device = state.devices[state.current];
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const size_t shared = config.dynamicSmemBytes;
  const int cluster = cluster_of(config);
  if (!grid.x || grid.x > INT32_MAX || !grid.y || grid.y > 65535 || grid.z != 1 || !block.x ||
      block.x > 1024 || block.y != 1 || block.z != 1)
    return cudaErrorInvalidConfiguration;
  if ((int64_t)shared > allowed_bytes(kernel)) return cudaErrorInvalidValue;
  if (config.numAttrs && (!device.clusters || device.ptx < 90)) return cudaErrorNotSupported;
  if (cluster < 1 || cluster > 8 || grid.x % cluster) return cudaErrorInvalidClusterSize;
  const size_t of_block = shared + static_bytes(name_of(kernel)) + 1024;
  const int64_t together = device.multiprocessors * (device.multiprocessor_bytes / of_block);
  if (cooperative && (grid.x > together || (int64_t)grid.x > state.most_together))
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

cudaError_t attributes_of(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {(size_t)static_bytes(name_of(kernel)), state.devices[state.current].ptx};
  return answer("cudaFuncGetAttributes");
}

cudaError_t clusters_of(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  const cudaError_t error = check(kernel, config, false);
  *clusters = state.devices[state.current].multiprocessors / cluster_of(config);
  return answer("cudaOccupancyMaxActiveClusters", error);
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& given, bool cooperative,
                   const std::function<void()>& body) {
  cudaLaunchConfig_t config = given;
  if (planted("smaller grid")) config.gridDim.x -= cluster_of(config);
  const std::string name = name_of(kernel);
  const dim3& grid = config.gridDim;
  const int threads = config.blockDim.x, cluster = cluster_of(config);
  const cudaError_t error =
      answer(cooperative ? "cudaLaunchCooperativeKernel" : "cudaLaunchKernelEx",
             check(kernel, config, cooperative));
  if (config.stream != state.devices[state.of_tensors].stream)
    violation(name + " is not on the current stream");
  if (error != cudaSuccess) return error;
  say("launch " + name + " " + std::to_string(grid.x) + " " + std::to_string(grid.y) + " " +
      std::to_string(threads) + " " + std::to_string(config.dynamicSmemBytes) + " " +
      std::to_string(cluster) + " " + std::to_string(cooperative) + " " +
      std::to_string(state.current) + " " + std::to_string((uintptr_t)config.stream));
  if (!state.runs) return cudaSuccess;
  emulator::machine.random = ++state.seed * 2 + 1;
  emulator::launch(name.c_str(), grid, threads, cooperative ? grid.x : cluster,
                   config.dynamicSmemBytes, body);
  if (emulator::machine.shared_used > (size_t)static_bytes(name))
    violation(name + " has more static shared memory than the host code counts on");
  return cudaSuccess;
}

// Lets kernels use a tensor's memory until the call is over.
void use(AtenTensorHandle tensor, const void* data, bool writable) {
  int64_t dim, *size, *stride, end = 1;
  int32_t dtype;
  aoti_torch_get_dim(tensor, &dim), aoti_torch_get_dtype(tensor, &dtype);
  aoti_torch_get_sizes(tensor, &size), aoti_torch_get_strides(tensor, &stride);
  for (int i = 0; i < dim; i++) {
    if (size[i] == 0) return;
    end += (size[i] - 1) * stride[i];
  }
  AtenTensorHandle copy;
  aoti_torch_new_tensor_handle(tensor, &copy);
  state.kept.push_back(copy);
  const char* begin = (const char*)data;
  end *= aoti_torch_dtype_element_size(dtype);
  auto& regions = emulator::machine.regions;
  auto found = std::find_if(regions.begin(), regions.end(), [&](const emulator::Region& region) {
    return region.begin == begin && region.end == begin + end;
  });
  if (found == regions.end()) {
    const std::string name = "tensor" + std::to_string(regions.size());
    regions.push_back({name, begin, begin + end, writable, emulator::Count{}});
    found = regions.end() - 1;
  }
  found->writable = writable;
  if (writable && !found->shadow && end <= kMostShadowed)
    found->shadow.emplace(begin, end, aoti_torch_dtype_element_size(dtype));
}

int device_of(AtenTensorHandle tensor) {
  void* data;
  aoti_torch_get_data_ptr(tensor, &data);
  const auto found = state.elsewhere.find(data);
  return found == state.elsewhere.end() ? state.of_tensors : found->second;
}

// Where overflows of signed integers are reported to, by -fsanitize=signed-integer-overflow.
struct Place {
  const char* file;
  uint32_t line, column;
};
void overflow(const Place* place) {
  violation(std::string("an integer overflows at ") + place->file + ":" +
            std::to_string(place->line));
}

}  // namespace host

using host::state;

cudaError_t cudaGetLastError() {
  const cudaError_t error = state.last_error;
  state.last_error = cudaSuccess;
  return error;
}
cudaError_t cudaGetDevice(int* device) {
  *device = state.current;
  return host::answer("cudaGetDevice");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index < 0 || index >= (int)state.devices.size())
    return host::answer("cudaDeviceGetAttribute", cudaErrorInvalidDevice);
  const host::Device& device = state.devices[index];
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMultiProcessorCount, device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.multiprocessor_bytes},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.block_bytes},
      {cudaDevAttrClusterLaunch, device.clusters},
  };
  *value = values.at(attribute);
  return host::answer("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const int most = state.devices[state.current].block_bytes;
  const bool fits = value >= 0 && value + host::static_bytes(host::name_of(kernel)) <= most;
  const cudaError_t error =
      host::answer("cudaFuncSetAttribute", fits ? cudaSuccess : cudaErrorInvalidValue);
  if (error == cudaSuccess && !host::planted("no opt-in"))
    state.allowed[{kernel, state.current}] = value;
  return error;
}

extern "C" {

// --- libtorch's C interface: the part that is not in a libtorch without CUDA, ...

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char* function, uint32_t,
                                        bool, char** message) {
  *message = nullptr;
  if (error == cudaSuccess) return AOTI_TORCH_SUCCESS;
  cudaGetLastError();
  const std::string text = "CUDA error " + std::to_string(error) + " in " + function;
  *message = strdup(text.c_str());
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = host::planted("default stream") ? nullptr : state.devices.at(index).stream;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cuda_convolution(AtenTensorHandle x, AtenTensorHandle weight,
                                           AtenTensorHandle* bias, const int64_t* stride,
                                           int64_t strides, const int64_t* padding,
                                           int64_t paddings, const int64_t* dilation,
                                           int64_t dilations, int32_t transposed,
                                           const int64_t* more, int64_t mores, int64_t groups,
                                           AtenTensorHandle* result) {
  host::answer("convolution");
  return aoti_torch_cpu_convolution(x, weight, bias, stride, strides, padding, paddings, dilation,
                                    dilations, transposed, more, mores, groups, result);
}
AOTITorchError aoti_torch_cuda_convolution_backward(
    AtenTensorHandle dy, AtenTensorHandle x, AtenTensorHandle weight, const int64_t** bias,
    int64_t biases, const int64_t* stride, int64_t strides, const int64_t* padding,
    int64_t paddings, const int64_t* dilation, int64_t dilations, int32_t transposed,
    const int64_t* more, int64_t mores, int64_t groups, const int32_t* mask, int64_t masks,
    AtenTensorHandle* dx, AtenTensorHandle* dweight, AtenTensorHandle* dbias) {
  host::answer("convolution_backward");
  return aoti_torch_cpu_convolution_backward(dy, x, weight, bias, biases, stride, strides, padding,
                                             paddings, dilation, dilations, transposed, more, mores,
                                             groups, mask, masks, dx, dweight, dbias);
}

// --- ... and the part that answers otherwise here (the linker's --wrap)

AOTITorchError __real_aoti_torch_get_device_type(AtenTensorHandle, int32_t*);
AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  if (host::device_of(tensor) == host::kCpu) return __real_aoti_torch_get_device_type(tensor, type);
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = host::device_of(tensor);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = (DeviceGuardHandle)(intptr_t)(state.current + 1);
  if (index < 0 || index >= (int)state.devices.size()) return AOTI_TORCH_FAILURE;
  if (!host::planted("no guard")) state.current = index;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  state.current = (int)(intptr_t)guard - 1;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t,
                                               int32_t, int32_t, AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dim, const int64_t* size,
                                               const int64_t* stride, int32_t dtype, int32_t type,
                                               int32_t index, AtenTensorHandle* result) {
  host::answer("allocate");
  if (type != aoti_torch_device_type_cuda() || index != state.of_tensors)
    host::violation("an allocation is not on the tensors' device");
  const int32_t cpu = aoti_torch_device_type_cpu();
  static char fake[16];
  if (state.fakes)
    return aoti_torch_create_tensor_from_blob(fake, dim, size, stride, 0, dtype, cpu, -1, result);
  const AOTITorchError error =
      __real_aoti_torch_empty_strided(dim, size, stride, dtype, cpu, -1, result);
  if (error != AOTI_TORCH_SUCCESS) return error;
  int64_t bytes;
  void* data;
  aoti_torch_get_storage_size(*result, &bytes), aoti_torch_get_data_ptr(*result, &data);
  if (bytes) memset(data, 0xff, bytes);  // NaN, to floating-point types
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (error == AOTI_TORCH_SUCCESS) host::use(tensor, *data, true);
  return error;
}
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (error == AOTI_TORCH_SUCCESS) host::use(tensor, *data, false);
  return error;
}

void __ubsan_handle_add_overflow(host::Place* at, uintptr_t, uintptr_t) { host::overflow(at); }
void __ubsan_handle_sub_overflow(host::Place* at, uintptr_t, uintptr_t) { host::overflow(at); }
void __ubsan_handle_mul_overflow(host::Place* at, uintptr_t, uintptr_t) { host::overflow(at); }
void __ubsan_handle_divrem_overflow(host::Place* at, uintptr_t, uintptr_t) { host::overflow(at); }
void __ubsan_handle_negate_overflow(host::Place* at, uintptr_t) { host::overflow(at); }

// --- the tests' side

int host_add_device(int multiprocessors, int block_bytes, int multiprocessor_bytes, int ptx,
                    bool clusters) {
  state.devices.push_back({multiprocessors, block_bytes, multiprocessor_bytes, ptx, clusters});
  return (int)state.devices.size() - 1;
}

void host_begin() {
  for (const AtenTensorHandle tensor : state.kept) aoti_torch_delete_tensor_object(tensor);
  state.kept.clear();
  state.report.clear();
  state.last_error = cudaSuccess;
  emulator::machine.regions.clear();
  emulator::machine.counts.clear();
  emulator::machine.last_region = 0;
}

// Lines: "launch ...", "call ...", "violation ...".
const char* host_report() {
  if (state.last_error != cudaSuccess) host::violation("an error was left to the next caller");
  return state.report.c_str();
}

void host_use(int current, int of_tensors, uintptr_t stream) {
  state.current = current, state.of_tensors = of_tensors;
  state.devices.at(of_tensors).stream = (cudaStream_t)stream;
}
void host_set(bool runs, bool fakes, int most_together) {
  state.runs = runs, state.fakes = fakes, state.most_together = most_together;
}
void host_refuse(const char* function, int error) { state.refused[function] = error; }
void host_place(const void* data, int device) { state.elsewhere[data] = device; }
void host_plant(const char* fault) { state.planted.insert(fault); }
void host_clear() {  // of what the last three did
  state.refused.clear(), state.elsewhere.clear(), state.planted.clear();
}

}  // extern "C"

namespace host {

// A tensor of any size without memory.
torch::stable::Tensor fake(const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                           torch::headeronly::ScalarType dtype) {
  static char memory[16];
  AtenTensorHandle result;
  aoti_torch_create_tensor_from_blob(memory, size.size(), size.data(), stride.data(), 0,
                                     (int32_t)dtype, aoti_torch_device_type_cpu(), -1, &result);
  return torch::stable::Tensor(result);
}

std::vector<torch::stable::Tensor> reapply(const torch::stable::Tensor& x,
                                           const torch::stable::Tensor& stats) {
  const auto [y, mask] = fused_res::bn_act_reapply_cuda(x, stats);
  return {y, mask};
}

}  // namespace host

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) {
  m.impl("fake", TORCH_BOX(&host::fake));
  m.impl("reapply", TORCH_BOX(&host::reapply));
}
