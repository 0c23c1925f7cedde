"""The fused ops, one file each: schema, fake, autograd Function, public function."""

import torch

library = torch.library.Library("fused_res", "DEF")
library.define("cpu_isa(int level) -> int")
library.define("empty_cache() -> int")
library.define("cuda_plan(int plan) -> int")
library.define("training_winograd(int limit) -> int")
