"""csrc/cuda's kernels on a CPU: built by a host compiler over emulator.h, called on tensors. Of
every op, and bn_act; res_chain is in res_chain.py."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import Norm
from fused_res.reference import ACTS

FOLDER = Path(__file__).parent
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
PLANS = ("automatic", "whole", "cooperative", "split")


# The structures of csrc/cuda/bn_act_common.cuh.
class Shape(Structure):
    _fields_ = [
        ("images", c_int64),
        ("channels", c_int64),
        ("pixels", c_int64),
        ("channels_last", c_bool),
    ]


class Device(Structure):
    _fields_ = [("multiprocessors", c_int), ("shared_bytes", c_int)]


class Channels(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("is_float", c_bool)]


class ForwardNorm(Structure):
    _fields_ = [
        ("weight", Channels),
        ("bias", Channels),
        ("running_mean", Channels),
        ("running_var", Channels),
        ("training", c_bool),
        ("momentum", c_double),
        ("eps", c_double),
    ]


class ForwardArgs(Structure):
    _fields_ = [
        ("element", c_int),
        ("shape", Shape),
        ("act", c_int),
        ("residual_kind", c_int),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("mask", c_void_p),
        ("stats", c_void_p),
        ("norm", ForwardNorm * 2),
        ("scratch", c_void_p),
        ("plan", c_int),
        ("device", Device),
    ]


class BackwardNorm(Structure):
    _fields_ = [
        ("weight", Channels),
        ("dweight", Channels),
        ("dbias", Channels),
        ("training", c_bool),
    ]


class BackwardArgs(Structure):
    _fields_ = [
        ("element", c_int),
        ("shape", Shape),
        ("act", c_int),
        ("residual_norm", c_bool),
        ("dy", c_void_p),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("mask", c_void_p),
        ("dx", c_void_p),
        ("dresidual", c_void_p),
        ("stats", c_void_p),
        ("norm", BackwardNorm * 2),
        ("sums", c_bool),
        ("given", c_void_p),
        ("scratch", c_void_p),
        ("plan", c_int),
        ("device", Device),
    ]


# Bytes of shared memory that keep an eight of 16-bit elements of one tensor for every thread.
SLOT = 256 * 16


class EmulationError(RuntimeError):
    """The emulator found a fault: an access out of bounds, a barrier not all threads reach, ..."""


class Cost(NamedTuple):
    """Of warps' instructions: how many; wavefronts of shared memory, or sectors of 32 bytes of
    global memory; the least of those that move the same bytes."""

    requests: int
    units: int
    least: int


class Gradients(NamedTuple):
    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual_weight: Tensor | None
    dresidual_bias: Tensor | None


def at_offset(t: Tensor, offset: int) -> Tensor:
    """A copy of dense ``t`` that starts ``offset`` elements into a buffer full of NaN."""
    buffer = torch.full((t.numel() + offset + 8,), float("nan"), dtype=t.dtype)
    return buffer.as_strided(t.shape, t.stride(), offset).copy_(t)


def poisoned_like(t: Tensor) -> Tensor:
    return torch.full_like(t, 0xA5 if t.dtype == torch.uint8 else float("nan"))


def to_tf32(t: Tensor) -> Tensor:
    """float32 rounded as the emulated tensor cores are given it."""
    bits = t.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Library:
    """An emulated library. ``seed`` sets the order in which threads and blocks run."""

    def __init__(self, name: str, folder: Path, compiler: str, defines: tuple[str, ...] = ()):
        path = folder / f"{name}.so"
        flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
        subprocess.run(
            [compiler, *flags, *defines, "-fPIC", "-shared", f"-I{FOLDER}",
             str(FOLDER / f"{name}.cpp"), "-o", str(path)],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(path))
        self.library.counts.restype = self.library.requests.restype = c_char_p
        self.library.count_requests.argtypes = [c_bool]
        self.library.add_region.argtypes = [c_char_p, c_void_p, c_int64, c_int64, c_bool]
        self.seed, self._kept = 0, []

    def _start(self):
        self.library.clear_regions()
        self._kept = []

    def _pointer(self, name: str, t: Tensor | None, written: bool = False) -> int | None:
        """Registers the memory of ``t``, which has no gaps or is one-dimensional."""
        if t is None:
            return None
        self._kept.append(t)
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        size = t.element_size()
        self.library.add_region(name.encode(), t.data_ptr(), (last + 1) * size, size, written)
        return t.data_ptr()

    def _finish(self, error: bytes | None) -> None:
        if error:
            raise EmulationError(error.decode())

    def counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(kernel, tensor) -> (bytes read, bytes written) by the last call."""
        lines = (line.split() for line in self.library.counts().decode().splitlines())
        return {(kernel, name): (int(r), int(w)) for kernel, name, r, w in lines}

    def count_requests(self, counted: bool) -> None:
        """Whether ``requests`` has what calls from now on do. It takes time."""
        self.library.count_requests(counted)

    def requests(self) -> dict[tuple[str, str, str], Cost]:
        """(kernel, "shared" or "global", "load", "store" or "ldmatrix") -> of the last call."""
        lines = (line.split() for line in self.library.requests().decode().splitlines())
        return {
            tuple(key): Cost(*map(int, cost)) for *key, cost in ((*x[:3], x[3:]) for x in lines)
        }

    def bank_conflicts(self) -> dict[str, int]:
        """Kernel -> wavefronts of ldmatrix above the least, where there are any."""
        return {
            kernel: cost.units - cost.least
            for (kernel, _, access), cost in self.requests().items()
            if access == "ldmatrix" and cost.units > cost.least
        }


