// Every op of the CPU library, one line each. Schemas live beside their meaning in fused_res/ops/.
#include "cpu/bn_act.h"
#include "cpu/convolutions.h"
#include "cpu/direct.h"
#include "cpu/fingerprint.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/res_block.h"
#include "cpu/res_chain.h"
#include "cpu/winograd.h"

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  m.impl("bn_act_fwd", TORCH_BOX(&fused_res::bn_act_fwd<fused_res::bn_act_fwd_cpu>));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_res::bn_act_bwd<fused_res::bn_act_bwd_cpu>));
  m.impl("bn_act_statistics", TORCH_BOX(&fused_res::bn_act_statistics_cpu));
  m.impl("res_block_fwd", TORCH_BOX(&fused_res::res_block_fwd<fused_res::CpuBackend>));
  m.impl("res_block_bwd", TORCH_BOX(&fused_res::res_block_bwd<fused_res::CpuBackend>));
  m.impl("packed_chain", TORCH_BOX(&fused_res::packed_chain_cpu));
  m.impl("res_chain", TORCH_BOX(&fused_res::res_chain_cpu));
  m.impl("convolutions", TORCH_BOX(&fused_res::convolutions_cpu));
  m.impl("direct_weight", TORCH_BOX(&fused_res::direct_weight_cpu));
  m.impl("fingerprint", TORCH_BOX(&fused_res::fingerprint_cpu));
  m.impl("winograd_weight", TORCH_BOX(&fused_res::winograd_weight_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fused_res::cpu_isa));
  m.impl("empty_cache", TORCH_BOX(&fused_res::pool_release));
  m.impl("training_convolutions", TORCH_BOX(&fused_res::training_convolutions));
  m.impl("training_winograd", TORCH_BOX(&fused_res::training_winograd));
}
