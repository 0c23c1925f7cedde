"""Compiles every Triton kernel for GPUs that need not be there, and says what the compiler made of
it: ``python benchmarks/kernels_report.py`` (``make kernels-report``).

The configurations are those that ``kernels/bn_act.py`` launches, recorded from calls with the
shapes below. Registers, stack and shared memory are read from the binary, instructions from the
assembly.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fused_res.kernels import bn_act as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One large and one small tensor of each layout, in which rows are whole vectors, and one in which
# they are not: 7x7 maps in NCHW.
SHAPES = {
    "channels_last": ((256, 64, 56, 56), (64, 32, 8, 8)),
    "NCHW": ((256, 64, 56, 56), (64, 32, 8, 8), (256, 512, 7, 7)),
}
DTYPES = (torch.bfloat16, torch.float32)
RESIDUALS = ("tensor", "norm")
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8",
}  # fmt: skip


class Configuration(NamedTuple):
    """One compilation: a kernel, the types of its arguments and its constants."""

    kernel: str
    dtype: str
    layout: str
    residual: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    warps: int

    @property
    def tile(self) -> str:
        c = dict(self.constants)
        if "R" not in c:
            return f"{c['K']}x{c['B']}"
        return f"{c['R']}x{8 * c['G']}" + (f" x{c['UNROLL']}" if "UNROLL" in c else "")


class Resources(NamedTuple):
    registers: int
    spills: int  # instructions that read or write local memory
    shared: int
    loads: str  # instructions: of 16 bytes / of all
    stores: str


def _record(shape, dtype, layout: str, residual: str) -> list[Configuration]:
    found = []
    norm = residual == "norm"

    def launch(kernel, grid, *args, warps, **constants):
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        signature, fixed, divisible = {}, {}, []
        for i, name in enumerate(kernel.arg_names):
            value = named[name]
            is_tensor = isinstance(value, torch.Tensor)
            is_one = not is_tensor and value == 1 and name not in kernels.COUNTS
            if name in constants or value is None or is_one:
                signature[name], fixed[name] = "constexpr", value
            elif is_tensor:
                signature[name] = "*" + _TYPES[value.dtype]
                divisible.append(i)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and name not in kernels.COUNTS:
                    divisible.append(i)
        found.append(
            Configuration(
                kernel.fn.__name__, _TYPES[dtype], layout, residual, tuple(signature.items()),
                tuple(fixed.items()), tuple(divisible), warps,
            )
        )  # fmt: skip

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    w = torch.empty(shape[1], device="meta")
    second = (w, w, w, w) if norm else (None,) * 4
    launched, kernels._launch = kernels._launch, launch
    try:
        _, mask, stats = kernels.forward(
            x, w, w, w, w, True, 0.1, 1e-5, x, norm, *second, norm, 0.1, 1e-5, 1, True)  # fmt: skip
        kernels.backward(
            x, x, w, True, x if norm else None, norm, w if norm else None, norm, stats, mask, 1,
            True, True, True)  # fmt: skip
    finally:
        kernels._launch = launched
    return found


def configurations() -> list[Configuration]:
    """Every configuration that the shapes above launch, once."""
    found = {}
    for layout, shapes in SHAPES.items():
        for shape in shapes:
            for dtype in DTYPES:
                for residual in RESIDUALS:
                    for c in _record(shape, dtype, layout, residual):
                        same = c._replace(dtype="", layout="", residual="")
                        found.setdefault(same, c)
    return list(found.values())


def _count(assembly: str, wide: str, every: str) -> str:
    return f"{len(re.findall(wide, assembly))}/{len(re.findall(every, assembly))}"


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def compile_for(c: Configuration, target: str) -> Resources:
    """Compiles one configuration; raises what the compiler raises."""
    source = ASTSource(
        fn=getattr(kernels, c.kernel),
        signature=dict(c.signature),
        constexprs={(i,): dict(c.constants)[n] for i, (n, t) in enumerate(c.signature)
                    if t == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i in c.divisible},
    )  # fmt: skip
    built = triton.compile(source, target=TARGETS[target], options={"num_warps": c.warps})
    shared = built.metadata.shared
    if target.startswith("gfx"):
        text = built.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}: *(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        loads = _count(text, r"(?:global|buffer)_load_dwordx4", r"(?:global|buffer)_load_")
        stores = _count(text, r"(?:global|buffer)_store_dwordx4", r"(?:global|buffer)_store_")
        return Resources(registers, spills, shared, loads, stores)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", _cuobjdump("-sass", file.name)))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    ptx = built.asm["ptx"]
    loads = _count(ptx, r"ld\.global[\w:.]*\.v4\.b32", r"ld\.global")
    stores = _count(ptx, r"st\.global[\w:.]*\.v4\.b32", r"st\.global")
    return Resources(registers, spills, shared, loads, stores)


def _row(job: tuple[Configuration, str]) -> tuple[Configuration, str, Resources]:
    return *job, compile_for(*job)


def report(targets=tuple(TARGETS), workers: int = 2) -> list[tuple[Configuration, str, Resources]]:
    jobs = [(c, target) for c in configurations() for target in targets]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_row, jobs, chunksize=4))


def table(rows: list[tuple[Configuration, str, Resources]]) -> str:
    """Markdown."""
    targets = list(dict.fromkeys(target for _, target, _ in rows))
    lines = [
        "| kernel | tile | warps | dtype, layout, residual | " + " | ".join(targets) + " |",
        "|---" * (4 + len(targets)) + "|",
    ]
    grouped: dict[Configuration, dict[str, Resources]] = {}
    for c, target, resources in rows:
        grouped.setdefault(c, {})[target] = resources
    for c, found in grouped.items():
        cells = [
            f"{r.registers}, {r.spills}, {r.shared}, {r.loads}, {r.stores}" for r in found.values()
        ]
        what = f"{c.dtype}, {c.layout}, {c.residual}"
        lines.append(f"| {c.kernel} | {c.tile} | {c.warps} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    args = parser.parse_args()
    rows = report(tuple(args.target or TARGETS))
    print(f"triton {triton.__version__}. Each cell: registers, spills, shared memory bytes, "
          "loads and stores (16-byte ones / all).\n")  # fmt: skip
    print(table(rows))
    spilled = [(c, target) for c, target, r in rows if r.spills]
    for c, target in spilled:
        print(f"spills: {c.kernel} {c.tile} {c.dtype} {c.layout} on {target}")
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
