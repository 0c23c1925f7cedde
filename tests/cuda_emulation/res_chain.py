"""csrc/cuda's res_chain on a CPU: called on tensors and blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.ops.res_chain import Link
from fused_res.reference import ACTS

from . import Library, poisoned_like

KINDS = ("bf16", "fp16", "tf32", "exact")  # of products


# The structures of csrc/cuda/res_chain_plan.cuh.
class ChainShape(Structure):
    _fields_ = [("images", c_int64), ("channels", c_int), ("height", c_int), ("width", c_int)]


class ChainDevice(Structure):
    _fields_ = [("multiprocessors", c_int), ("shared_bytes", c_int), ("clusters", c_bool)]


class Values(Structure):
    _fields_ = [("data", c_void_p), ("is_float", c_bool)]


class Conv(Structure):
    _fields_ = [
        ("size", c_int),
        ("channels", c_int),
        ("out_channels", c_int),
        ("act", c_int),
        ("last", c_bool),
        ("weight", c_void_p),
        ("channels_last", c_bool),
        ("bias", Values),
        ("mean", Values),
        ("var", Values),
        ("norm_weight", Values),
        ("norm_bias", Values),
        ("eps", c_double),
    ]


class Plan(NamedTuple):
    group: int  # of images, that a block takes
    cluster: int  # blocks that share an image
    rows: int
    shared_bytes: int
    packed_bytes: int
    workspace: int  # bytes


# Without clusters a block of many multiprocessors has one image, that of one as many as fit.
LARGE, SMALL = ChainDevice(132, 227 << 10, False), ChainDevice(1, 99 << 10, False)
CLUSTERS = ChainDevice(132, 227 << 10, True)


class ChainEmulation(Library):
    """``tf32``: whether float32 may be multiplied in TF32."""

    def __init__(self, folder: Path, compiler: str, defines: tuple[str, ...] = ()):
        super().__init__("res_chain_emulated", folder, compiler, defines)
        pointers = [c_int, POINTER(ChainShape), POINTER(Conv), c_int, POINTER(ChainDevice)]
        self.library.chain.restype = c_char_p
        self.library.chain.argtypes = [*pointers, c_void_p, c_void_p, c_void_p, ctypes.c_uint64]
        self.library.plan_of.argtypes = [*pointers, POINTER(c_int64)]
        for name in ("plan_of", "size_of_conv"):
            getattr(self.library, name).restype = c_int64
        assert self.library.size_of_conv() == ctypes.sizeof(Conv)
        self.device, self.tf32 = LARGE, False

    def _values(self, name: str, t: Tensor | None) -> Values:
        return Values(self._pointer(name, t), t is not None and t.dtype == torch.float32)

    def _given(self, x: Tensor, blocks: Sequence[Link]):
        """What both functions of the library begin with."""
        self._start()
        kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        kind = kinds.get(x.dtype, "tf32" if self.tf32 else "exact")
        n, c, h, w = x.shape
        convs = []
        for block in blocks:
            for i, conv in enumerate(block.convs):
                last, norm = i + 1 == len(block.convs), conv.norm
                k, channels, size, _ = conv.weight.shape
                convs.append(
                    Conv(
                        size,
                        channels,
                        k,
                        ACTS.index(block.act if last else "relu"),
                        last,
                        self._pointer("weight", conv.weight),
                        not conv.weight.is_contiguous(),
                        self._values("bias", conv.bias),
                        *(self._values("norm", t) for t in (norm or (None,) * 4)[:4]),
                        norm.eps if norm else 0,
                    )
                )
        shape = ChainShape(n, c, h, w)
        array = (Conv * len(convs))(*convs)
        return KINDS.index(kind), shape, array, len(convs), self.device

    def plan(self, x: Tensor, blocks: Sequence[Link]) -> Plan | None:
        """None: it does not fit."""
        out = (c_int64 * 5)()
        workspace = self.library.plan_of(*self._given(x, blocks), out)
        return None if workspace < 0 else Plan(*out, workspace)

    def __call__(self, x: Tensor, blocks: Sequence[Link]) -> Tensor:
        plan = self.plan(x, blocks)
        assert plan is not None, "does not fit"
        given = self._given(x, blocks)
        workspace = torch.full((plan.workspace // 4,), float("nan"))
        y = poisoned_like(x)
        pointers = (
            self._pointer("x", x),
            self._pointer("y", y, True),
            self._pointer("workspace", workspace, True),
        )
        self._finish(self.library.chain(*given, *pointers, self.seed))
        return y
