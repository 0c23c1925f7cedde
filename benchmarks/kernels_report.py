"""Compiles every GPU kernel for GPUs that need not be there, and says what the compilers made of
it: ``python benchmarks/kernels_report.py`` (``make kernels-report``). Exit 1 where one spills.

CUDA C++: every instance in fused_res, as ``report/cuda_resources.py`` compiles them. Triton: the
configurations that ``kernels`` launches, recorded from calls with the shapes below.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import re
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from report import cuda_resources as cuda
from report import memory_requests, predicted
from report.cuda_resources import Resources
from report.tables import replaced
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_res.kernels import bn_act_bwd, bn_act_fwd, conv_tiles, launch
from fused_res.kernels import conv_bn_act as conv_kernels
from fused_res.kernels import training_convolution as training_kernels
from fused_res.reference import ConvNorm, Norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One large and one small tensor of each layout, in which rows are whole vectors, and one in which
# they are not.
SHAPES = {
    "channels_last": ((256, 64, 56, 56), (64, 32, 8, 8)),
    "NCHW": ((256, 64, 56, 56), (64, 32, 8, 8)),
    "NCHW 7x7": ((256, 512, 7, 7),),
}
DTYPES = (torch.bfloat16, torch.float32)
RESIDUALS = ("tensor", "norm")
# Of the inference op: the input, and the output channels.
CONV_SHAPE = (64, 64, 56, 56)
CONV_FILTERS = 256
EPILOGUES = ("STATISTICS", "RELU", "ADD")  # of a training convolution
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8",
}  # fmt: skip

# By name, those that are launched; device functions have other names.
KERNELS = {
    name: f
    for module in (bn_act_fwd, bn_act_bwd, conv_kernels, training_kernels)
    for name, f in vars(module).items()
    if name.endswith("_kernel")
}

# --- Triton: what is compiled


class Configuration(NamedTuple):
    """One compilation: a kernel, the types of its arguments and its constants."""

    kernel: str
    dtype: str  # of these three the first that came; several calls may share a compilation
    layout: str
    residual: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int | None = None  # None: Triton's own choice

    @property
    def tile(self) -> str:
        c = dict(self.constants)
        if "BN" in c:
            pixels = c["M"] if "M" in c else f"{c['IMAGES']}x{c['TH']}x{c['TW']}"
            return f"{pixels} x {c['BN']} x {c['BK']}, {self.stages} stages"
        if "R" not in c:
            return f"{c['K']}x{c['B']}"
        return f"{c['R']}x{8 * c['G']}" + (f" x{c['DOWN'] * c['ACROSS']}" if "DOWN" in c else "")


def _type(value) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


@contextlib.contextmanager
def recording(*words: str):
    """Yields a list of what would be launched; nothing is."""
    found = []

    def record(kernel, grid, warps, stages=None, **arguments):
        signature, fixed, divisible = {}, {}, []
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            counts = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (counts and value == 1):
                signature[name], fixed[name] = "constexpr", value
                continue
            signature[name] = _type(value)
            if isinstance(value, torch.Tensor) or (counts and value % 16 == 0):
                divisible.append(i)
        found.append(
            Configuration(
                kernel.fn.__name__, *words, tuple(signature.items()), tuple(fixed.items()),
                tuple(divisible), warps, stages,
            )
        )  # fmt: skip

    with mock.patch.object(launch, "run", record):
        yield found


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Without data, in channels_last."""
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last)