class Emulation(Library):
    """bn_act."""

    def __init__(self, folder: Path, compiler: str, defines: tuple[str, ...] = ()):
        super().__init__("bn_act_emulated", folder, compiler, defines)
        for name in ("forward", "reapply", "backward", "statistics"):
            getattr(self.library, name).restype = c_char_p
        for name in ("size_of_forward_args", "size_of_backward_args", "size_of_scratch"):
            getattr(self.library, name).restype = c_int64
        self.library.forward.argtypes = [POINTER(ForwardArgs), ctypes.c_uint64]
        self.library.reapply.argtypes = [POINTER(ForwardArgs), ctypes.c_uint64]
        self.library.backward.argtypes = [POINTER(BackwardArgs), ctypes.c_uint64]
        self.library.statistics.argtypes = [POINTER(ForwardArgs), c_void_p, ctypes.c_uint64]
        self.library.place_of.argtypes = [POINTER(Shape), c_int64, c_int64, POINTER(c_int64)]
        self.library.part_of.argtypes = [POINTER(Shape), c_int64, POINTER(c_int64)]
        assert self.library.size_of_forward_args() == ctypes.sizeof(ForwardArgs)
        assert self.library.size_of_backward_args() == ctypes.sizeof(BackwardArgs)
        self.plan = "automatic"
        self.device = Device(3, 2 * (1024 + (17 << 10)) + 2 * SLOT)

    def _channels(self, name: str, t: Tensor | None, written: bool = False) -> Channels:
        if t is None:
            return Channels(None, 0, False)
        pointer = self._pointer(name, t, written)
        return Channels(pointer, t.stride(0), t.dtype == torch.float32)

    def _scratch(self, shape: Shape) -> int:
        size = self.library.size_of_scratch(ctypes.byref(shape), ctypes.byref(self.device))
        scratch = torch.full((size // 4,), float("nan"))
        return self._pointer("scratch", scratch, True)

    @staticmethod
    def shape(x: Tensor) -> Shape:
        n, c, h, w = x.shape
        return Shape(n, c, h * w, h * w == 1 or not x.is_contiguous())

    def place(self, shape: Shape, column: int, item: int) -> list[int]:
        out = (c_int64 * 3)()
        self.library.place_of(ctypes.byref(shape), column, item, out)
        return list(out)

    def part(self, shape: Shape, block: int) -> list[int]:
        out = (c_int64 * 4)()
        self.library.part_of(ctypes.byref(shape), block, out)
        return list(out)

    def forward(
        self, x: Tensor, norm: Norm, residual: Tensor | None = None,
        residual_norm: Norm | None = None, act: str = "relu", save_mask: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """y, mask, stats; the running statistics of the norms are updated in place."""
        self._start()
        shape = self.shape(x)
        run = shape.channels if shape.channels_last else shape.pixels
        y = poisoned_like(x)
        mask = None
        if act != "none" and save_mask:
            mask = poisoned_like(torch.empty(x.numel() // run, -(-run // 8), dtype=torch.uint8))
        stats = poisoned_like(torch.empty(7 if residual_norm else 5, x.size(1)))

        def forward_norm(n: Norm | None) -> ForwardNorm:
            if n is None:
                return ForwardNorm()
            written = n.training
            return ForwardNorm(
                self._channels("weight", n.weight),
                self._channels("bias", n.bias),
                self._channels("running_mean", n.running_mean, written),
                self._channels("running_var", n.running_var, written),
                n.training,
                n.momentum,
                n.eps,
            )

        args = ForwardArgs(
            ELEMENTS.index(x.dtype),
            shape,
            ACTS.index(act),
            2 if residual_norm else 1 if residual is not None else 0,
            self._pointer("x", x),
            self._pointer("residual", residual),
            self._pointer("y", y, True),
            self._pointer("mask", mask, True),
            self._pointer("stats", stats, True),
            (forward_norm(norm), forward_norm(residual_norm)),
            self._scratch(shape),
            PLANS.index(self.plan),
            self.device,
        )
        self._finish(self.library.forward(ctypes.byref(args), self.seed))
        return y, mask, stats

    def reapply(self, x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
        """y and mask of a forward call with a ReLU and no residual."""
        self._start()
        shape = self.shape(x)
        run = shape.channels if shape.channels_last else shape.pixels
        y = poisoned_like(x)
        mask = poisoned_like(torch.empty(x.numel() // run, -(-run // 8), dtype=torch.uint8))
        args = ForwardArgs(element=ELEMENTS.index(x.dtype), shape=shape, act=ACTS.index("relu"))
        args.x, args.y = self._pointer("x", x), self._pointer("y", y, True)
        args.mask, args.stats = self._pointer("mask", mask, True), self._pointer("stats", stats)
        self._finish(self.library.reapply(ctypes.byref(args), self.seed))
        return y, mask

    def statistics(self, x: Tensor) -> Tensor:
        self._start()
        args = ForwardArgs(element=ELEMENTS.index(x.dtype), shape=self.shape(x))
        args.x, args.scratch = self._pointer("x", x), self._scratch(args.shape)
        args.norm[0].training = True
        out = poisoned_like(torch.empty(3, x.size(1), dtype=torch.float64))
        pointer = self._pointer("statistics", out, True)
        self._finish(self.library.statistics(ctypes.byref(args), pointer, self.seed))
        return out

    def backward(
        self, dy: Tensor, x: Tensor, norm: Norm, residual: Tensor | None,
        residual_norm: Norm | None, stats: Tensor, mask: Tensor | None, act: str,
        need_x: bool = True, need_residual: bool = True, need_parameters: bool = True,
        sums: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        self._start()
        shape = self.shape(x)
        dx = poisoned_like(x) if need_x else None
        dresidual = poisoned_like(x) if need_residual else None
        parameters = []

        def backward_norm(n: Norm | None) -> BackwardNorm:
            if n is None:
                parameters.extend((None, None))
                return BackwardNorm()
            wanted = need_parameters and n.weight is not None
            gradients = [poisoned_like(n.weight) if wanted else None for _ in range(2)]
            parameters.extend(gradients)
            return BackwardNorm(
                self._channels("weight", n.weight),
                *(self._channels("dparameter", g, True) for g in gradients),
                n.training,
            )

        norms = backward_norm(norm), backward_norm(residual_norm)
        second_trains = residual_norm is not None and residual_norm.training
        args = BackwardArgs(
            ELEMENTS.index(x.dtype),
            shape,
            ACTS.index(act),
            residual_norm is not None,
            self._pointer("dy", dy),
            self._pointer("x", x),
            self._pointer("residual", residual if residual_norm else None),
            self._pointer("mask", mask),
            self._pointer("dx", dx, True),
            self._pointer("dresidual", dresidual, True),
            self._pointer("stats", stats),
            norms,
            sums is None
            and (
                need_parameters or (need_x and norm.training) or (need_residual and second_trains)
            ),
            self._pointer("sums", sums),
            self._scratch(shape),
            PLANS.index(self.plan),
            self.device,
        )
        self._finish(self.library.backward(ctypes.byref(args), self.seed))
        return Gradients(dx, dresidual, *parameters)
