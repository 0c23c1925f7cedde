"""Calls of bn_act on Triton with everything left out that may be left out."""

from __future__ import annotations

import torch
from kernels_report import SHAPES, Configuration, empty, recording

from fused_res.kernels import bn_act_bwd, bn_act_fwd
from fused_res.reference import Norm


def record_bare() -> list[Configuration]:
    """What they would launch; each is a compilation of its own."""
    found = []
    for shape in SHAPES["channels_last"]:
        x = empty(torch.bfloat16, *shape)
        w = torch.empty(shape[1], device="meta")
        for training in (True, False):
            running = (None, None) if training else (w, w)
            norm = Norm(*running, None, None, training)
            with recording("bf16", "channels_last", "none") as launched:
                call = bn_act_fwd.Call(x, norm, act=0, save_mask=False)
                _, mask, stats = bn_act_fwd.forward(call)
                of_norm = bn_act_bwd.NormCall(None, training)
                for need_x in (True, False):
                    wanted = bn_act_bwd.Wanted(need_x, False, not need_x)
                    call = bn_act_bwd.Call(x, x, of_norm, stats, mask, act=0, wanted=wanted)
                    bn_act_bwd.backward(call)
            found += launched
    return list(dict.fromkeys(found))
