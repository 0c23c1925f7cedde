"""A candidate in eval mode: BatchNorm folded into the weights, cuDNN's convolution + add + ReLU.

It is what PyTorch offers who builds a net for inference by hand: ``fuse_conv_bn_weights`` and
``torch.cudnn_convolution_add_relu``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from fused_res.fuse.match import plan_of
from fused_res.fuse.modules import child


class FoldedConv(nn.Module):
    """A convolution with its BatchNorm folded in, then + z and a ReLU, in one call on a GPU.

    The same in PyTorch's ops on a CPU, where cuDNN is not, and for a net's first convolution: the
    fused engines want channels in eights.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        dtype: torch.dtype,
        relu: bool = True,
    ) -> None:
        super().__init__()
        weight, bias = conv.weight, conv.bias
        if bn is not None:
            weight, bias = fuse_conv_bn_weights(
                weight.float(), bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.relu = relu
        self.fusable = relu and not (weight.size(0) % 8 or weight.size(1) % 8)
        # the order of F.conv2d's last arguments, and of cuDNN's
        self.how = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        if x.is_cuda and self.fusable:
            if z is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.how)
            return torch.cudnn_convolution_add_relu(x, self.weight, z, 1.0, self.bias, *self.how)
        y = F.conv2d(x, self.weight, self.bias, *self.how)
        if z is not None:
            y = y + z
        return F.relu(y) if self.relu else y


class FoldedBlock(nn.Module):
    """A residual block in eval mode, one call for each convolution with all that follows it."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        plan = plan_of(block)

        def folded(stage, relu: bool) -> FoldedConv:
            bn = child(block, stage.norm) if stage.norm else None
            return FoldedConv(child(block, stage.conv), bn, dtype, relu)

        *inner, last = plan.branch
        self.inner = nn.Sequential(*(folded(stage, True) for stage in inner))
        self.add_inside = plan.relu
        self.last = folded(last, plan.relu or last.relu)
        projects = plan.shortcut is not None and plan.shortcut.conv is not None
        self.shortcut = folded(plan.shortcut, False) if projects else None
        if self.shortcut is not None and self.add_inside:
            # one bias for both: PyTorch adds a bias without a ReLU in a pass of its own
            self.last.bias += self.shortcut.bias
            self.shortcut.bias = None

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.shortcut is None else self.shortcut(x)
        out = self.inner(x)
        return self.last(out, z) if self.add_inside else self.last(out) + z


class FoldedNet(nn.Module):
    """A net in eval mode, in ``dtype`` throughout."""

    def __init__(self, net: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        children, i, layers = list(net), 0, []
        while i < len(children):
            part = children[i]
            if isinstance(part, nn.Conv2d):
                bn = children[i + 1] if isinstance(children[i + 1], nn.BatchNorm2d) else None
                i += 1 + (bn is not None)
                relu = isinstance(children[i], nn.ReLU)
                i += relu
                layers.append(FoldedConv(part, bn, dtype, relu))
                continue
            block = any(isinstance(m, nn.Conv2d) for m in part.modules())
            layers.append(FoldedBlock(part, dtype) if block else part.to(dtype))
            i += 1
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.dtype))
