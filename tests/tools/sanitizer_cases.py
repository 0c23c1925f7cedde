"""Our own kernels on a few small shapes, for compute-sanitizer to watch (`make gpu`)."""

import os

# every tensor an allocation of its own, or an access past its end would meet the next one
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from fused_res import Norm
from fused_res.ops.bn_act import bn_act
from fused_res.ops.res_chain import Link, res_chain
from fused_res.reference import ConvNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# odd sizes, more channels than threads, several blocks to a channel
SHAPES = (5, 13, 9, 7), (2, 1030, 6, 5), (64, 32, 8, 8)
PLANS = (1, 2, 3) if DEVICE == "cuda" else (None,)  # whole, cooperative, split


def step(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Training forward and backward, with and without a residual and its norm, and eval."""
    x, residual = (
        torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    weight, bias, mean = (torch.zeros(shape[1], device=DEVICE) for _ in range(3))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    second = Norm(mean + 0, mean + 1, weight, bias, True)
    for r, norm in ((None, None), (residual, None), (residual, second)):
        wrt = leaves if r is not None else [x, weight, bias]
        y = bn_act(x, mean, mean + 1, weight, bias, True, residual=r, residual_norm=norm,
                   backend=DEVICE)  # fmt: skip
        torch.autograd.grad(y, wrt, torch.ones_like(y))
    with torch.no_grad():
        bn_act(x, mean, mean + 1, weight, bias, residual=residual, backend=DEVICE)


def chain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Two blocks, of one and of two convolutions, for inference."""
    channels = shape[1]

    def stage(c: int, k: int) -> ConvNorm:
        weight = torch.randn((k, c, 3, 3), device=DEVICE).to(dtype)
        norm = Norm(*torch.rand((4, k), device=DEVICE).unbind(), False)
        return ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, norm)

    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    blocks = [Link([stage(channels, channels)]), Link([stage(channels, 40), stage(40, channels)])]
    with torch.no_grad():
        res_chain(x, blocks, DEVICE)


def convolution(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """conv_halo with each of its ends."""
    n, c, h, w = shape

    def of(*size: int) -> torch.Tensor:
        t = torch.randn(size, device=DEVICE).to(dtype)
        return t.contiguous(memory_format=torch.channels_last)

    x, residual, weight, ops = of(*shape), of(n, 24, h, w), of(24, c, 3, 3), torch.ops.fused_res
    channels = torch.rand((4, 24), device=DEVICE).unbind()
    ops.conv_halo(x, weight, None, *channels, 1e-5, residual, 1, True)
    y, _ = ops.conv_halo_statistics(x, weight, None, True)
    ops.conv_halo_gradient(y, weight, x, torch.rand((5, c), device=DEVICE), True)


if __name__ == "__main__":
    count = 0
    for shape in (3, 13, 9, 7), (1, 32, 16, 16), (300, 16, 7, 5):
        for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
            chain(shape, dtype)
            count += 1
            if DEVICE == "cuda":
                convolution(shape, dtype)
                count += 1
    for plan in PLANS:
        if plan is not None:
            torch.ops.fused_res.cuda_plan(plan)
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for layout in (torch.contiguous_format, torch.channels_last):
                    step(shape, dtype, layout)
                    count += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases ran on {DEVICE}")
