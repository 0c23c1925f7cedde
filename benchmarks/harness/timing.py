"""Clocks, a rotation of candidates, and the peaks that results are held against."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

PAUSE = 0.05  # seconds


class Rounds(NamedTuple):
    """One value per round, of one candidate."""

    ms: list[float]
    page_faults: list[float]


def repeat_ms(call: Callable[[], object], times: int, device: str) -> float:
    """Milliseconds of ``times`` calls, on the device's own clock."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return 1e3 * (time.perf_counter() - begin)


def rotate(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    least_ms: float = 20.0,
    settle: bool = False,
) -> dict[str, Rounds]:
    """Times the calls A B C A B C ..., ``least_ms`` or longer each: ms and faults a call.

    What else the machine does hits all of a round alike, so ratios are taken round by round.

    Args:
        settle: every turn begins with a pause, in which the threads of another runtime, which had
            the turn before, stop spinning, and with a call that is not timed where it is short.
    """
    times, short, first = {}, set(), 1
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        first = 3  # torch.compile's CUDA graphs are replayed from the third call on
    for name, call in calls.items():
        repeat_ms(call, first, device)
        ms = repeat_ms(call, 1, device)
        times[name] = max(1, round(0.5 + least_ms / max(ms, 1e-4)))
        if ms < 100:
            short.add(name)
    out = {name: Rounds([], []) for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if settle:
                time.sleep(PAUSE)
                if name in short:
                    call()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            out[name].ms.append(repeat_ms(call, times[name], device) / times[name])
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            out[name].page_faults.append(faults / times[name])
    return out


class DeviceClock:
    """A timer for pytest-benchmark: seconds on the GPU's clock, so that the time until the last
    kernel is done is measured and not how long the host takes to launch it."""

    def __init__(self) -> None:
        self.seconds, self.last = 0.0, self._event()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event

    def __call__(self) -> float:
        event = self._event()
        # from one call to the next: far from its origin a float32 of milliseconds is too coarse
        self.seconds += 1e-3 * self.last.elapsed_time(event)
        self.last = event
        return self.seconds


def copy_gbps(device: str, megabytes: int = 256, rounds: int = 5) -> float:
    """GB/s, read and written, of one large tensor copied to another."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.zeros_like(source)
    times = [repeat_ms(lambda: target.copy_(source), 1, device) for _ in range(rounds + 1)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    q = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double())
    return tuple(q.tolist())


def repeated_ms(
    call: Callable[[], torch.Tensor], device: str, rounds: int, times: int = 3
) -> list[float]:
    """Milliseconds of a call, a value a round."""
    repeat_ms(call, times, device)  # cuBLAS, MKL or oneDNN loads and chooses its kernel
    return [repeat_ms(call, times, device) / times for _ in range(rounds)]


def product(device: str, n: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Of square matrices of random numbers."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def tflops(n: int, ms: float) -> float:
    return 2 * n**3 / ms / 1e9


def peak_tflops(device: str, n: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """Rate of a product of matrices, on a CPU as a 1x1 convolution where that is faster.

    On an AMD processor it is, by a fifth: PyTorch has the one from MKL, the other from oneDNN.
    """
    calls = [product(device, n, dtype)]
    if torch.device(device).type == "cpu":
        x, weight = torch.randn(1, n, 32, n // 32), torch.randn(n, n, 1, 1)
        to = partial(torch.Tensor.to, dtype=dtype, memory_format=torch.channels_last)
        calls.append(partial(F.conv2d, to(x), to(weight)))
    return max(tflops(n, min(repeated_ms(call, device, rounds))) for call in calls)
