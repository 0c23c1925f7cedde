"""What the device can do at most: the bandwidth of a copy, the rate of a matrix product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rows import NOTHING
from timing import copy_gbps, repeat_ms, spread

# (name, dtype, torch.set_float32_matmul_precision's value)
MATMULS = (
    ("bfloat16", torch.bfloat16, "highest"),
    ("float16", torch.float16, "highest"),
    ("float32 TF32", torch.float32, "high"),
    ("float32", torch.float32, "highest"),
)


def _ms(call: Callable[[], torch.Tensor], device: str, rounds: int, times: int = 3) -> list[float]:
    """Milliseconds of a call, a value a round."""
    repeat_ms(call, times, device)  # the library loads and chooses its kernel
    return [repeat_ms(call, times, device) / times for _ in range(rounds)]


def _product(device: str, n: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Of square matrices of random numbers."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _tflops(n: int, ms: list[float]) -> float:
    return 2 * n**3 / spread(ms)[0] / 1e9


def peak_tflops(device: str, n: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """Rate of a product of matrices, on a CPU as a 1x1 convolution where that is faster.

    On an AMD processor it is, by a fifth: PyTorch has the one from MKL, the other from oneDNN.
    """
    calls = [_product(device, n, dtype)]
    if torch.device(device).type == "cpu":
        x, weight = torch.randn(1, n, 32, n // 32), torch.randn(n, n, 1, 1)
        to = partial(torch.Tensor.to, dtype=dtype, memory_format=torch.channels_last)
        calls.append(partial(F.conv2d, to(x), to(weight)))
    return max(_tflops(n, [min(_ms(call, device, rounds))]) for call in calls)


def _row(workload: str, shape: list[int], dtype: str, rounds: int, ms: list[float], **fields):
    median, p20, p80 = spread(ms)
    return {
        **NOTHING,
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
        ms = _ms(_product(device, n, dtype), device, rounds)
        what = f"matmul {n}x{n}x{n} {name}"
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append(_row(what, [n, n, n], dtype_name, rounds, ms, tflops=_tflops(n, ms)))
    torch.set_float32_matmul_precision(before)
    return rows
