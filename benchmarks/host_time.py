"""Host time of dispatch, in microseconds a call, on blocks so small that nothing else counts.

    python benchmarks/host_time.py

First: a fused block that PyTorch's ops run (float64, and backend ``eager``), over the same block
never fused. Then: backend ``auto`` over backend ``cpu``. One thread; the two take turns; medians of
the differences and ratios.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import fused_res
from fused_res.reference import ResBlock

ROUNDS, CALLS = 600, 4
KINDS: dict[str, Callable[[], ResBlock]] = {
    "basic": lambda: ResBlock(16, 16),
    "bottleneck": lambda: ResBlock(16, 16, kind="bottleneck"),
    "projection": lambda: ResBlock(16, 32, 2),
    "single": lambda: ResBlock(16, 16, kind="single"),
    "concat": lambda: ResBlock(16, 16, skip="concat"),
}


def microseconds(block: nn.Module, x: torch.Tensor, backend: str) -> float:
    """Of a training step, or of a forward pass in eval mode without gradients."""
    context = contextlib.nullcontext() if backend == "auto" else fused_res.backend(backend)
    with context, torch.set_grad_enabled(block.training):
        start = time.perf_counter()
        for _ in range(CALLS):
            y = block(x)
            if block.training:
                y.sum().backward()
        return (time.perf_counter() - start) / CALLS * 1e6


def in_turns(first: Callable[[], float], second: Callable[[], float]) -> list[tuple[float, float]]:
    for _ in range(20):
        first(), second()
    pairs = []
    for turn in range(ROUNDS):
        if turn % 2:
            a, b = first(), second()
        else:
            b, a = second(), first()
        pairs.append((a, b))
    return pairs


def compare(kind: str, training: bool, dtype: torch.dtype, backend: str) -> str:
    """A line: never fused against fused; with backend ``cpu``: that against ``auto``."""
    torch.manual_seed(0)
    plain = KINDS[kind]().train(training).to(dtype, memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind]()).train(training)
    fused_res.fuse_(model.to(dtype, memory_format=torch.channels_last))
    fused = model[0]
    x = torch.randn(1, 16, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    first = fused if backend == "cpu" else plain
    second = "auto" if backend == "cpu" else backend
    pairs = in_turns(
        lambda: microseconds(first, x, backend), lambda: microseconds(fused, x, second)
    )
    more = statistics.median(b - a for a, b in pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    base = statistics.median(a for a, _ in pairs)
    what = f"{kind:11} {'training' if training else 'eval':9}"
    return f"{what} {base:7.1f} us, {more:+5.1f} us, ratio {ratio:.3f}"


def main() -> None:
    torch.set_num_threads(1)
    gc.disable()
    for title, dtype, backend in (
        ("left to PyTorch: float64, over never fused", torch.float64, "auto"),
        ("left to PyTorch: backend eager, over never fused", torch.float32, "eager"),
        ("fused: auto over backend cpu", torch.float32, "cpu"),
    ):
        print(title)
        for kind in KINDS:
            for training in (True, False):
                print("  " + compare(kind, training, dtype, backend), flush=True)


if __name__ == "__main__":
    main()
