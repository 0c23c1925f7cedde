// csrc/cuda's conv_halo on CPU pointers, for tests/conv_halo/test_cuda_emulated.py.
#define FUSED_RES_EMULATION
#include "../../csrc/cuda/conv_halo_kernels.cuh"

#include "emulated.h"

using namespace fused_res::cuda;

extern "C" {

int64_t size_of_call() { return sizeof(HaloCall); }

// blocks, or -1 where it does not fit; then stages, rows, bytes of shared memory, images, rows and
// columns of a tile, how many there are, and pixels of a patch
int64_t halo_plan(int kind, int epilogue, const HaloConv* conv, bool residual,
                  const HaloDevice* device, int64_t* out) {
  const HaloPlan plan = plan_halo((Kind)kind, *conv, (Epilogue)epilogue, residual, *device);
  const HaloArgs& a = plan.args;
  out[0] = a.stages, out[1] = plan.rows, out[2] = plan.shared_bytes, out[3] = a.group;
  out[4] = a.tile_height, out[5] = a.tile_width, out[6] = a.count, out[7] = a.patch_pixels;
  return plan.fits ? plan.blocks : -1;
}

const char* halo(int kind, int epilogue, const HaloConv* conv, const HaloDevice* device,
                 const HaloCall* call, uint64_t seed) {
  return run(seed, [&] {
    const bool residual = call->residual != nullptr;
    const HaloPlan plan = plan_halo((Kind)kind, *conv, (Epilogue)epilogue, residual, *device);
    conv_halo((Kind)kind, (Epilogue)epilogue, plan, *call, Stream{});
  });
}

}  // extern "C"
