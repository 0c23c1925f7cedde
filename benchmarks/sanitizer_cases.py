"""bn_act's own kernels on a few small shapes, for compute-sanitizer to watch (`make gpu`)."""

import torch

from fused_res.ops.bn_act import bn_act

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# odd sizes, more channels than threads, several blocks to a channel
SHAPES = (5, 13, 9, 7), (2, 1030, 6, 5), (64, 32, 8, 8)


def step(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Training forward and backward, with and without a residual, and eval."""
    x, residual = (
        torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    weight, bias, mean = (torch.zeros(shape[1], device=DEVICE) for _ in range(3))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    for r in (None, residual):
        wrt = leaves if r is not None else [x, weight, bias]
        y = bn_act(x, mean, mean + 1, weight, bias, True, residual=r, backend=DEVICE)
        torch.autograd.grad(y, wrt, torch.ones_like(y))
    with torch.no_grad():
        bn_act(x, mean, mean + 1, weight, bias, residual=residual, backend=DEVICE)


if __name__ == "__main__":
    count = 0
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                step(shape, dtype, layout)
                count += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases ran on {DEVICE}")
