"""csrc/cuda's host code on a CPU: the real sources by a host compiler, over a CUDA runtime and a
libtorch that do not need a GPU (the folder host), with kernels in the emulator.

Every op of csrc/cuda/ops.cu takes CPU tensors under another namespace. ``Host`` calls them, and
raises ``HostError`` where one does what would be wrong with two GPUs: a query, launch or allocation
on another device than the tensors' one, a launch on another stream than the current one, an integer
that overflows, an error that is left behind. The runtime refuses launches that a device has not.
"""

from __future__ import annotations

import ctypes
import fcntl
import re
import subprocess
from ctypes import c_bool, c_char_p, c_int, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.ops import bn_act, res_block

FOLDER = Path(__file__).parent / "host"
CUDA = FOLDER.parents[2] / "csrc" / "cuda"
SOURCES = [*(CUDA / f"{name}.cu" for name in ("bn_act", "conv_halo", "res_chain", "res_block")),
           FOLDER / "shim.cpp"]  # fmt: skip
TORCH = Path(torch.__file__).parent
NAMESPACE = "fused_res_emulated"
PLANS = ("automatic", "whole", "cooperative", "split")
FLAGS = [
    "-std=c++20", "-O1", "-Wall", "-Wno-attributes", "-Wno-unknown-pragmas", "-fPIC",
    "-fno-strict-aliasing", "-fno-gnu-unique", "-fsanitize=signed-integer-overflow",
    "-DUSE_CUDA", "-DFUSED_RES_EMULATION", "-DFUSED_RES_EMULATED_RUNTIME",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DEMULATED_NAMESPACE={NAMESPACE}",
    f"-I{FOLDER}", f"-I{FOLDER.parent}", f"-I{TORCH / 'include'}",
    f"-I{TORCH / 'include/torch/csrc/api/include'}",
]  # fmt: skip
# functions of libtorch that shim.cpp has another answer for
WRAPPED = ("aoti_torch_get_device_type", "aoti_torch_get_device_index",
           "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard",
           "aoti_torch_empty_strided", "torch_get_mutable_data_ptr",
           "torch_get_const_data_ptr")  # fmt: skip
# a test's own stream: a number that no allocation has
SIDE_STREAM = 0x50


class HostError(AssertionError):
    """The host code did what would be wrong on a machine with several GPUs and streams."""


class Launch(NamedTuple):
    kernel: str
    blocks: int
    rows: int  # of the grid
    threads: int
    shared_bytes: int
    cluster: int
    cooperative: int
    device: int
    stream: int


