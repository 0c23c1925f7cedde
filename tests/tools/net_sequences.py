"""Nets of the benchmarks as sequences of layers and blocks."""

from __future__ import annotations

from torch import nn

from fused_res.models import NetResDeep, ResNet


def sequence(net: nn.Module) -> nn.Sequential:
    """The net as one row of its children, in the order in which its forward calls them."""
    if isinstance(net, ResNet):
        layers = (block for i in range(net.depth) for block in getattr(net, f"layer{i + 1}"))
        stem = net.conv1, net.bn1, nn.ReLU(), net.maxpool
        return nn.Sequential(*stem, *layers, net.avgpool, nn.Flatten(), net.fc)
    if isinstance(net, NetResDeep):
        stem = net.conv1, nn.ReLU(), nn.MaxPool2d(2)
        head = nn.MaxPool2d(2), nn.Flatten(), net.fc1, nn.ReLU(), net.fc2
        return nn.Sequential(*stem, *net.resblocks, *head)
    return net
