"""What ``auto`` will run on a device, in a sentence."""

from __future__ import annotations

import torch

from ..env import settings
from . import backends, first_use, shipped_timings, user_timings


def outlook(device: torch.device, dtype: torch.dtype) -> str:
    """What will run for fused blocks on a device, in a dtype, on the backend that is named."""
    words = str(dtype).removeprefix("torch.")
    name = backends.named()
    if name != "auto":
        by = "FUSED_RES_BACKEND" if name == settings.backend else "fused_res.backend"
        runs = "nothing runs fused" if name == "eager" else "it runs all blocks that it can"
        return f"{by}={name}: {runs}"
    if backends.never_fused(device.type, dtype):
        return f"{words} on {device.type}: PyTorch's ops run"
    if not first_use.covers(device):
        return f"on {device.type} in {words} fused kernels run"
    ops = {row.op for row in user_timings.table(device).rows.values()}
    known = "block_train" in ops or shipped_timings.knows(device, "block_train")
    if first_use.may_measure(device):
        if known:
            return f"on {device.type} timings say which kernels run; other sizes are measured first"
        return f"on {device.type} the first training steps measure which kernels to use"
    if known:
        return f"on {device.type} timings say which kernels run; PyTorch's ops for other sizes"
    return f"on {device.type} PyTorch's ops run: nothing was measured there, or will be"
