"""How every Triton kernel here is launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

WARP = 64 if torch.version.hip else 32


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)


def options(warps: int, threads_of_warp: int) -> dict:
    """Triton's options for ``warps`` of 32 threads: AMD's CDNA has warps of 64."""
    # enable_fp_fusion is given because its default changes with Triton 3.10
    return {"num_warps": max(1, warps * 32 // threads_of_warp), "enable_fp_fusion": True}


def run(kernel, grid: tuple[int, ...], warps: int, stages: int | None = None, **arguments) -> None:
    """Launches a kernel with arguments and constants by name.

    Args:
        stages: of the pipelined loop; None: Triton's default.
    """
    pipeline = {} if stages is None else {"num_stages": stages}
    kernel[grid](**arguments, **options(warps, WARP), **pipeline)


def on_device(x: Tensor):
    """Makes x's device the current one: Triton launches there."""
    return torch.accelerator.device_index(x.device.index if x.device.type != "cpu" else None)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
