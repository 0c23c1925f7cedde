"""Blocks that ``fuse_`` runs in parts: with attention or another activation in them, or in another
order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_res.reference import ResBlock

EXTRAS = ("SE", "ECA", "SiLU", "pre-activation")


class Parted(ResBlock):
    """A basic block or bottleneck with more in it.

    Args:
        extra: ``SE``: its branch weighted by squeeze-and-excitation (Hu et al., 2018), ``ECA``: by
            efficient channel attention (Wang et al., 2020); ``SiLU`` in place of every ReLU;
            ``pre-activation``: BatchNorm and ReLU before each convolution (He et al., 2016b).
    """

    def __init__(self, *args, extra: str, device=None, dtype=None, **kwargs) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(*args, **factory, **kwargs)
        self.extra = extra
        channels = getattr(self, f"conv{self.depth}").out_channels
        if extra == "SE":
            inner = max(channels // 16, 8)
            self.squeeze = nn.Conv2d(channels, inner, 1, **factory)
            self.excite = nn.Conv2d(inner, channels, 1, **factory)
        elif extra == "ECA":
            self.across = nn.Conv1d(1, 1, 5, padding=2, bias=False, **factory)
        elif extra == "SiLU":
            self.silu = nn.SiLU()
        else:
            for i in range(1, self.depth + 1):
                before = getattr(self, f"conv{i}").in_channels
                setattr(self, f"bn{i}", nn.BatchNorm2d(before, **factory))

    def forward(self, x: Tensor) -> Tensor:
        act = self.silu if self.extra == "SiLU" else self.relu
        z = x
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if self.extra == "pre-activation":
                z = conv(self.relu(norm(z)))
            else:
                z = norm(conv(z))
                z = z if i == self.depth else act(z)
        if self.extra == "pre-activation":
            return z + x
        if self.extra == "SE":
            z = z * self.excite(self.relu(self.squeeze(z.mean((2, 3), keepdim=True)))).sigmoid()
        elif self.extra == "ECA":
            weights = self.across(z.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(3)
            z = z * torch.sigmoid(weights)
        return act(z + x)
