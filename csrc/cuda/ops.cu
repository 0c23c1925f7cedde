// Every op of the CUDA library, one line each. Schemas live beside their meaning in fused_res/ops/.
#include <cuda_runtime.h>

#include <string>

#include "bn_act.h"
#include "conv_halo.h"
#include "res_block.h"
#include "res_chain.h"

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) {
  m.impl("bn_act_fwd", TORCH_BOX(&fused_res::bn_act_fwd<fused_res::bn_act_fwd_cuda>));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_res::bn_act_bwd<fused_res::bn_act_bwd_cuda>));
  m.impl("bn_act_statistics", TORCH_BOX(&fused_res::bn_act_statistics_cuda));
  m.impl("res_block_fwd", TORCH_BOX(&fused_res::res_block_fwd<fused_res::CudaBackend>));
  m.impl("res_block_bwd", TORCH_BOX(&fused_res::res_block_bwd<fused_res::CudaBackend>));
  m.impl("res_chain_params", TORCH_BOX(&fused_res::res_chain_params_cuda));
  m.impl("conv_halo", TORCH_BOX(&fused_res::conv_halo_cuda));
  m.impl("conv_halo_statistics", TORCH_BOX(&fused_res::conv_halo_statistics_cuda));
  m.impl("conv_halo_gradient", TORCH_BOX(&fused_res::conv_halo_gradient_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&fused_res::cuda_plan));
  m.impl("res_chain_fits", TORCH_BOX(&fused_res::res_chain_fits));
  m.impl("conv_halo_fits", TORCH_BOX(&fused_res::conv_halo_fits));
}

#define FUSED_RES_TEXT_OF(x) #x
#define FUSED_RES_TEXT(x) FUSED_RES_TEXT_OF(x)

// What the library needs and what is here, for fused_res/dispatch/cuda_library.py. These calls make
// no CUDA context. A call that fails leaves 0, or no devices.
extern "C" __attribute__((visibility("default"))) const char* fused_res_cuda_facts() {
  static const std::string facts = [] {
    int driver = 0, runtime = 0, count = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::string devices;
    for (int i = 0; i < count; ++i) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      devices += (i ? "," : "") + std::to_string(major) + "." + std::to_string(minor);
    }
    cudaGetLastError();  // PyTorch must not find it
    return "runtime=" + std::to_string(runtime) + " driver=" + std::to_string(driver) +
           " code=" FUSED_RES_TEXT(FUSED_RES_ARCHITECTURES) " devices=" + devices;
  }();
  return facts.c_str();
}
