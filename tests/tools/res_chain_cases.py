"""Chains of residual blocks, for the tests of every implementation of the op res_chain."""

import torch

from fused_res import reference
from fused_res.ops.res_chain import Link
from fused_res.reference import ConvNorm, Norm


def stage(c, k, size, bias=False, norm=True):
    weight = torch.randn(k, c, size, size) * (2 / (c * size**2)) ** 0.5
    stats = torch.randn(k) * 0.1, torch.rand(k) + 0.5, torch.rand(k) * 0.4 + 0.1, torch.randn(k)
    return ConvNorm(
        weight.contiguous(memory_format=torch.channels_last),
        torch.randn(k) if bias or not norm else None,
        (1, 1),
        (size // 2, size // 2),
        (1, 1),
        1,
        Norm(*stats, False) if norm else None,
    )


KINDS = {
    "single": lambda c: [stage(c, c, 3)],
    "basic": lambda c: [stage(c, c, 3), stage(c, c, 3, bias=True)],
    "bottleneck": lambda c: [stage(c, 48, 1), stage(48, 16, 3), stage(16, c, 1)],
    "no norm": lambda c: [stage(c, c, 3, norm=False)],
}


def blocks_of(kind, channels, count, act="relu"):
    return [Link(KINDS[kind](channels), act) for _ in range(count)]


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def by_blocks(x, blocks):
    """In PyTorch's ops."""
    for block in blocks:
        z = x
        for conv in block.convs[:-1]:
            z = reference.conv_bn_act(z, conv)
        x = reference.conv_bn_act(z, block.convs[-1], x, act=block.act)
    return x


def double(blocks):
    def of(t):
        return None if t is None else t.double()

    def convolution(c):
        norm = c.norm and c.norm._replace(
            running_mean=of(c.norm.running_mean),
            running_var=of(c.norm.running_var),
            weight=of(c.norm.weight),
            bias=of(c.norm.bias),
        )
        return c._replace(weight=of(c.weight), bias=of(c.bias), norm=norm)

    return [Link([convolution(c) for c in b.convs], b.act) for b in blocks]