def _stage(
    dtype: torch.dtype, filters: int, channels: int, size: int = 3, step: int = 1, norm=None
) -> ConvNorm:
    weight, padding = empty(dtype, filters, channels, size, size), (size // 2,) * 2
    return ConvNorm(weight, None, (step, step), padding, (1, 1), 1, norm)


def _record(shape, dtype, layout: str, residual: str) -> list[Configuration]:
    norm = residual == "norm"
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    w = torch.empty(shape[1], device="meta")
    first, of_first = Norm(w, w, w, w, True), bn_act_bwd.NormCall(w, True)
    second, of_second, other = (first, of_first, x) if norm else (None, None, None)
    wanted = bn_act_bwd.Wanted(True, True, True)
    with recording(_TYPES[dtype], layout, residual) as found:
        _, mask, stats = bn_act_fwd.forward(bn_act_fwd.Call(x, first, x, second))
        call = bn_act_bwd.Call(x, x, of_first, stats, mask, other, of_second, wanted=wanted)
        bn_act_bwd.backward(call)
        bn_act_fwd.statistics(x)
        sums = torch.empty((4, 2, shape[1]), device="meta")
        bn_act_bwd.backward_of_sums(bn_act_bwd.SumsCall(x, x, of_first, stats, sums, wanted, True))
    return found


def record_conv(config: conv_tiles.Config, dtype, residual: str) -> Configuration:
    """3x3 in steps of 2."""
    n, c, h, w = CONV_SHAPE
    norm = Norm(*[torch.empty(CONV_FILTERS, device="meta")] * 4)
    stage = partial(_stage, dtype, CONV_FILTERS, c, step=2, norm=norm)
    x, shortcut, other = (
        empty(dtype, n, c, h, w),
        None,
        empty(dtype, n, CONV_FILTERS, h // 2, w // 2),
    )
    if residual == "projection":
        shortcut, other = stage(size=1), x
    config = config._replace(BK=max(16, config.BK * 2 // dtype.itemsize))
    with recording(_TYPES[dtype], "3x3/2", residual) as found:
        conv_kernels.forward(x, stage(), other, shortcut, config=config)
    return found[0]


def conv_configurations() -> list[Configuration]:
    """Every configuration of the inference op, with what takes the most registers of what it is
    for; the widest of each kind in float32 too."""
    found, kinds = [], set()
    for config in conv_tiles.CONFIGS:
        narrow = config.M * config.BN <= conv_tiles.WIDEST
        residual = "projection" if narrow else "tensor"
        if config.kind != "exact":
            found.append(record_conv(config, torch.bfloat16, residual))
        if narrow and config.kind not in kinds:
            kinds.add(config.kind)
            found.append(record_conv(config, torch.float32, residual))
    return found


def record_training(config: conv_tiles.Config, dtype, epilogue: str) -> Configuration:
    """3x3, with an epilogue; ADD with a mask."""
    n, c, h, w = CONV_SHAPE
    k, x = CONV_FILTERS, empty(dtype, n, c, h, w)
    with (
        mock.patch.object(training_kernels, "_kind", lambda *_: config.kind),
        recording(_TYPES[dtype], "3x3", epilogue) as found,
    ):
        if epilogue == "STATISTICS":
            training_kernels.convolve(x, _stage(dtype, k, c), True, config)
        else:
            like, stats = empty(dtype, n, k, h, w), torch.empty(5, k, device="meta")
            mask = torch.empty(n * h * w, k // 8, dtype=torch.uint8, device="meta")
            add = epilogue == "ADD"
            given = {"other": like, "mask": mask} if add else {"a": like, "stats": stats}
            ending = training_kernels.Epilogue(getattr(training_kernels, epilogue), **given)
            training_kernels.input_gradient(x, _stage(dtype, c, k), (h, w), ending, config)
    return found[0]


def training_configurations() -> list[Configuration]:
    """Every configuration of the training convolutions with every epilogue; the widest of each kind
    in float32 too."""
    found, kinds = [], set()
    for config in conv_tiles.CONFIGS:
        if config.M * config.BN > conv_tiles.WIDEST:
            continue
        dtypes = [] if config.kind == "exact" else [torch.bfloat16]
        wide = config.kind == "pointer" and config.M * config.BN == conv_tiles.WIDEST
        if config.kind not in kinds and not wide:
            kinds.add(config.kind)
            dtypes.append(torch.float32)
        found += [record_training(config, *how) for how in itertools.product(dtypes, EPILOGUES)]
    return found


def configurations() -> list[Configuration]:
    """Every configuration of bn_act that the shapes above launch, once; "any" where it does not
    depend on the dtype, the layout or the residual."""
    found: dict[Configuration, list[Configuration]] = {}
    for layout, shapes in SHAPES.items():
        for shape, dtype, residual in itertools.product(shapes, DTYPES, RESIDUALS):
            for c in _record(shape, dtype, layout, residual):
                found.setdefault(c._replace(dtype="", layout="", residual=""), []).append(c)
    every = {"dtype": len(DTYPES), "layout": len(SHAPES), "residual": len(RESIDUALS)}
    merged = []
    for calls in found.values():
        words = {}
        for field, most in every.items():
            values = list(dict.fromkeys(getattr(c, field) for c in calls))
            words[field] = "any" if len(values) == most else ", ".join(values)
        merged.append(calls[0]._replace(**words))
    return merged


# --- Triton: what came of it

# A pair of float32 in one instruction counts once. Scratch memory is where spills go.
AMDGCN = {
    "spills": r"scratch_(load|store)",
    "loads": r"(global|buffer|flat)_load_",
    "wide_loads": r"(global|buffer|flat)_load_(dwordx4|b128)",
    "stores": r"(global|buffer|flat)_store_",
    "wide_stores": r"(global|buffer|flat)_store_(dwordx4|b128)",
    "shared_loads": r"ds_(read|load)",
    "shared_stores": r"ds_(write|store)",
    "fp32": r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad)_f32",
    "fp64": r"v_(add|mul|fma|fmac)_f64",
    "mma": r"v_mfma_",
    "barriers": r"s_barrier",
}


def read_amdgcn(text: str, shared: int) -> Resources:
    mix = cuda.count(re.findall(r"^\s+([a-z]\w+)", text, re.M), AMDGCN)
    field = {
        name: int(re.search(rf"\.{name}: *(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    mix["spills"] = max(mix["spills"], field["vgpr_spill_count"])  # accumulators take some
    return Resources(field["vgpr_count"], shared, field["private_segment_fixed_size"], **mix)


def build(c: Configuration, target: str):
    """Triton's compiled kernel of one configuration; raises what the compiler raises."""
    source = ASTSource(
        fn=KERNELS[c.kernel],
        signature=dict(c.signature),
        constexprs={(i,): dict(c.constants)[n] for i, (n, t) in enumerate(c.signature)
                    if t == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i in c.divisible},
    )  # fmt: skip
    gpu = TARGETS[target]
    options = launch.options(c.kernel, c.warps, gpu.warp_size, c.stages)
    return triton.compile(source, target=gpu, options=options)


def compile_for(c: Configuration, target: str) -> Resources:
    """What the compiler made of one configuration."""
    built = build(c, target)
    if target.startswith("gfx"):
        return read_amdgcn(built.asm["amdgcn"], built.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        (resources,) = cuda.read_cubin(Path(file.name)).values()
    return resources._replace(shared=built.metadata.shared)  # given at the launch


def report(sections: Iterable[Section], workers: int = 2):
    """(Configuration, target, Resources) of every compilation of the sections."""
    jobs = [
        job
        for section in sections
        for job in itertools.product(section.configurations(), section.targets)
    ]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        found = pool.map(compile_for, *zip(*jobs, strict=True), chunksize=4)
        return [(*job, resources) for job, resources in zip(jobs, found, strict=True)]


# --- tables


class Row(NamedTuple):
    kernel: str
    what: tuple[str, ...]  # which compilation
    dtype: str
    found: tuple[Resources, ...]  # of each architecture


HEADINGS = {"wide_loads": "16 B", "wide_stores": "16 B", "shared_loads": "shared loads",
            "shared_stores": "shared stores", "tma": "TMA", "matrix_loads": "ldmatrix",
            "copies": "cp.async"}  # fmt: skip


def _columns(text: str) -> dict[str, str]:
    """Headings by field of Resources; every table begins and ends alike."""
    fields = ["registers", "shared", "stack", "spills", *text.split(), "barriers"]
    return {field: HEADINGS.get(field, field) for field in fields}


_MEMORY = "loads wide_loads stores wide_stores shared_loads shared_stores fp32 fp64"
COLUMNS = _columns(_MEMORY)
CONV_COLUMNS = _columns("mma wgmma tma loads wide_loads shared_loads shared_stores")
CHAIN_COLUMNS = _columns(f"mma matrix_loads copies {_MEMORY}")


class Section(NamedTuple):
    """A part of kernels.md. kernels: of Triton, that it is about; source: of csrc/cuda."""

    name: str
    labels: tuple[str, ...]
    targets: list[str]
    kernels: tuple[str, ...] = ()
    columns: dict[str, str] = COLUMNS
    source: str = ""

    def configurations(self) -> list[Configuration]:
        if self.columns is COLUMNS:
            every = configurations()
        else:
            every = conv_configurations() + training_configurations()
        return [c for c in every if c.kernel in self.kernels]

    def header(self) -> list[str]:
        return [*self.labels, "dtype", *self.columns.values()]


def _cell(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def tables(rows: list[Row], section: Section) -> str:
    """Markdown: a table for each kernel, where dtypes with the same figures share a row."""
    kernels_rows: dict[str, dict[tuple, list[str]]] = {}
    for row in rows:
        same = kernels_rows.setdefault(row.kernel, {})
        found = tuple(r._replace(loops=()) for r in row.found)
        same.setdefault((row.what, found), []).append(row.dtype)
    sections = []
    for kernel, merged in kernels_rows.items():
        words = ["---"] * (len(section.labels) + 1)
        lines = [section.header(), words + ["--:"] * len(section.columns)]
        for (what, found), dtypes in merged.items():
            figures = [_cell([getattr(r, field) for r in found]) for field in section.columns]
            lines.append([*what, ", ".join(dtypes), *figures])
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        sections.append(f"#### {kernel}\n\n{text}")
    return "\n\n".join(sections)


def _caption(compiler: str, targets: list[str], rows: list[Row]) -> str:
    spilled = sum(any(r.spilled for r in row.found) for row in rows)
    return (
        f"{compiler}, {' / '.join(targets)}: {len(rows)} compilations, "
        f"{spilled or 'none'} with a stack or spills."
    )


_BN_ACT = tuple(name for name in KERNELS if name.startswith("_bn_act"))
_LABELS = ("tile", "warps", "layout", "residual")
_TRAIN_LABELS = ("tile", "warps", "convolution", "epilogue")
_CONV_LABELS = ("tile", "warps", "convolution", "residual")
_CONV, _TRAIN = "_conv_bn_act_fwd", "_training_convolution_fwd_bwd"
_CONV_TMA, _CONV_POINTER = (f"{_CONV}_descriptor_kernel",), (f"{_CONV}_pointer_kernel",)
_TRAIN_TMA, _TRAIN_POINTER = (f"{_TRAIN}_descriptor_kernel",), (f"{_TRAIN}_pointer_kernel",)
SECTIONS = (
    Section("cuda", ("variant",), list(cuda.ARCHITECTURES), source="bn_act"),
    Section("cuda-chain", ("variant",), list(cuda.ARCHITECTURES), (), CHAIN_COLUMNS, "res_chain"),
    Section("cuda-halo", ("variant",), list(cuda.ARCHITECTURES), (), CHAIN_COLUMNS, "conv_halo"),
    Section("cuda-block", ("variant",), list(cuda.ARCHITECTURES), source="res_block"),
    Section("triton-nvidia", _LABELS, ["sm_80", "sm_90", "sm_100"], _BN_ACT),
    Section("triton-amd", _LABELS, ["gfx942"], _BN_ACT),
    Section("conv-tma", _CONV_LABELS, ["sm_90", "sm_100"], _CONV_TMA, CONV_COLUMNS),
    Section("conv-nvidia", _CONV_LABELS, ["sm_80"], _CONV_POINTER, CONV_COLUMNS),
    Section("train-tma", _TRAIN_LABELS, ["sm_90", "sm_100"], _TRAIN_TMA, CONV_COLUMNS),
    Section("train-nvidia", _TRAIN_LABELS, ["sm_80"], _TRAIN_POINTER, CONV_COLUMNS),
    Section("train-amd", _TRAIN_LABELS, ["gfx942"], _TRAIN_POINTER, CONV_COLUMNS),
    Section("conv-amd", _CONV_LABELS, ["gfx942"], _CONV_POINTER, CONV_COLUMNS),
)


def cuda_rows(section: Section) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        compile_for = partial(cuda.compile_kernels, folder=Path(folder), stem=section.source)
        compiled = list(pool.map(compile_for, section.targets))
    rows = []
    for instances in zip(*compiled, strict=True):
        ((name, dtype, variant),) = {(k.name, k.dtype, k.variant) for k in instances}
        rows.append(Row(name, (variant or "-",), dtype, tuple(k.resources for k in instances)))
    return rows


def triton_rows(section: Section) -> list[Row]:
    found: dict[Configuration, list[Resources]] = {}
    for c, _, resources in report([section]):
        found.setdefault(c, []).append(resources)
    order = list(dict.fromkeys(c.kernel for c in found))
    return [
        Row(c.kernel, (c.tile, str(c.warps), c.layout, c.residual), c.dtype, tuple(resources))
        for c, resources in sorted(found.items(), key=lambda item: order.index(item[0].kernel))
    ]


def markers(section: str) -> tuple[str, str]:
    return f"<!-- {section}:begin -->", f"<!-- {section}:end -->"


def predict(page: str, section: Section, rows: list[Row]) -> str:
    """The page with the section's predictions, whose counts are kept in kernel_loops.json."""
    found = predicted.counted(rows, section.targets)
    if not found:
        return page
    predicted.write({**predicted.read(), section.name: found})
    table = predicted.table(found, section.labels)
    return replaced(page, *markers(f"{section.name}-predicted"), table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    every = list(dict.fromkeys(target for section in SECTIONS for target in section.targets))
    parser.add_argument("--target", choices=every, action="append", help="default: all")
    parser.add_argument("--section", choices=[s.name for s in SECTIONS], action="append",
                        help="default: all")  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in FILE")
    args = parser.parse_args(argv)
    if args.write and args.target:
        parser.error("--write takes every target")
    spilled = False
    for section in SECTIONS:
        targets = [t for t in section.targets if t in (args.target or every)]
        if not targets or section.name not in (args.section or [s.name for s in SECTIONS]):
            continue
        compiler, make = f"triton {triton.__version__}", triton_rows
        if section.source:
            missing = cuda.missing(targets)
            if missing:
                print(f"CUDA C++ is left out: {missing}\n", file=sys.stderr)
                continue
            compiler, make = f"nvcc {cuda.version()}", cuda_rows
        rows = make(section._replace(targets=targets))
        text = f"{_caption(compiler, targets, rows)}\n\n{tables(rows, section)}"
        print(f"{text}\n")
        if args.write:
            new = replaced(args.write.read_text(), *markers(section.name), text)
            args.write.write_text(predict(new, section, rows))
        for row in rows:
            for target, r in zip(targets, row.found, strict=True):
                if r.spilled:
                    spilled = True
                    words = (" ".join(pair) for pair in zip(section.labels, row.what, strict=True))
                    what = f"{row.kernel}, {', '.join(words)}, {row.dtype} on {target}"
                    print(f"spills: {what}: {r.stack} bytes, {r.spills} instructions")
    if not (args.target or args.section):
        requests = memory_requests.table()
        print(requests)
        if args.write:
            new = replaced(args.write.read_text(), *markers("requests"), requests)
            args.write.write_text(new)
    return int(spilled)


if __name__ == "__main__":
    raise SystemExit(main())
