"""What the CUDA kernels ask of memory, counted while ``tests/cuda_emulation`` runs them: sectors of
32 bytes of global memory and wavefronts of shared memory, over the least that move the same bytes.

Source: "Memory Statistics" of NVIDIA's Nsight Compute, which counts the same on a GPU.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fused_res.reference import ConvNorm, Norm

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.append(str(TESTS))
from cuda_emulation import ELEMENTS, Cost, Emulation  # noqa: E402
from cuda_emulation.conv_halo import LARGE as HALO_DEVICE  # noqa: E402
from cuda_emulation.conv_halo import HaloEmulation  # noqa: E402
from cuda_emulation.res_chain import CLUSTERS, LARGE, ChainEmulation  # noqa: E402

COLUMNS = {
    "global load": "global loads", "global store": "global stores", "shared load": "shared loads",
    "shared store": "shared stores", "shared ldmatrix": "ldmatrix",
}  # fmt: skip
Costs = dict[tuple[str, str, str], Cost]


class Row(NamedTuple):
    """costs: of each of COLUMNS, None where a kernel has no such access."""

    kernel: str
    what: str
    costs: tuple[Cost | None, ...]

    def cells(self) -> list[str]:
        figures = ["-" if c is None else f"{c.units / c.least:.2f}" for c in self.costs]
        return [self.kernel, self.what, *figures]


def _image(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _norm(channels: int, training: bool) -> Norm:
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return Norm(zeros.clone(), ones.clone(), ones, zeros, training)


def _stage(dtype: torch.dtype, channels: int) -> ConvNorm:
    weight = _image(dtype, channels, channels, 3, 3) / (9 * channels) ** 0.5
    return ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, _norm(channels, False))


def _bn_act(folder: Path, compiler: str) -> Iterator[tuple[str, Costs]]:
    emulation = Emulation(folder, compiler)
    emulation.count_requests(True)
    emulation.device.multiprocessors, emulation.device.shared_bytes = 24, 228 << 10
    for layout, memory_format in (
        ("channels_last", torch.channels_last),
        ("NCHW", torch.contiguous_format),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(8, 64, 32, 32).to(dtype).contiguous(memory_format=memory_format)
            for emulation.plan in ("whole", "split", "cooperative"):
                what = f"{layout}, {str(dtype).removeprefix('torch.')}"
                norm = _norm(64, True)
                _, mask, stats = emulation.forward(x, norm, x)
                yield what, emulation.requests()
                emulation.backward(x, x, norm, x, None, stats, mask, "relu")
                yield what, emulation.requests()


def _conv_halo(folder: Path, compiler: str) -> Iterator[tuple[str, Costs]]:
    emulation = HaloEmulation(folder, compiler)
    emulation.count_requests(True)
    emulation.device = HALO_DEVICE
    for kind, dtype in (("bf16", ELEMENTS[1]), ("tf32", ELEMENTS[0]), ("fp32", ELEMENTS[0])):
        emulation.tf32 = kind == "tf32"
        x, conv = _image(dtype, 2, 64, 24, 24), _stage(dtype, 64)
        emulation.forward(x, conv, x)
        yield f"{kind}, affine", emulation.requests()
        emulation.statistics(x, conv.weight)
        yield f"{kind}, statistics", emulation.requests()
        emulation.gradient(x, conv.weight, x, torch.rand(5, 64))
        yield f"{kind}, gradient", emulation.requests()


def _res_chain(folder: Path, compiler: str) -> Iterator[tuple[str, Costs]]:
    from fused_res.ops.res_chain import Link

    emulation = ChainEmulation(folder, compiler)
    emulation.count_requests(True)
    for kind, dtype in (("bf16", ELEMENTS[1]), ("tf32", ELEMENTS[0]), ("fp32", ELEMENTS[0])):
        emulation.tf32 = kind == "tf32"
        for where, emulation.device in (("a block", LARGE), ("a cluster", CLUSTERS)):
            stages = [_stage(dtype, 32), _stage(dtype, 32)]
            emulation(_image(dtype, 1, 32, 16, 16), [Link(stages, "relu")])
            yield f"{kind}, {where}", emulation.requests()


def _rows(what: str, costs: Costs) -> Iterator[Row]:
    for kernel in dict.fromkeys(kernel for kernel, _, _ in costs):
        found = (costs.get((kernel, *column.split())) for column in COLUMNS)
        yield Row(kernel, what, tuple(found))


def rows() -> list[Row]:
    """Of every CUDA kernel that moves tensors; a kernel that two plans launch is there once.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler, which the emulation is built by")
    found: dict[tuple[str, str], Row] = {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for op in (_bn_act, _conv_halo, _res_chain):
            for what, costs in op(Path(folder), compiler):
                for row in _rows(what, costs):
                    found.setdefault((row.kernel, row.what), row)
    return sorted(found.values(), key=lambda row: row.kernel)


def table() -> str:
    """Markdown."""
    lines = [["kernel", "of", *COLUMNS.values()], ["---", "---"] + ["--:"] * len(COLUMNS)]
    lines += [row.cells() for row in rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
