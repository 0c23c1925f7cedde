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

// What the library needs and the driver that is here, for fused_res/dispatch/cuda_library.py. These
// calls do not initialise CUDA: after that a fork of the process could not use it. Where one fails
// the version is 0.
extern "C" __attribute__((visibility("default"))) const char* fused_res_cuda_facts() {
  static const std::string facts = [] {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaGetLastError();  // PyTorch must not find it
    return "runtime=" + std::to_string(runtime) + " driver=" + std::to_string(driver) +
           " code=" FUSED_RES_TEXT(FUSED_RES_ARCHITECTURES);
  }();
  return facts.c_str();
}
