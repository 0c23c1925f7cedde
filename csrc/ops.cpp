// Every op of the CPU library, one line each. Schemas live beside their meaning in fused_res/ops/.
#include "cpu/bn_act.h"
#include "cpu/isa.h"
#include "cpu/res_block.h"

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  m.impl("bn_act_fwd", TORCH_BOX(&fused_res::bn_act_fwd_cpu));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_res::bn_act_bwd_cpu));
  m.impl("res_block_fwd", TORCH_BOX(&fused_res::res_block_fwd<fused_res::CpuLibrary>));
  m.impl("res_block_bwd", TORCH_BOX(&fused_res::res_block_bwd<fused_res::CpuLibrary>));
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fused_res::cpu_isa));
}
