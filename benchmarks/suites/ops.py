"""What a device can do at most: the bandwidth of a copy, the rate of a product of matrices; and
``bn_act`` in training: batch statistics, the residual added, ReLU after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness.measure import copy_gbps, product, repeated_ms, spread, tflops
from harness.program import FORMATS, TensorProgram, double, place, separate
from harness.rows import NOTHING
from harness.suite import CL, DTYPES, FUSED, STEP, Build, Plot, Suite, TrainingWorkload
from report.tables import COMPILED, Lookup, Table, caption, claims, figure, on_device, over
from torch import Tensor

from fused_res import reference
from fused_res.env import BACKENDS
from fused_res.ops.bn_act import bn_act
from fused_res.reference import Norm

SHAPES = (
    (32, 64, 56, 56), (32, 64, 32, 32), (32, 512, 7, 7), (16, 256, 56, 56), (64, 32, 16, 16),
    (64, 32, 8, 8),
)  # fmt: skip
GPU_SHAPES = (
    ((128, 256, 56, 56), CL, "bf16"), ((256, 64, 56, 56), CL, "bf16"),
    ((64, 32, 16, 16), CL, "bf16"), ((512, 64, 32, 32), CL, "bf16"),
    ((256, 512, 7, 7), CL, "bf16"), ((128, 512, 28, 28), CL, "bf16"),
    ((256, 1024, 14, 14), CL, "bf16"), ((256, 2048, 7, 7), CL, "bf16"),
    ((128, 16, 32, 32), CL, "bf16"), ((256, 64, 56, 56), "NCHW", "bf16"),
    ((256, 64, 56, 56), CL, "fp16"), ((128, 64, 56, 56), CL, "fp32"),
    ((1024, 16, 32, 32), CL, "bf16"), ((256, 128, 28, 28), CL, "bf16"),
    ((512, 64, 8, 8), CL, "bf16"), ((512, 512, 4, 4), CL, "bf16"),
    ((256, 32, 16, 16), CL, "bf16"), ((32, 64, 56, 56), CL, "bf16"),
    ((32, 2048, 7, 7), CL, "bf16"), ((256, 512, 7, 7), "NCHW", "bf16"),
    ((128, 64, 32, 32), "NCHW", "fp32"),
)  # fmt: skip
GPU_QUICK = (
    ((8, 16, 12, 12), CL, "bf16"), ((8, 16, 12, 12), "NCHW", "fp32"), ((8, 24, 7, 7), CL, "fp16"),
)  # fmt: skip


# (name, dtype, torch.set_float32_matmul_precision's value)
MATMULS = (
    ("bfloat16", torch.bfloat16, "highest"),
    ("float16", torch.float16, "highest"),
    ("float32 TF32", torch.float32, "high"),
    ("float32", torch.float32, "highest"),
)


# --- peaks


def _row(workload: str, shape: list[int], dtype: str, ms: list[float], **fields) -> dict:
    median, p20, p80 = spread(ms)
    return {
        **NOTHING, "suite": "peaks", "workload": workload, "shape": shape, "dtype": dtype,
        "layout": "contiguous", "rival": "eager", "direction": "forward", "rounds": len(ms),
        "median_ms": median, "p20_ms": p20, "p80_ms": p80, "speedup_over": {}, **fields,
    }  # fmt: skip


def peaks(device: str, rounds: int, quick: bool) -> list[dict]:
    """A copy of 1 GiB, and products of square matrices of random numbers."""
    megabytes, n = (16, 128) if quick else (1024, 8192)
    size = 2 * megabytes * 2**20  # read and written
    ms = [size / copy_gbps(device, megabytes) / 1e6 for _ in range(rounds)]
    gbps = size / spread(ms)[0] / 1e6
    fields = {"bytes": size, "gbps": gbps, "copy_gbps": gbps, "percent_of_copy": 100.0}
    out = [_row(f"copy {megabytes} MiB", [size // 8], "float32", ms, **fields)]
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in MATMULS:
        torch.set_float32_matmul_precision(precision)
        ms = repeated_ms(product(device, n, dtype), device, rounds)
        what = f"matmul {n}x{n}x{n} {name}"
        dtype_name = str(dtype).removeprefix("torch.")
        out.append(_row(what, [n, n, n], dtype_name, ms, tflops=tflops(n, spread(ms)[0])))
    torch.set_float32_matmul_precision(before)
    return out


def peaks_report(rows: list[dict]) -> list[str]:
    shown = [
        f"{row['workload']} {row['gbps']:.0f} GB/s"
        if row["gbps"] is not None
        else f"{row['workload']} {row['tflops']:.0f} TFLOP/s"
        for row in rows
    ]
    return [f"Measured peaks: {'; '.join(shown)}.", caption(rows)]


# --- bn_act


@dataclass(frozen=True)
class OpWorkload(TrainingWorkload):
    def program(self, call: Callable[..., Tensor], v: dict[str, Tensor]) -> TensorProgram:
        """``call(x, norm, residual)`` on the values ``v``."""
        v = place(v, self.layout or "NCHW")
        state = {name: v[name] for name in ("running_mean", "running_var")}
        wrt = {name: v[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
        norm = Norm(*state.values(), v["weight"], v["bias"], training=True)
        forward = partial(call, v["x"], norm, v["residual"])
        inputs = *wrt.values(), *state.values()
        return TensorProgram(forward, self.directions, wrt, state, v["dy"], inputs)

    def values(self, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        n, c, h, w = self.shape
        v = {name: normal(n, c, h, w).to(self.dtype) for name in ("x", "dy", "residual")}
        v |= {"weight": 1 + 0.2 * normal(c), "bias": 0.2 * normal(c)}
        v["running_mean"] = torch.zeros(c, device=device)
        v["running_var"] = torch.ones(c, device=device)
        if self.dtype == torch.float32:
            separate(v["residual"], v, self._relu_input)
        return v

    def _relu_input(self, v: dict[str, Tensor]) -> list[Tensor]:
        return [self.program(partial(reference.bn_act, act="none"), v).forward()]

    def exact(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.program(reference.bn_act, double(v)).result()

    def eager(self, layout: str) -> Build:
        return partial(self.program, reference.bn_act)

    def compiled(self, options: dict) -> Build:
        return lambda v: self.program(torch.compile(reference.bn_act, **options), v)

    def fused(self, backend: str) -> Build:
        def call(x: Tensor, norm: Norm, residual: Tensor) -> Tensor:
            return bn_act(x, *norm, residual=residual, backend=backend)

        return partial(self.program, call)

    def moved_bytes(self, direction: str) -> int:
        forward, backward = bn_act_bytes(torch.Size(self.shape).numel(), self.dtype)
        return forward + backward * (direction == STEP)


def bn_act_bytes(numbers: int, dtype: torch.dtype) -> tuple[int, int]:
    """What a forward and a backward in training move at least.

    Statistics need a pass of their own: x is read twice forward, x and dy backward.
    """
    size, mask = dtype.itemsize * numbers, numbers // 8
    # x, x, residual -> y, mask; dy, x, mask; dy, x, mask -> dx, dresidual
    return 4 * size + mask, 6 * size + 2 * mask


def op(shape: tuple[int, int, int, int], layout: str, dtype: str = "") -> OpWorkload:
    """dtype: in the name too; default: float32."""
    name = f"bn_act {'x'.join(map(str, shape))} {layout} {dtype}".strip()
    return OpWorkload("ops", name, shape, layout, DTYPES[dtype or "fp32"])


def workloads(gpu: bool, quick: bool) -> list[OpWorkload]:
    if gpu:
        return [op(*args) for args in (GPU_QUICK if quick else GPU_SHAPES)]
    return [
        op(shape, layout)
        for layout in FORMATS
        for shape in ([(8, 16, 12, 12)] if quick else SHAPES)
    ]


INTRO = (
    "BatchNorm + residual add + ReLU in training ({candidate}): speed-up over eager PyTorch in the "
    "same layout and over torch.compile, and the share of the measured copy bandwidth that a step "
    "(forward and backward) reaches."
)
SPEED = [
    over("forward over PyTorch", "eager", direction="forward"),
    over("step over PyTorch", "eager", direction=STEP),
    over("step over torch.compile", COMPILED, direction=STEP),
]
BYTES = [
    figure("step, ms", "median_ms", direction=STEP),
    figure("% of copy", "percent_of_copy", direction=STEP),
]
IN_GRAPHS = over("both in CUDA graphs", "eager-graphed", direction=STEP, graphed=True)
REPORT = Table("BatchNorm, add and ReLU in training", INTRO, "tensor", SPEED + BYTES)
GPU_REPORT = Table(
    "BatchNorm, add and ReLU in training on a GPU", INTRO, "tensor", [*SPEED, IN_GRAPHS, *BYTES]
)


def targets(rows: list[dict]) -> list[tuple[bool, str]]:
    ops, out = Lookup(rows), []
    for candidate, allocator in ops.pairs:
        for layout, least in ("NCHW", 2.0), (CL, 1.6):
            names = [w for w in ops.workloads if w.endswith(f" {layout}")]
            eager, compiled = (
                ops.speedups(names, candidate, STEP, allocator, base)
                for base in ("eager", "compile")
            )
            what = f"{candidate}, allocator {allocator}: bn_act {layout} forward+backward over"
            out += claims(
                (f"{what} eager", eager, least, 5, 6),
                (f"{what} eager", eager, 1.25, 6, 6),
                (f"{what} torch.compile", compiled, 1.3, 6, 6),
            )
    return out


def timings(rows: list[dict]) -> list[dict]:
    """A training step of each tensor by backend."""
    found: dict[str, dict] = {}
    for row in rows:
        backend = row["rival"].removeprefix(FUSED)
        if row["direction"] != STEP or row["refused"] or backend not in BACKENDS:
            continue
        fields = {**on_device(row), "op": "bn_act", "shape": row["shape"], "ms": {}}
        found.setdefault(row["workload"], fields)["ms"][backend] = row["median_ms"]
    return list(found.values())


SUITES = (
    Suite("peaks", 0, rows=peaks, gpu_report=peaks_report),
    Suite("ops", 10, workloads, report=REPORT, gpu_report=GPU_REPORT, targets=targets,
          timings=timings, plot=Plot("bn_act, forward + backward", (STEP,), bandwidth=True)),
)  # fmt: skip
