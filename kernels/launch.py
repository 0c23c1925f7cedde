"""How every Triton kernel here is launched."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

WARP = 64 if torch.version.hip else 32


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
# Whether a CUDA graph may be captured; without CUDA it cannot be asked.
GRAPHS = torch.backends.cuda.is_built() and not INTERPRETED


VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Of these ptxas spills registers to fit one more program on a multiprocessor, as Triton 3.6 makes
# them, unless it is told how many registers there are.
SPILLED = ("_bn_act_fwd_small_kernel", "_bn_act_bwd_small_kernel", "_bn_act_bwd_sums_kernel")


def options(kernel: str, warps: int, threads_of_warp: int, stages: int | None = None) -> dict:
    """Triton's options for a kernel of this name with ``warps`` of 32 threads: AMD's CDNA has warps
    of 64. ``stages``: of its pipelined loop; None: Triton's default."""
    # enable_fp_fusion is given because its default changes with Triton 3.10
    found = {"num_warps": max(1, warps * 32 // threads_of_warp), "enable_fp_fusion": True}
    if stages is not None:
        found["num_stages"] = stages
    if kernel in SPILLED and threads_of_warp == 32 and VERSION < (3, 9):
        found["maxnreg"] = 255
    return found


def run(kernel, grid: tuple[int, ...], warps: int, stages: int | None = None, **arguments) -> None:
    """Launches a kernel with arguments and constants by name.

    Args:
        stages: of the pipelined loop; None: Triton's default.

    Raises:
        RuntimeError: a CUDA graph is captured, and the kernel is not compiled yet. Loading it may
            wait for the device, which ends the capture.
    """
    given = options(kernel.fn.__name__, warps, WARP, stages)
    launch = partial(kernel[grid], **arguments, **given)
    if not (GRAPHS and torch.cuda.is_current_stream_capturing()):
        launch()
        return
    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, _refuse
    try:
        launch()
    finally:
        knobs.jit_cache_hook = before


def _refuse(*, fn, **_) -> None:
    """Triton calls it before it compiles a kernel."""
    raise RuntimeError(
        f"the Triton kernel {fn.name} would be compiled while a CUDA graph is captured: run the "
        f"same step or call a few times before the capture"
    )


def on_device(x: Tensor):
    """Makes x's device the current one: Triton launches there."""
    return torch.accelerator.device_index(x.device.index if x.device.type != "cpu" else None)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
