"""One workload: every candidate is built, held against float64, and timed in turn with others; the
clocks, the peaks that results are held against, and the roofline."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .program import Program, compare, compare_net, over_eager, rms
from .rows import NOTHING, OUT_OF_TIME
from .suite import Candidate, Kernel, Workload

PAUSE = 0.05  # seconds


class Deadline:
    """When to stop; never, by default."""

    def __init__(self, end: float = math.inf) -> None:
        self.end = end

    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, fraction: float) -> Deadline:
        return Deadline(time.monotonic() + fraction * max(self.left(), 0.0))


class WrongResult(Exception):
    """The error is over what the candidate may have."""


class Measurement:
    """What is known of a workload's candidates so far, by label; ``rows`` makes rows of it."""

    def __init__(
        self, workload: Workload, candidates: list[Candidate], device: str, rounds: int
    ) -> None:
        self.workload, self.device, self.rounds = workload, device, rounds
        self.by_label = {candidate.label: candidate for candidate in candidates}
        self.cuda = torch.device(device).type == "cuda"
        self.refused: dict[str, str] = {}
        self.quality: dict[str, tuple[float, float]] = {}
        self.timed: dict[str, dict[str, Rounds]] = {d: {} for d in workload.directions}
        self.copy: dict[str, float] = {}
        self.peak_tflops: float | None = None
        self.peak: dict[str, float | None] = {}
        self.saved: dict[str, int] = {}
        self.eager: dict = {}
        self.values = self.exact = None

    def prepare(self) -> None:
        self.values = self.workload.values(self.device)
        # cuDNN's float64 convolutions are few and may be slow; ATen's are matrix products
        before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
        try:
            self.exact = self.workload.exact(self.values)
        finally:
            torch.backends.cudnn.enabled = before

    def build(self, candidate: Candidate) -> Program | None:
        """The candidate, warm, or None where it raises or is wrong."""
        try:
            return self.checked(candidate)
        except Exception as error:  # one that breaks must not take the others' rows with it
            self.refused[candidate.label] = reason(error)
            return None

    def checked(self, candidate: Candidate) -> Program:
        """The candidate, warm and right.

        Raises:
            WrongResult: it is not.
            Exception: what building or calling it raises.
        """
        if self.values is None:
            self.prepare()
        program = candidate.build(self.values)
        self.peak[candidate.label] = self._warm_up(program, candidate)
        self._mark_step()
        compared = compare_net if self.workload.net else compare
        found, floor = compared(self.workload.dtype, program.result(), self.exact)
        if candidate.name == "eager":
            self.eager = {key: max(e, self.eager.get(key, 0.0)) for key, e in found.items()}
        ratio, where = over_eager(found, self.eager, floor)
        relative = found["y", "rms"] / rms(self.exact["y"])
        self.quality[candidate.label] = relative, ratio
        if not (ratio <= candidate.slack or relative <= candidate.bound):
            raise WrongResult(
                f"wrong result: error of {where} is {ratio:.3g}x eager's, over {candidate.slack}x"
            )
        return program

    def _warm_up(self, program: Program, candidate: Candidate) -> float | None:
        """Compiles, tunes and captures, so that the step that is checked is a warm one.

        Returns the peak of the memory that a step takes, in MiB: above the parameters, the
        optimizer's state and the inputs. The first step does not count, in which cuDNN tries its
        algorithms. Nor do replays of a graph, whose memory is taken while it is captured.
        """
        self._mark_step()
        program.run()
        program.release()
        counted = self.cuda and self.workload.whole_net
        if counted:
            free(self.device)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        if candidate.graphed:
            program.capture(self.device)
        # torch.compile's CUDA graphs are recorded in the second call and replayed from the third
        for _ in range(3 if self.cuda else 1):
            self._mark_step()
            program.run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 if counted else None

    def _mark_step(self) -> None:
        if self.cuda:
            torch.compiler.cudagraph_mark_step_begin()

    def time(self, built: dict[str, Program], least_ms: float, memory: bool) -> None:
        """Times what was built; where one raises, none of them has a time."""
        try:
            self._time(built, least_ms, memory)
        except Exception as error:
            for label in built:
                self.refused[label] = reason(error)
                for timed in self.timed.values():
                    timed.pop(label, None)

    def _time(self, built: dict[str, Program], least_ms: float, memory: bool) -> None:
        workload = self.workload
        for direction in workload.directions:
            if direction not in self.copy and workload.moved_bytes(direction) is not None:
                megabytes = 16 if least_ms < 10 else 1024 if self.cuda else 256
                self.copy[direction] = copy_gbps(self.device, megabytes)
            if workload.kernels() and self.peak_tflops is None:
                n = 128 if least_ms < 10 else 8192 if self.cuda else 1024
                self.peak_tflops = peak_tflops(self.device, n, workload.dtype)
            calls = {label: self.stepper(label, one, direction) for label, one in built.items()}
            timed = rotate(calls, self.rounds, self.device, least_ms, workload.settles)
            self.timed[direction].update(timed)
        if memory and workload.counts_saved and workload.training:
            self.saved = {
                label: program.saved_bytes()
                for label, program in built.items()
                # AOTAutograd recompiles under saved-tensor hooks
                if not (self.by_label[label].compiled or self.by_label[label].graphed)
            }

    def stepper(self, label: str, program: Program, direction: str) -> Callable[[], object]:
        """What is timed: for a CUDA graph's sake told that the last outputs may be written."""
        call = program.calls[direction]
        if not (self.cuda and self.by_label[label].compiled):
            return call

        def marked() -> object:
            torch.compiler.cudagraph_mark_step_begin()
            return call()

        return marked

    # --- rows

    def rows(self) -> list[dict]:
        """A row for every direction of every candidate timed or refused; no environment."""
        baselines = [label for label, one in self.by_label.items() if not one.fused]
        out = []
        for direction, timed in self.timed.items():
            for label in self.by_label:
                if label in timed:
                    out.append(self._timed_row(label, direction, baselines))
                elif label in self.refused:
                    out.append(self._row(label, direction))
        for label, count in self.saved.items():
            over = {b: self.saved[b] / count for b in baselines if b != label and b in self.saved}
            out.append(self._row(label, "saved", rounds=0, bytes=count, speedup_over=over))
        return out

    def _row(self, label: str, direction: str, **fields: object) -> dict:
        candidate, workload = self.by_label[label], self.workload
        error, ratio = self.quality.get(label, (None, None))
        return {
            **NOTHING, "suite": workload.suite, "workload": workload.name,
            "shape": list(workload.shape), "dtype": str(workload.dtype).removeprefix("torch."),
            "layout": candidate.layout, "rival": candidate.name, "direction": direction,
            "rounds": self.rounds, "speedup_over": {}, "rms_error": _finite(error),
            "error_over_eager": _finite(ratio), "refused": self.refused.get(label),
            **workload.described(candidate), **fields,
        }  # fmt: skip

    def _timed_row(self, label: str, direction: str, baselines: list[str]) -> dict:
        timed = self.timed[direction]
        median, p20, p80 = spread(timed[label].ms)
        fields: dict[str, object] = {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
        fields["page_faults"] = statistics.median(timed[label].page_faults)
        fields["speedup_over"] = {
            base: statistics.median(
                b / own for b, own in zip(timed[base].ms, timed[label].ms, strict=True)
            )
            for base in baselines
            if base != label and base in timed
        }
        workload, kernels = self.workload, self.workload.kernels()
        size = workload.moved_bytes(direction)
        if workload.whole_net or kernels:
            fields["images_per_s"] = 1e3 * workload.shape[0] / median
        if workload.whole_net:
            fields["peak_mib"] = self.peak[label]
        if size is not None:
            gbps, copy = size / median / 1e6, self.copy[direction]
            share = 100 * gbps / copy
            fields |= {"bytes": size, "gbps": gbps, "percent_of_copy": share, "copy_gbps": copy}
        if kernels:
            bound = bound_ms(kernels, self.peak_tflops, self.copy[direction])
            fields |= {
                "tflops": flops(kernels) / median / 1e9,
                "peak_tflops": self.peak_tflops,
                "percent_of_roofline": 100 * bound / median,
            }
        return self._row(label, direction, **fields)


def measure(
    workload: Workload,
    candidates: list[Candidate],
    device: str = "cpu",
    rounds: int = 15,
    least_ms: float = 20.0,
    memory: bool = True,
    deadline: Deadline | None = None,
    share: Deadline | None = None,
    progress: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Checks every candidate, times those that are right, and returns rows without environment.

    The candidates called ``eager`` set the error that the others are allowed a multiple of. Those
    of a net run one after the other on a GPU and not in turns: their graphs together would not fit
    in its memory, and their peaks of memory could not be told apart.

    Args:
        memory: count what blocks save for backward.
        deadline: those that cannot be built before it are refused, "out of time".
        share: when this workload's share of the time is over; only those of the core begin later.
        progress: called with the rows so far whenever some were timed.
    """
    deadline = deadline or Deadline()
    share = share or deadline
    m = Measurement(workload, candidates, device, min(rounds, workload.most_rounds or rounds))
    alone = workload.alone
    for group in [[one] for one in candidates] if alone else [candidates]:
        built: dict[str, Program] = {}
        for candidate in group:
            late = share.left() <= 0 and not candidate.core
            if late or deadline.left() < candidate.seconds:
                m.refused[candidate.label] = OUT_OF_TIME
                continue
            program = m.build(candidate)
            if program is not None:
                built[candidate.label] = program
        program = None
        if not alone:
            m.exact = None
            free(device)
        if built:
            m.time(built, least_ms, memory)
            built.clear()
        if alone:
            # what torch.compile keeps, and the graphs with it, would be the next one's burden
            if group[0].compiled:
                torch.compiler.reset()
            free(device)
        progress(m.rows())
    return m.rows()


def free(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, WrongResult) else f"{type(error).__name__}: {text}"


def _finite(number: float | None) -> float | None:
    """JSON has no NaN and no infinity; ``refused`` says what happened."""
    return number if number is not None and math.isfinite(number) else None


# --- clocks and peaks


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
    times = repeated_ms(lambda: target.copy_(source), device, rounds, times=1)
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


# --- the roofline


def flops(kernels: Iterable[Kernel]) -> int:
    return sum(kernel.flops for kernel in kernels)


def bound_ms(kernels: Iterable[Kernel], tflops: float, gbps: float) -> float:
    """Milliseconds of the kernels, each as long as the slower of its arithmetic and its bytes."""
    return sum(max(k.flops / tflops / 1e9, k.bytes / gbps / 1e6) for k in kernels)
