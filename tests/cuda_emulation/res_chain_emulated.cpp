// csrc/cuda's res_chain on CPU pointers, for tests/res_chain/test_cuda_emulated.py.
#define FUSED_RES_EMULATION
#include "../../csrc/cuda/res_chain_kernels.cuh"

#include "emulated.h"

using namespace fused_res::cuda;

extern "C" {

int64_t size_of_conv() { return sizeof(Conv); }

// workspace's bytes, or -1 where the chain does not fit; then images of a group, blocks of a
// cluster, rows, bytes of shared memory, of packed weights
int64_t plan_of(int kind, const ChainShape* shape, const Conv* convs, int count,
                const ChainDevice* device, int64_t* out) {
  const ChainPlan plan = plan_chain((Kind)kind, *shape, {convs, convs + count}, *device);
  out[0] = plan.args.group, out[1] = plan.args.cluster, out[2] = plan.rows;
  out[3] = plan.shared_bytes, out[4] = plan.packed_bytes;
  return plan.fits ? workspace_bytes(plan) : -1;
}

const char* chain(int kind, const ChainShape* shape, const Conv* convs, int count,
                  const ChainDevice* device, const void* x, void* y, void* workspace,
                  uint64_t seed) {
  return run(seed, [&] {
    const ChainPlan plan = plan_chain((Kind)kind, *shape, {convs, convs + count}, *device);
    res_chain((Kind)kind, plan, x, y, workspace, Stream{});
  });
}

}  // extern "C"
