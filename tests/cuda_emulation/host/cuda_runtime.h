// The part of the CUDA runtime that csrc/cuda's host code uses, on devices that do not exist.
// Kernels run in the emulator. What is not here, such as a synchronisation or an allocation, does
// not compile. As the real runtime does, it refuses what a device has not: see launch in shim.cpp.
#pragma once
#include "../../../csrc/elements.h"
// after it
#include "../emulator.h"

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct EmulatedStream;
using cudaStream_t = EmulatedStream*;

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

namespace host {

constexpr size_t kMostParameters = 4096;  // bytes, of a launch

// Bytes that the parameters of a kernel take, each aligned.
template <class... Parameters>
constexpr size_t bytes_of() {
  size_t end = 0;
  ((end = (end + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) +
          sizeof(Parameters)),
   ...);
  return end;
}

cudaError_t attributes_of(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t clusters_of(int* clusters, const void* kernel, const cudaLaunchConfig_t& config);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, bool cooperative,
                   const std::function<void()>& body);

}  // namespace host

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return host::attributes_of(attributes, (const void*)kernel);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  return host::attributes_of(attributes, kernel);
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  return host::clusters_of(clusters, (const void*)kernel, *config);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert(host::bytes_of<Parameters...>() <= host::kMostParameters);
  return host::launch((const void*)kernel, *config, false, [&] { kernel(arguments...); });
}

template <class... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                        void** arguments, size_t shared, cudaStream_t stream) {
  static_assert(host::bytes_of<Parameters...>() <= host::kMostParameters);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared, config.stream = stream;
  return host::launch((const void*)kernel, config, true, [&] {
    [&]<size_t... i>(std::index_sequence<i...>) {
      kernel(*(Parameters*)arguments[i]...);
    }(std::index_sequence_for<Parameters...>{});
  });
}
