"""Blocks that ``fuse_`` fuses in part: with attention or another activation in them, or in another
order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from harness.suite import CL, STEP, WINOGRAD_BOUND, Build, Options, Suite, why_none
from report.tables import Lookup, Table, claims, figure, over, saved
from torch import Tensor, nn

from fused_res.reference import ResBlock

from . import blocks
from .blocks import BlockWorkload, block, both
from .nets import fused


class PartialBlock(ResBlock):
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


@dataclass(frozen=True)
class PartialWorkload(BlockWorkload):
    extra: str = "SE"

    def block(self, device=None, dtype=None) -> nn.Module:
        return self._make(PartialBlock, extra=self.extra, device=device, dtype=dtype)

    def fused(self, backend: str) -> Build:
        return partial(self.program, self.block, wrap=partial(fused, backend=backend))

    def folded(self) -> Build | None:
        return None

    def backends(self, device: str, options: Options) -> dict[str, str | None]:
        if options.gpu:
            return super().backends(device, options)
        return {"auto": why_none(device, self.dtype)}  # which leaves some norms to PyTorch

    def bound(self) -> float:
        if self.training or self.dtype != torch.float32:
            return 0.0
        return WINOGRAD_BOUND * len(self.convolutions()) ** 0.5

    def moved_bytes(self, direction: str) -> int | None:
        return None


BLOCKS = (
    ("SE", "basic", (32, 64, 32, 32)), ("SE", "bottleneck", (16, 256, 28, 28), 64),
    ("ECA", "bottleneck", (16, 256, 28, 28), 64), ("SiLU", "bottleneck", (16, 256, 28, 28), 64),
    ("pre-activation", "bottleneck", (16, 256, 28, 28), 64),
    ("SE", "bottleneck", (16, 1024, 14, 14), 256),
)  # fmt: skip
QUICK = (
    ("SE", "basic", (4, 16, 9, 9)), ("ECA", "bottleneck", (4, 32, 9, 9), 16),
    ("SiLU", "basic", (4, 16, 9, 9)), ("pre-activation", "bottleneck", (4, 32, 9, 9), 16),
)  # fmt: skip
GPU_BLOCKS = (
    ("SE", "bottleneck", (128, 256, 56, 56), 64), ("ECA", "bottleneck", (128, 512, 28, 28), 128),
    ("SiLU", "bottleneck", (128, 512, 28, 28), 128),
    ("pre-activation", "bottleneck", (128, 256, 56, 56), 64), ("SE", "basic", (256, 64, 32, 32)),
)  # fmt: skip


def workloads(gpu: bool, quick: bool) -> list[PartialWorkload]:
    found = []
    for extra, *args in (QUICK[:1] if gpu else QUICK) if quick else GPU_BLOCKS if gpu else BLOCKS:
        plain = replace(block(*args), suite="partial")
        name = f"{extra} {plain.name}" + " bf16" * (gpu and not quick)
        one = PartialWorkload(**vars(plain) | {"name": name}, extra=extra)
        found += both(replace(one, dtype=torch.bfloat16) if gpu else one)
    return found


def _columns(what: str, direction: str) -> list:
    return [
        over(f"{what} over PyTorch, {CL}", f"eager {CL}", direction=direction),
        over(f"{what} over torch.compile", "compile", direction=direction),
        figure(f"{what} ms", "median_ms", direction=direction),
    ]


REPORT = Table(
    "Blocks fused in part",
    "Blocks that {candidate} fuses in part (channels_last): speed-up of a training step and, in "
    "eval mode without gradients, of inference; and what is saved for backward.",
    "block",
    [*_columns("step", STEP), *_columns("inference", "eval"), saved(STEP)],
)
GPU_REPORT = replace(
    blocks.GPU_REPORT,
    title="Blocks fused in part on a GPU",
    intro="A block that `fuse_` fuses in part ({candidate}, channels_last): speed-up over PyTorch, "
    "and what is saved for backward.",
)


def targets(rows: list[dict]) -> list[tuple[bool, str]]:
    found, out = Lookup(rows), []
    for candidate in found.fused:
        for allocator in found.allocators:
            for direction, what in (STEP, "step"), ("eval", "inference"):
                over = [
                    found.speedup(w, candidate, direction, allocator, [f"eager {CL}"])
                    for w in found.workloads
                ]
                what = f"{candidate}, allocator {allocator}: {what} of blocks fused in part"
                out += claims((f"{what} over eager {CL}", over, 1.0, 6, 6))
    return out


SUITES = (Suite("partial", 30, workloads, named=True, report=REPORT, gpu_report=GPU_REPORT,
                targets=targets),)  # fmt: skip