def build_once(folder: Path, compiler: str) -> Path:
    """The library; of several processes that want it the first builds it."""
    with (folder / "host.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "host.so"
        return path if path.exists() else build(folder, compiler)


def build(folder: Path, compiler: str) -> Path:
    """The library; two compilers at a time."""
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    commands = [
        [compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(output)]
        for source, output in zip(SOURCES, objects, strict=True)
    ]
    for first in range(0, len(commands), 2):
        running = [subprocess.Popen(command) for command in commands[first : first + 2]]
        assert not any([process.wait() for process in running])
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl"]
    path = folder / "host.so"
    subprocess.run(
        [compiler, "-shared", *map(str, objects), *wraps, *libraries, "-o", str(path)], check=True
    )
    return path


def names() -> list[str]:
    """Of all ops in csrc/cuda/ops.cu."""
    return re.findall(r'm\.impl\("(\w+)"', (CUDA / "ops.cu").read_text())


class Host:
    """Calls ops by name. Tensors are on the device ``use`` names; the current one is device 0."""

    def __init__(self, folder: Path, compiler: str):
        path = build_once(folder, compiler)
        self._definitions = torch.library.Library(NAMESPACE, "DEF")
        for name in names():
            schema = str(getattr(torch.ops.fused_res, name).default._schema)
            self._definitions.define(schema.partition("::")[2])
        self._definitions.define("fake(int[] size, int[] stride, ScalarType dtype) -> Tensor")
        self._definitions.define("reapply(Tensor x, Tensor stats) -> Tensor[]")
        torch.ops.load_library(str(path))
        self._ops = getattr(torch.ops, NAMESPACE)
        self._library = ctypes.CDLL(str(path))
        self._library.host_report.restype = c_char_p
        self._library.host_add_device.argtypes = [c_int] * 4 + [c_bool]
        self._library.host_use.argtypes = [c_int, c_int, c_void_p]
        self._library.host_set.argtypes = [c_bool, c_bool, c_int]
        self._library.host_refuse.argtypes = [c_char_p, c_int]
        self._library.host_place.argtypes = [c_void_p, c_int]
        self._library.host_plant.argtypes = [c_char_p]
        self._library.host_add_device(1, 48 << 10, 64 << 10, 80, False)  # device 0, for no tensor
        self._devices: dict[tuple, int] = {}
        self.launches: list[Launch] = []
        self.calls: list[str] = []  # functions of the runtime, allocations and convolutions
        self.reset()

    def reset(self) -> None:
        self._library.host_begin()
        self._library.host_clear()
        self.set()
        self.use(self.device())
        self.launches, self.calls, self._placed = [], [], []
        self._ops.cuda_plan(0)

    def device(
        self, multiprocessors: int = 132, kilobytes: int = 227, clusters: bool = True,
        ptx: int = 90, number: int = 0,
    ) -> int:  # fmt: skip
        """The number of a device with such resources. The host code asks a device once, so another
        ``number`` is another device of the same kind, not asked yet.

        kilobytes: of shared memory that a block may have.
        """
        key = multiprocessors, kilobytes, clusters, ptx, number
        if key not in self._devices:
            self._devices[key] = self._library.host_add_device(
                multiprocessors, kilobytes << 10, kilobytes + 1 << 10, ptx, clusters
            )
        return self._devices[key]

    def use(self, device: int, stream: int = SIDE_STREAM) -> None:
        self.of_tensors, self.stream = device, stream
        self._library.host_use(0, device, stream)

    def set(self, runs: bool = True, fakes: bool = False, most_together: int = 2**30) -> None:
        """runs: kernels run, else their launches are recorded alone; fakes: allocations have no
        memory; most_together: blocks that a cooperative launch may have."""
        self._library.host_set(runs, fakes, most_together)

    def refuse(self, function: str, error: int = 1) -> None:
        """A function of the runtime fails from now on."""
        self._library.host_refuse(function.encode(), error)

    def place(self, t: Tensor, device: int) -> Tensor:
        """``t`` is on another device; -1: on the CPU."""
        self._library.host_place(t.data_ptr(), device)
        self._placed.append(t)  # no other tensor gets its address
        return t

    def plant(self, fault: str) -> None:
        """no guard, default stream, no opt-in, smaller grid: as if the host code had it."""
        self._library.host_plant(fault.encode())

    def plan(self, name: str) -> None:
        self._ops.cuda_plan(PLANS.index(name))

    def fake(self, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Tensor:
        """A tensor that has no memory."""
        _, c, h, w = shape
        strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
        return self._ops.fake(shape, strides, dtype)

    def __call__(self, name: str, *args):
        self._library.host_begin()
        try:
            return getattr(self._ops, name)(*args)
        finally:
            wrong = []
            for line in self._library.host_report().decode().splitlines():
                kind, _, rest = line.partition(" ")
                if kind == "launch":
                    kernel, *numbers = rest.split()
                    self.launches.append(Launch(kernel, *map(int, numbers)))
                elif kind == "call":
                    self.calls.append(rest.split()[0])
                else:
                    wrong.append(rest)
            if wrong:
                raise HostError("; ".join(wrong))

    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]

    def as_cpu(self, monkeypatch) -> None:
        """``bn_act`` and ``res_block`` in Python call these ops for backend ``cpu``."""

        def op(name):
            return lambda *args: self(name, *args)

        monkeypatch.setitem(bn_act._OPS, "", (op("bn_act_fwd"), op("bn_act_bwd")))
        monkeypatch.setattr(res_block, "_forward", op("res_block_fwd"))
        monkeypatch.setattr(res_block, "_backward", op("res_block_bwd"))
