"""The least that a net, block or call costs in eval mode where each convolution is one kernel.

BatchNorm, residual add and ReLU happen inside it, a projection is summed up in the convolution that
it is added to, and every tensor crosses memory once in each kernel that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Kernel:
    flops: int
    bytes: int


def kernels(module: nn.Module, shape: tuple[int, ...], item: int) -> tuple[Kernel, ...]:
    """In the order in which they run, as hooks see them that run on tensors without data. A chain
    of blocks is one, which reads its weights and x once and writes y.

    Args:
        module: on the meta device.
        shape: of x.
        item: bytes of an element.
    """
    module, x = module.eval(), torch.empty(shape, device="meta")
    found: list[Kernel] = []

    def product(part: nn.Conv2d | nn.Linear, args: tuple, y: torch.Tensor) -> None:
        (x,) = args
        read, each = x.numel(), part.weight[0].numel()
        if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1):
            # a strided 1x1 reads only the pixels it keeps
            read = read * y[0, 0].numel() // x[0, 0].numel()
        moved = read + part.weight.numel() + y.numel()
        found.append(Kernel(2 * y.numel() * each, item * moved))

    def pooling(part: nn.Module, args: tuple, y: torch.Tensor) -> None:
        found.append(Kernel(0, item * (args[0].numel() + y.numel())))

    def block(part: nn.Module, args: tuple, y: torch.Tensor) -> None:
        out = item * y.numel()
        if part.downsample is None:  # the last convolution reads x
            found[-1] = Kernel(found[-1].flops, found[-1].bytes + out)
            return
        shortcut, last = found.pop(), found.pop()
        flops = last.flops + shortcut.flops
        found.append(Kernel(flops, last.bytes + shortcut.bytes - out))

    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_hook(product)
        elif isinstance(part, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            part.register_forward_hook(pooling)
        elif hasattr(part, "downsample"):
            part.register_forward_hook(block)
    with torch.no_grad():
        module(x)
    if all(hasattr(part, "downsample") for part in module.children()) and found:
        convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        weights = sum(conv.weight.numel() for conv in convs)
        return (Kernel(sum(k.flops for k in found), item * (weights + 2 * x.numel())),)
    return tuple(found)


def flops(kernels: Iterable[Kernel]) -> int:
    return sum(kernel.flops for kernel in kernels)


def bound_ms(kernels: Iterable[Kernel], tflops: float, gbps: float) -> float:
    """Milliseconds of the kernels, each as long as the slower of its arithmetic and its bytes."""
    return sum(max(k.flops / tflops / 1e9, k.bytes / gbps / 1e6) for k in kernels)
