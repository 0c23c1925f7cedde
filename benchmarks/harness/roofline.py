"""The least that a net, block or call costs in eval mode where each convolution is one kernel.

BatchNorm, residual add and ReLU happen inside it, a projection is summed up in the convolution that
it is added to, and every tensor crosses memory once in each kernel that reads or writes it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from nets import NETS
from torch import nn
from workloads import Workload

from fused_res import reference


@dataclass(frozen=True)
class Kernel:
    flops: int
    bytes: int


def module_of(workload: Workload) -> nn.Module:
    """The workload's net or block, in plain PyTorch, with parameters of its own."""
    if workload.net:
        return NETS[workload.net].make()
    args, kwargs = workload.block_arguments()
    return reference.ResBlock(*args, **kwargs)


def _one(workload: Workload) -> Kernel:
    conv, (n, c, h, w) = workload.conv, workload.shape
    k, pixels = conv.out_channels, n * -(-h // conv.stride) * -(-w // conv.stride)
    weights, read = k * c * conv.size**2, n * c * h * w
    if conv.size == 1:
        read = pixels * c
    if conv.residual == "add":
        read += pixels * k
    elif conv.residual == "shortcut":
        weights += k * conv.shortcut_channels
        read += pixels * conv.shortcut_channels
    return Kernel(2 * pixels * weights, workload.dtype.itemsize * (read + weights + pixels * k))


@functools.cache
def kernels(workload: Workload) -> tuple[Kernel, ...]:
    """In the order in which they run, as hooks see them that run on tensors without data. A chain
    of blocks is one, which reads its weights and x once and writes y."""
    if workload.conv:
        return (_one(workload),)
    with torch.device("meta"):
        module = module_of(workload).eval()
        x = torch.empty(workload.shape)
    item = workload.dtype.itemsize
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


def flops(workload: Workload) -> int:
    return sum(kernel.flops for kernel in kernels(workload))


def moved_bytes(workload: Workload) -> int:
    return sum(kernel.bytes for kernel in kernels(workload))


def bound_ms(workload: Workload, tflops: float, gbps: float) -> float:
    """Milliseconds of the kernels, each as long as the slower of its arithmetic and its bytes."""
    return sum(max(k.flops / tflops / 1e9, k.bytes / gbps / 1e6) for k in kernels(workload))
