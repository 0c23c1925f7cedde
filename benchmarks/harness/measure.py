"""One workload: every rival is built, held against float64, and timed in turn with the others."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable

import convs
import nets
import programs
import roofline
import torch
import training_convs
from peaks import peak_tflops
from programs import Program
from rivals import Rival
from rows import OUT_OF_TIME
from timing import Rounds, copy_gbps, rotate, spread
from torch import Tensor
from workloads import Workload, ideal_bytes

HALVES = (torch.bfloat16, torch.float16)
UNCOUNTED = ("nets", "parts")  # suites of which no bytes are counted


class Deadline:
    """When to stop; never, by default."""

    def __init__(self, end: float = math.inf) -> None:
        self.end = end

    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, fraction: float) -> Deadline:
        return Deadline(time.monotonic() + fraction * max(self.left(), 0.0))


# --- correctness


def errors(result: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """Largest and RMS error of every tensor.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if set(result) != set(exact):
        raise ValueError(f"returned {sorted(result)} instead of {sorted(exact)}")
    out = {}
    for name, e in exact.items():
        if result[name].shape != e.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}, not {tuple(e.shape)}")
        off = result[name].double() - e
        out[name, "largest"] = float(off.abs().max())
        out[name, "rms"] = rms(off)
    return out


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def half_ulp(size: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of numbers of that size: rounding alone errs so."""
    if not 0 < size < math.inf:
        return 0.0
    return torch.finfo(dtype).eps / 2 * 2.0 ** math.floor(math.log2(size))


def compare(
    workload: Workload, result: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """The errors that count, and the least that each is taken for: half an ulp.

    In 16 bits only RMS errors do, with half an ulp of the RMS: of millions of ReLU inputs some
    round to the other side of zero, and the largest error tells of that chance alone. Of a net's
    many gradients the one with the median error, relative to its size, does.
    """
    found = errors(result, exact)
    size = rms if workload.dtype in HALVES else lambda e: float(e.abs().max())
    floor = {name: half_ulp(size(e), workload.dtype) for name, e in exact.items()}
    if workload.dtype in HALVES:
        found = {key: error for key, error in found.items() if key[1] == "rms"}
    if workload.net:
        sizes = {name: rms(e) for name, e in exact.items() if name != "y"}
        relative = [found[name, "rms"] / size for name, size in sizes.items() if size]
        found = {("y", "rms"): found["y", "rms"]}
        if relative:
            found["gradients", "rms"] = statistics.median(relative)
            floor["gradients"] = torch.finfo(workload.dtype).eps / 2
    return found, floor


def over_eager(found: dict, eager: dict, floor: dict[str, float]) -> tuple[float, str]:
    """The worst error over eager's own, which counts for half an ulp at least; and of what."""
    ratios = {
        key: error / max(eager.get(key, 0.0), floor[key[0]], 1e-300) for key, error in found.items()
    }
    worst = max(ratios, key=lambda key: (math.isnan(ratios[key]), ratios[key]))
    return ratios[worst], f"{worst[0]}, {worst[1]}"


def exact_result(workload: Workload, v: object) -> dict[str, Tensor]:
    """What the reference computes in float64."""
    # cuDNN's float64 convolutions are few and may be slow; PyTorch's own are matrix products
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        if workload.net:
            return nets.exact_result(workload, v)
        if workload.conv:
            return convs.ConvProgram(convs.eager, workload, programs.double(v)).result()
        if workload.call:
            return training_convs.exact_result(workload, v)
        return programs.exact_program(workload, v).result()
    finally:
        torch.backends.cudnn.enabled = before


# --- one workload


class Measurement:
    """What is known of a workload's rivals so far, by label; ``rows`` makes rows of it."""

    def __init__(
        self, workload: Workload, candidates: list[Rival], device: str, rounds: int
    ) -> None:
        self.workload, self.device, self.rounds = workload, device, rounds
        self.by_label = {rival.label: rival for rival in candidates}
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
        source = nets if self.workload.net else convs if self.workload.conv else programs
        source = training_convs if self.workload.call else source
        self.values = source.values(self.workload, self.device)
        self.exact = exact_result(self.workload, self.values)

    def build(self, rival: Rival) -> Program | None:
        """The rival, warm, or None where it raises or is wrong."""
        try:
            if self.values is None:
                self.prepare()
            program = rival.build(self.workload, self.values)
            self.peak[rival.label] = self._warm_up(program, rival)
            self._mark_step()
            found, floor = compare(self.workload, program.result(), self.exact)
        except Exception as error:  # a rival that breaks must not take the others' rows with it
            self.refused[rival.label] = reason(error)
            return None
        if rival.name == "eager":
            self.eager = {key: max(e, self.eager.get(key, 0.0)) for key, e in found.items()}
        ratio, where = over_eager(found, self.eager, floor)
        relative = found["y", "rms"] / rms(self.exact["y"])
        self.quality[rival.label] = relative, ratio
        if not (ratio <= rival.slack or relative <= rival.bound):
            self.refused[rival.label] = (
                f"wrong result: error of {where} is {ratio:.3g}x eager's, over {rival.slack}x"
            )
            return None
        return program

    def _warm_up(self, program: Program, rival: Rival) -> float | None:
        """Compiles, tunes and captures, so that the step that is checked is a warm one.

        Returns the peak of the memory that a step takes, in MiB: above the parameters, the
        optimizer's state and the inputs. The first step does not count, in which cuDNN tries its
        algorithms. Nor do replays of a graph, whose memory is taken while it is captured.
        """
        self._mark_step()
        program.run()
        program.release()
        measured = self.cuda and self.workload.suite == "nets"
        if measured:
            free(self.device)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        if rival.graphed:
            program.capture(self.device)
        # torch.compile's CUDA graphs are recorded in the second call and replayed from the third
        for _ in range(3 if self.cuda else 1):
            self._mark_step()
            program.run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 if measured else None

    def _mark_step(self) -> None:
        if self.cuda:
            torch.compiler.cudagraph_mark_step_begin()

    def time(self, built: dict[str, Program], least_ms: float, memory: bool) -> None:
        """Times what was built; where one raises, none of them has a time."""
        try:
            self._time(built, least_ms, memory)
        except Exception as error:
            self.refused.update(dict.fromkeys(built, reason(error)))
            for timed in self.timed.values():
                for label in built:
                    timed.pop(label, None)

    def _time(self, built: dict[str, Program], least_ms: float, memory: bool) -> None:
        for direction in self.workload.directions:
            if self.workload.suite not in UNCOUNTED and direction not in self.copy:
                megabytes = 16 if least_ms < 10 else 1024 if self.cuda else 256
                self.copy[direction] = copy_gbps(self.device, megabytes)
            if self.workload.inference and self.peak_tflops is None:
                n = 128 if least_ms < 10 else 8192 if self.cuda else 1024
                self.peak_tflops = peak_tflops(self.device, n, self.workload.dtype)
            calls = {
                label: self._stepper(self.by_label[label], program.calls[direction])
                for label, program in built.items()
            }
            settle = self.workload.inference  # there are runtimes with threads of their own
            timed = rotate(calls, self.rounds, self.device, least_ms, settle)
            self.timed[direction].update(timed)
        if memory and self.workload.suite in ("blocks", "parts") and self.workload.training:
            self.saved = {
                label: program.saved_bytes()
                for label, program in built.items()
                # AOTAutograd recompiles under saved-tensor hooks
                if not (self.by_label[label].compiled or self.by_label[label].graphed)
            }

    def _stepper(self, rival: Rival, call: Callable[[], object]) -> Callable[[], object]:
        """``call``, for a CUDA graph's sake told that the last step's outputs may be written."""
        if not (self.cuda and rival.compiled):
            return call

        def marked() -> object:
            torch.compiler.cudagraph_mark_step_begin()
            return call()

        return marked

    # --- rows

    def rows(self) -> list[dict]:
        """A row for every direction of every rival that was timed or refused; no environment."""
        baselines = [label for label, rival in self.by_label.items() if not rival.ours]
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
        rival, workload = self.by_label[label], self.workload
        error, ratio = self.quality.get(label, (None, None))
        if workload.conv or workload.call:
            source = convs if workload.conv else training_convs
            config = rival.config and rival.config._asdict()
            fields |= {"call": source.described(workload), "config": config}
        return {
            "suite": workload.suite,
            "workload": workload.name,
            "shape": list(workload.shape),
            "dtype": str(workload.dtype).removeprefix("torch."),
            "layout": rival.layout,
            "rival": rival.name,
            "direction": direction,
            "rounds": self.rounds,
            "median_ms": None,
            "p20_ms": None,
            "p80_ms": None,
            "speedup_over": {},
            "bytes": None,
            "gbps": None,
            "percent_of_copy": None,
            "copy_gbps": None,
            "page_faults": None,
            "rms_error": _finite(error),
            "error_over_eager": _finite(ratio),
            "refused": self.refused.get(label),
            **fields,
        }

    def _timed_row(self, label: str, direction: str, baselines: list[str]) -> dict:
        timed = self.timed[direction]
        median, p20, p80 = spread(timed[label].ms)
        fields: dict[str, object] = {
            "median_ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "speedup_over": {
                base: statistics.median(
                    b / own for b, own in zip(timed[base].ms, timed[label].ms, strict=True)
                )
                for base in baselines
                if base != label and base in timed
            },
            "page_faults": statistics.median(timed[label].page_faults),
        }
        if self.workload.suite == "nets":
            fields["images_per_s"] = 1e3 * self.workload.shape[0] / median
            fields["peak_mib"] = self.peak[label]
        elif self.workload.suite not in UNCOUNTED:
            inference = self.workload.inference
            if inference:
                size = roofline.moved_bytes(self.workload)
            elif self.workload.call:
                size = training_convs.moved_bytes(self.workload)
            else:
                size = ideal_bytes(self.workload)[direction]
            gbps, copy = size / median / 1e6, self.copy[direction]
            fields |= {
                "bytes": size,
                "gbps": gbps,
                "percent_of_copy": 100 * gbps / copy,
                "copy_gbps": copy,
            }
            if inference:
                bound = roofline.bound_ms(self.workload, self.peak_tflops, copy)
                fields |= {
                    "images_per_s": 1e3 * self.workload.shape[0] / median,
                    "tflops": roofline.flops(self.workload) / median / 1e9,
                    "peak_tflops": self.peak_tflops,
                    "percent_of_roofline": 100 * bound / median,
                }
        return self._row(label, direction, **fields)


