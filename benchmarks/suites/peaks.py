"""What a GPU can do at most: the bandwidth of a copy, the rate of a product of matrices."""

from __future__ import annotations

import torch
from harness.rows import NOTHING
from harness.suite import Suite
from harness.timing import copy_gbps, product, repeated_ms, spread, tflops
from report.tables import caption

# (name, dtype, torch.set_float32_matmul_precision's value)
MATMULS = (
    ("bfloat16", torch.bfloat16, "highest"),
    ("float16", torch.float16, "highest"),
    ("float32 TF32", torch.float32, "high"),
    ("float32", torch.float32, "highest"),
)


def _row(workload: str, shape: list[int], dtype: str, ms: list[float], **fields) -> dict:
    median, p20, p80 = spread(ms)
    return {
        **NOTHING, "suite": "peaks", "workload": workload, "shape": shape, "dtype": dtype,
        "layout": "contiguous", "rival": "eager", "direction": "forward", "rounds": len(ms),
        "median_ms": median, "p20_ms": p20, "p80_ms": p80, "speedup_over": {}, **fields,
    }  # fmt: skip


def rows(device: str, rounds: int, quick: bool) -> list[dict]:
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


def report(rows: list[dict]) -> list[str]:
    shown = [
        f"{row['workload']} {row['gbps']:.0f} GB/s"
        if row["gbps"] is not None
        else f"{row['workload']} {row['tflops']:.0f} TFLOP/s"
        for row in rows
    ]
    return [f"Measured peaks: {'; '.join(shown)}.", caption(rows)]


SUITES = (Suite("peaks", 0, rows=rows, gpu_report=report),)
