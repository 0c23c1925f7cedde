"""csrc/cuda's conv_halo on a CPU: called on tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.reference import ACTS, ConvNorm

from . import Library
from .res_chain import KINDS, Values

EPILOGUES = ("affine", "statistics", "gradient")


# The structures of csrc/cuda/conv_halo_plan.cuh.
class HaloConv(Structure):
    _fields_ = [
        ("images", c_int64),
        *((name, c_int) for name in ("height", "width", "channels", "out_channels", "size")),
    ]


class HaloDevice(Structure):
    _fields_ = [
        ("multiprocessors", c_int),
        ("shared_bytes", c_int),
        ("multiprocessor_bytes", c_int),
    ]


class HaloCall(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("strides", c_int64 * 4),
        *((name, Values) for name in ("bias", "mean", "var", "norm_weight", "norm_bias")),
        ("eps", c_double),
        ("stats", c_void_p),
        ("partial", c_void_p),
        ("act", c_int),
    ]


class Plan(NamedTuple):
    blocks: int
    stages: int
    rows: int
    shared_bytes: int
    group: int  # images of a tile
    height: int
    width: int
    tiles: int
    patch_pixels: int


def device(multiprocessors: int, kilobytes: int) -> HaloDevice:
    return HaloDevice(multiprocessors, kilobytes << 10, kilobytes + 1 << 10)


# With few multiprocessors a block goes through several tiles.
LARGE, SMALL, FEW = device(132, 227), device(3, 99), device(2, 227)


class HaloEmulation(Library):
    """``tf32``: whether float32 may be multiplied in TF32."""

    def __init__(self, folder: Path, compiler: str, defines: tuple[str, ...] = ()):
        super().__init__("conv_halo_emulated", folder, compiler, defines)
        conv = [c_int, c_int, POINTER(HaloConv)]
        self.library.halo.restype = c_char_p
        self.library.halo.argtypes = [
            *conv,
            POINTER(HaloDevice),
            POINTER(HaloCall),
            ctypes.c_uint64,
        ]
        self.library.halo_plan.argtypes = [*conv, c_bool, POINTER(HaloDevice), POINTER(c_int64)]
        for name in ("halo_plan", "size_of_call"):
            getattr(self.library, name).restype = c_int64
        assert self.library.size_of_call() == ctypes.sizeof(HaloCall)
        self.device, self.tf32 = FEW, False

    def _values(self, name: str, t: Tensor | None) -> Values:
        return Values(self._pointer(name, t), t is not None and t.dtype == torch.float32)

    def _kind(self, x: Tensor) -> int:
        kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return KINDS.index(kinds.get(x.dtype, "tf32" if self.tf32 else "exact"))

    def plan(
        self, x: Tensor, channels: int, size: int, end: str = "affine", residual: bool = False
    ) -> Plan | None:
        """None: it does not fit."""
        n, c, h, w = x.shape
        out, conv = (c_int64 * 8)(), HaloConv(n, h, w, c, channels, size)
        given = self._kind(x), EPILOGUES.index(end), conv, residual, self.device, out
        blocks = self.library.halo_plan(*given)
        return None if blocks < 0 else Plan(blocks, *out)

    def _run(self, end: str, x: Tensor, weight: Tensor, residual: Tensor | None, **given):
        """y, and the blocks' sums."""
        back = end == "gradient"
        channels, size = weight.size(1 if back else 0), weight.size(2)
        plan = self.plan(x, channels, size, end, residual is not None)
        assert plan is not None, "does not fit"
        n, c, h, w = x.shape
        y = torch.full((n, channels, h, w), float("nan"), dtype=x.dtype)
        y = y.contiguous(memory_format=torch.channels_last)
        rows = {"affine": 0, "statistics": 3, "gradient": 2}[end]
        partial = torch.full((plan.blocks, rows, channels), float("nan")) if rows else None
        strides = list(weight.stride())
        first = self._pointer("weight", weight)
        if back:
            strides = [strides[1], strides[0], -strides[2], -strides[3]]
            first -= (size - 1) * (strides[2] + strides[3]) * weight.element_size()
        call = HaloCall(
            x=self._pointer("x", x),
            weight=first,
            residual=self._pointer("residual", residual),
            y=self._pointer("y", y, True),
            strides=(c_int64 * 4)(*strides),
            partial=self._pointer("partial", partial, True),
            **given,
        )
        conv = HaloConv(n, h, w, c, channels, size)
        kind = self._kind(x), EPILOGUES.index(end)
        self._finish(self.library.halo(*kind, conv, self.device, call, self.seed))
        return y, partial

    def forward(
        self, x: Tensor, conv: ConvNorm, residual: Tensor | None = None, act: str = "relu"
    ) -> Tensor:
        self._start()
        names = ("mean", "var", "norm_weight", "norm_bias")
        values = {
            name: self._values("norm", t)
            for name, t in zip(names, (conv.norm or (None,) * 4)[:4], strict=True)
        }
        values |= {"bias": self._values("bias", conv.bias), "act": ACTS.index(act)}
        if conv.norm:
            values["eps"] = conv.norm.eps
        return self._run("affine", x, conv.weight, residual, **values)[0]

    def statistics(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y; mean, sum of squared deviations and number of values of each block."""
        self._start()
        return self._run("statistics", x, weight, None, bias=self._values("bias", bias))

    def gradient(
        self, dy: Tensor, weight: Tensor, a: Tensor, stats: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dx; of each block the sums of dx and of dx * (a - mean)."""
        self._start()
        return self._run("gradient", dy, weight, a, stats=self._pointer("stats", stats))