def measure(
    workload: Workload,
    candidates: list[Rival],
    device: str = "cpu",
    rounds: int = 15,
    least_ms: float = 20.0,
    memory: bool = True,
    deadline: Deadline | None = None,
    share: Deadline | None = None,
    progress: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Checks every candidate, times those that are right, and returns rows without environment.

    The candidates called ``eager`` set the error that the others are allowed a multiple of. The
    rivals of a net run one after the other on a GPU and not in turns: their graphs together would
    not fit in its memory, and their peaks of memory could not be told apart.

    Args:
        memory: count what blocks save for backward.
        deadline: rivals that cannot be built before it are refused, "out of time".
        share: when this workload's share of the time is over; only rivals of the core begin later.
        progress: called with the rows so far whenever rivals were timed.
    """
    deadline = deadline or Deadline()
    share = share or deadline
    m = Measurement(workload, candidates, device, min(rounds, workload.most_rounds or rounds))
    alone = workload.alone
    for group in [[rival] for rival in candidates] if alone else [candidates]:
        built: dict[str, Program] = {}
        for rival in group:
            late = share.left() <= 0 and not rival.core
            if late or deadline.left() < rival.seconds:
                m.refused[rival.label] = OUT_OF_TIME
                continue
            program = m.build(rival)
            if program is not None:
                built[rival.label] = program
        program = None
        if not alone:
            m.exact = None
            free(device)
        if built:
            m.time(built, least_ms, memory)
            built.clear()
        if alone:
            # what torch.compile keeps, and the graphs with it, would be the next rival's burden
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
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _finite(number: float | None) -> float | None:
    """JSON has no NaN and no infinity; ``refused`` says what happened."""
    return number if number is not None and math.isfinite(number) else None
