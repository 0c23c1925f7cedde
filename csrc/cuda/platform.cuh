// All uses of the device by the CUDA kernels, in one place. Compiled by a host compiler with
// FUSED_RES_EMULATION, the same names come from tests/cuda_emulation/emulator.h; with
// FUSED_RES_EMULATED_RUNTIME too, the launches are those below, on the CUDA runtime of
// tests/cuda_emulation/host.
#pragma once
#include <stdint.h>

#include "../elements.h"

#ifdef FUSED_RES_EMULATION
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#if !defined FUSED_RES_EMULATION || defined FUSED_RES_EMULATED_RUNTIME
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

namespace fused_res::cuda {

using Stream = cudaStream_t;

// The name is for the emulation's messages and counts. Errors are the caller's to look at.
template <class... Parameters, class... Arguments>
inline void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads,
                   Stream stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = threads, config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Lets a kernel have as much dynamic shared memory as the current device gives a block, once for
// all launches: a limit set for each would be another thread's too.
inline bool allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device, most;
  cudaFuncAttributes attributes;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return true;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess ||
      cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           most - (int)attributes.sharedSizeBytes) != cudaSuccess)
    return false;
  allowed.insert({kernel, device});
  return true;
}

// With shared memory that is given at the launch, of any size that the device has; blocks in
// clusters where these are of more than one. Errors are the caller's to look at.
template <class... Parameters>
inline void launch_clusters(const char*, void (*kernel)(Parameters...), unsigned blocks,
                            int cluster, int threads, int shared_bytes, Stream stream,
                            Parameters... arguments) {
  if (!allow_shared_memory((const void*)kernel)) return;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {(unsigned)cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// All blocks on the device at once. False: they do not fit (in a part of a device, say, or beside
// what a tool adds to a kernel), or the device has no such launches; nothing was launched.
template <class... Parameters>
inline bool launch_together(const char*, void (*kernel)(Parameters...), unsigned blocks,
                            int threads, int shared_bytes, Stream stream, Parameters... arguments) {
  void* pointers[] = {&arguments...};
  if (allow_shared_memory((const void*)kernel) &&
      cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), pointers, shared_bytes,
                                  stream) == cudaSuccess)
    return true;
  cudaGetLastError();  // forgotten: the caller goes on without
  return false;
}

}  // namespace fused_res::cuda
#endif

#ifndef FUSED_RES_EMULATION
namespace fused_res::cuda {

// An array of a block's shared memory; and the one whose size a cooperative launch sets.
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]

// Every block of a cooperative launch gets here, and sees what the others wrote before.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// Every access to global memory goes through these two.
template <class V>
__device__ __forceinline__ V load(const V* p) {
  return *p;
}
template <class V>
__device__ __forceinline__ void store(V* p, V value) {
  *p = value;
}
// nvcc splits a plain store of 16 bytes made of narrower values
__device__ __forceinline__ void store(uint4* p, uint4 value) { __stwb(p, value); }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) {
  return __uint_as_float((uint32_t)v.bits << 16);
}
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(__ushort_as_half(v.bits)); }

__device__ __forceinline__ void from_float(float v, float& out) { out = v; }
__device__ __forceinline__ void from_float(float v, bf16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ __forceinline__ void from_float(float v, fp16& out) {
  out.bits = __half_as_ushort(__float2half_rn(v));
}

}  // namespace fused_res::cuda
#endif

namespace fused_res::cuda {
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rounded: the compiler may make no multiply-add of it, nor change the order of several.
__device__ __forceinline__ float plus(float a, float b) {
#ifdef FUSED_RES_EMULATION
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}
}  // namespace fused_res::cuda

// Faults that tests/*/test_cuda_emulated.py plant, to show that their checks catch them.
namespace fused_res::cuda {
#ifdef PLANT_MISSING_SYNC
#define SYNC_BEFORE_REDUCTION()
#else
#define SYNC_BEFORE_REDUCTION() __syncthreads()
#endif
#ifdef PLANT_MISSING_GRID_BARRIER
#define BARRIER_BEFORE_MERGE() __syncthreads()
#else
#define BARRIER_BEFORE_MERGE() grid_barrier()
#endif
#ifdef PLANT_WRONG_MASK_BIT
constexpr int kPlantedBit = 1;
#else
constexpr int kPlantedBit = 0;
#endif
#ifdef PLANT_STORE_OUT_OF_BOUNDS
constexpr int kPlantedStore = 1;
#else
constexpr int kPlantedStore = 0;
#endif
#ifdef PLANT_LOAD_OUT_OF_BOUNDS
constexpr int kPlantedLoad = 1;
#else
constexpr int kPlantedLoad = 0;
#endif
#ifdef PLANT_MISSING_CHUNK_SYNC
#define SYNC_BEFORE_CHUNK()
#else
#define SYNC_BEFORE_CHUNK() __syncthreads()
#endif
#ifdef PLANT_MISSING_WAIT
#define WAIT_FOR_CHUNK(behind)
#else
#define WAIT_FOR_CHUNK(behind) wait_copies<behind>()
#endif
#ifdef PLANT_MISSING_WARP_SYNC
#define SYNC_LANES()
#else
#define SYNC_LANES() __syncwarp()
#endif
#ifdef PLANT_MISSING_CLUSTER_BARRIER
#define BARRIER_OF_CLUSTER() __syncthreads()
#else
#define BARRIER_OF_CLUSTER() cluster_barrier()
#endif
#ifdef PLANT_WRONG_TAP
constexpr int kPlantedTap = 1;
#else
constexpr int kPlantedTap = 0;
#endif
#ifdef PLANT_WRONG_FRAGMENT
constexpr int kPlantedFragment = 1;
#else
constexpr int kPlantedFragment = 0;
#endif
#ifdef PLANT_EVEN_PITCH
constexpr int kPlantedPitch = 16;
#else
constexpr int kPlantedPitch = 0;
#endif
}  // namespace fused_res::cuda
