"""What the device can do at most: the bandwidth of a copy, the rate of a matrix product."""

from __future__ import annotations

import torch
from timing import copy_gbps, repeat_ms, spread

# (name, dtype, torch.set_float32_matmul_precision's value)
MATMULS = (
    ("bfloat16", torch.bfloat16, "highest"),
    ("float16", torch.float16, "highest"),
    ("float32 TF32", torch.float32, "high"),
    ("float32", torch.float32, "highest"),
)


def _row(workload: str, shape: list[int], dtype: str, rounds: int, ms: list[float], **fields):
    median, p20, p80 = spread(ms)
    empty = dict.fromkeys(
        ("bytes", "gbps", "percent_of_copy", "copy_gbps", "page_faults", "rms_error")
    )
    return {
        "suite": "peaks",
        "workload": workload,
        "shape": shape,
        "dtype": dtype,
        "layout": "contiguous",
        "rival": "eager",
        "direction": "forward",
        "rounds": rounds,
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "speedup_over": {},
        **empty,
        "error_over_eager": None,
        "refused": None,
        **fields,
    }


def measure(device: str, rounds: int, quick: bool) -> list[dict]:
    """Rows without environment: a copy of 1 GiB, and products of square matrices, random data."""
    megabytes, n = (16, 128) if quick else (1024, 8192)
    rates = [copy_gbps(device, megabytes) for _ in range(rounds)]
    size = 2 * megabytes * 2**20  # read and written
    ms = [size / rate / 1e6 for rate in rates]
    gbps = size / spread(ms)[0] / 1e6
    fields = {"bytes": size, "gbps": gbps, "copy_gbps": gbps, "percent_of_copy": 100.0}
    rows = [_row(f"copy {megabytes} MiB", [size // 8], "float32", rounds, ms, **fields)]
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in MATMULS:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = 3

        def product(a=a, b=b, out=out) -> torch.Tensor:
            return torch.mm(a, b, out=out)

        repeat_ms(product, times, device)  # cuBLAS loads and chooses its kernel
        ms = [repeat_ms(product, times, device) / times for _ in range(rounds)]
        tflops = 2 * n**3 / spread(ms)[0] / 1e9
        what = f"matmul {n}x{n}x{n} {name}"
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append(_row(what, [n, n, n], dtype_name, rounds, ms, tflops=tflops))
    torch.set_float32_matmul_precision(before)
    return rows
