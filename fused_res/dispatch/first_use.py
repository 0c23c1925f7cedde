"""Measures the candidates for a call on the device of the call, and decides by the result.

``auto`` has rules for a CPU. On a GPU it believes only measurements. In order of precedence it
follows: the user's timing of exactly this call (``user_timings``); the package's timings near its
shape (``shipped_timings``); a measurement, made the second time that such a call is seen; a rule
(``gpu_rules``). A measurement is a timing row, so each later process reads it.

A candidate is taken if its results are right and it is at least 3 % faster than PyTorch's ops. Its
results are compared with a more precise run (``errors_of``). A candidate that is wrong, fails or
runs out of memory is never used for such calls: it is a ``user_timings.Fault``. It is noted as one
before it runs: a kernel may end the process, or never end.

Nothing is measured while a CUDA graph is captured, a model is compiled or exported, a dispatch mode
or a transform is active, several processes train together, or after the caps below are reached.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..env import settings
from . import backends, gpu_rules, shipped_timings, user_timings
from .shipped_timings import Row
from .user_timings import Fault

_log = logging.getLogger("fused_res")
DEVICE_TYPES = ("cuda", "xpu")  # where ``auto`` believes only measurements
# Caps. For one call: seconds of timing, and candidates. For a process: calls, seconds of timing,
# and seconds with everything that the measurements compiled.
SECONDS_OF_CALL, MOST_CANDIDATES = 0.3, 5
MOST_CALLS, SECONDS, SECONDS_IN_ALL = 32, 20.0, 60.0
WARM_UPS, RUNS = 3, 5
FLUSHED_BYTES = 2**28  # written before each run: more than any L2 cache
# A result may have this many times the error of PyTorch's ops.
MOST_ERROR = 1.5
# The error of statistics in float32: PyTorch's own is 0 now and then.
LEAST_ERROR = 2.0**-23
# float32: images in the comparison with float64. The whole sample is compared with PyTorch's ops,
# whose ReLUs turn at other pixels; a wrong tile differs by more.
IMAGES_OF_FLOAT64, MOST_DIFFERENCE = 2, 0.1
# Rounding turns a few ReLUs at other pixels, by chance. Errors are those of so many samples that
# chance evens out.
LEAST_ELEMENTS, MOST_SAMPLES = 2**16, 32
# In float16 one such pixel has most of a gradient's error: a kernel that is right had 0.05 to 76
# times PyTorch's error, by sample. Where one of two has more than it may, the medians of so many
# samples decide.
SAMPLES_OF_MEDIAN = 9
MOST_SEEN, MOST_ALIKE = 4096, 256
_BUSY = "a measurement is running"
_ENDED = "the process that ran it for the first time ended before it came back"

Results = dict[str, list[Tensor]]  # by kind: y, dx, gradients of weights, ...


class Trial(Protocol):
    """A call on random tensors.

    names: the candidates that can run it, beside ``eager``.
    quick: those of them that first use measures. The others compile for minutes: ``tune`` measures
        them, and first use with ``FUSED_RES_AUTOTUNE=full``.
    """

    names: list[str]
    quick: list[str]

    def sample(self, seed: int, images: int | None = None) -> Any:
        """Random tensors for the call, or for a call with fewer images. The first is its input."""

    def cast(self, sample: Any, dtype: torch.dtype) -> Any:
        """The sample in a more precise dtype."""

    def run(self, name: str, sample: Any) -> Results:
        """Runs a candidate. The sample stays as it is."""


class Verdict(NamedTuple):
    """final: whether later calls get the same."""

    name: str
    reason: str
    final: bool = True


class Spent:
    """What this process has measured so far."""

    def __init__(self) -> None:
        self.calls, self.timing, self.all = 0, 0.0, 0.0

    def add(self, timing: float, total: float) -> None:
        self.calls += 1
        self.timing += timing
        self.all += total

    def why_no_more(self) -> str | None:
        if self.calls >= MOST_CALLS:
            return f"{MOST_CALLS} calls were measured in this process"
        if self.timing >= SECONDS or self.all >= SECONDS_IN_ALL:
            return f"measuring has taken {self.all:.0f} s in this process"
        return None


_spent = Spent()
_seen: dict[tuple, list] = {}  # a call -> the block that made it first, and by how many others
_decided: dict[tuple, Verdict] = {}
_running = threading.Lock()  # of two measurements at once each would disturb the other
_alone = False
_only_asked = False
caller: int | None = None  # the id of the block that runs; one of several alike is no second call


def covers(of: Tensor | torch.device) -> bool:
    """Whether ``auto`` believes only measurements on a device, or the device of a tensor."""
    if isinstance(of, Tensor):
        if of.is_cpu:  # much cheaper than to ask for its device
            return "cpu" in DEVICE_TYPES
        of = of.device
    return of.type in DEVICE_TYPES


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Measures in the body though other processes exist; they must wait for this one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextlib.contextmanager
def only_asked() -> Iterator[None]:
    """In the body choices are only asked for: nothing is seen or measured."""
    global _only_asked
    before, _only_asked = _only_asked, True
    try:
        yield
    finally:
        _only_asked = before


def _why_never() -> str | None:
    """Why this process measures nothing, now or later; None where it may."""
    if settings.autotune == "0":
        return "FUSED_RES_AUTOTUNE=0"
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and not _alone:
        return "several processes train together"
    return _spent.why_no_more()


def _why_not_now(device: torch.device) -> str | None:
    """Why nothing is measured in this call; None where it may."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the model is compiled or traced"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured: run the model a few times before"
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return "a dispatch mode or a transform is active"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "hooks of saved tensors are active"
    if torch.is_anomaly_enabled() or torch.autograd._profiler_enabled():
        return "a profiler or the detection of anomalies is active"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    return _BUSY if _running.locked() else None


def may_measure(device: torch.device) -> bool:
    """Whether calls on a device may be measured in this process."""
    return covers(device) and _why_never() is None


def forget() -> None:
    """Forgets what was decided; the tables are asked again."""
    _decided.clear()


def decide(
    key: tuple, device: torch.device, row_of: Callable[[], Row], trial_of: Callable[[], Trial]
) -> Verdict:
    """What runs a call.

    Args:
        key: everything that the decision depends on.
        row_of: makes the timing row of the call, without milliseconds.
        trial_of: makes the trial of the call.
    """
    known = _decided.get(key)
    if known is not None:
        return known
    row, trial = row_of(), trial_of()
    found = _from_tables(device, row, trial.names)
    names = _to_measure(device, row, trial, found)
    never = _why_never() if names or found is None else None
    if names and never is None:
        now = _why_not_now(device)
        if now is None and (_only_asked or not _is_seen_again(key)):
            now = "it is measured when it is seen again"
        if now is None and not _running.acquire(blocking=False):
            now = _BUSY
        if now is not None:
            otherwise = found or Verdict(gpu_rules.expected(row, trial.names), now)
            return _say(row, otherwise._replace(final=False))
        try:
            found = measure(device, row, trial, names) or found
        finally:
            _running.release()
    if found is None:
        reason = never or ("it could not be measured" if names else "it has no candidate")
        found = Verdict(gpu_rules.expected(row, trial.names), reason)
    _add(_decided, key, found)
    return _say(row, found)


def _is_seen_again(key: tuple) -> bool:
    """Whether the block that made a call first makes it again, or it is gone and many others do."""
    if key not in _seen:
        _add(_seen, key, [caller, 0])
        return False
    seen = _seen[key]
    seen[1] += 1
    return seen[0] == caller or seen[1] >= MOST_ALIKE


def _add(known: dict, key: tuple, value: object) -> None:
    while len(known) >= MOST_SEEN:
        known.pop(next(iter(tuple(known)), None), None)
    known[key] = value


def words(row: Row) -> str:
    return f"{row.op} {'x'.join(map(str, row.shape))} {row.like}, {row.dtype} {row.layout}"


def _say(row: Row, verdict: Verdict) -> Verdict:
    """Logs it; ``inference_conv`` logs its own."""
    if row.op != "conv_bn_act":
        backends.say(f"{words(row)} runs {verdict.name}: {verdict.reason}")
    return verdict


def by_row(row: Row, names: list[str], faulty: Iterable[str] = ()) -> Verdict:
    """What a row of the user's timings says of these candidates.

    faulty: those that are faults.
    """
    name = shipped_timings.fastest(row.ms, [n for n in ("eager", *names) if n in row.ms])
    if name == "eager":
        found = "measured here: no candidate is faster"
        why = f" ({', '.join(faulty)}: wrong or failed, see fused-res doctor)" if faulty else ""
        return Verdict(name, found + why)
    gain = row.ms["eager"] / row.ms[name]
    return Verdict(name, f"measured here: {row.ms[name]:.3g} ms, {gain:.2f}x PyTorch")


def _faulty(device: torch.device, row: Row) -> list[str]:
    """The candidates that are faults for a call."""
    key = user_timings.key_of(row)
    return [fault.candidate for fault in user_timings.faults(device) if fault.of == key]


def _to_measure(device: torch.device, row: Row, trial: Trial, found: Verdict | None) -> list[str]:
    """The candidates to measure for a call; none where the tables know enough.

    The user's row may be from before one of them could be measured: a library was built since, or
    ``FUSED_RES_AUTOTUNE=full`` was set.

    Args:
        found: what the tables say.
    """
    names = (trial.names if settings.autotune == "full" else trial.quick)[:MOST_CANDIDATES]
    if found is None:
        return names
    mine = user_timings.find(device, row)
    if mine is None or {*names} <= {*mine.ms, *_faulty(device, row)}:
        return []
    return [name for name in trial.names if name in names or name in mine.ms]


def _from_tables(device: torch.device, row: Row, names: list[str]) -> Verdict | None:
    mine = user_timings.find(device, row)
    if mine is not None and "eager" in mine.ms:
        return by_row(mine, names, _faulty(device, row))
    of = shipped_timings.device_of(device.type, device.index)
    facts = row.dtype, row.layout, row.shape
    for like in (row.like, ""):  # the rows of the suite ``ops`` are for all calls of bn_act
        found = shipped_timings.verdict(row.op, of, *facts, tuple(names), like)
        if found.backend is not None:
            return Verdict(found.backend, found.reason)
    return None


# --- whether results are right


def _errors_of_sample(results: Results, wanted: Results) -> dict[str, float]:
    """For each kind of tensor the mean square of the relative errors (norm over norm)."""
    found = {}
    for kind, tensors in wanted.items():
        total = 0.0
        for t, want in zip(results[kind], tensors, strict=True):
            want = want.double()
            scale = want.norm().clamp_min(torch.finfo(torch.float32).tiny)
            total += float(((t.double() - want).norm() / scale) ** 2)
        found[kind] = total / max(len(tensors), 1)
    return found


def errors_of(results: list[Results], wanted: list[Results]) -> dict[str, float]:
    """For each kind of tensor the root mean square of the relative errors, of all samples."""
    squares = list(map(_errors_of_sample, results, wanted))
    return {kind: (sum(s[kind] for s in squares) / len(squares)) ** 0.5 for kind in squares[0]}


def _excess(
    results: list[Results], wanted: list[Results], allowed: dict[str, float], rule: str
) -> str | None:
    """How results break a rule, in words."""
    for kind, error in errors_of(results, wanted).items():
        if not error <= allowed[kind]:  # NaN is not
            return f"{kind} has an error of {error:.2g}; {rule} allows {allowed[kind]:.2g}"
    return None


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """float32 without TF32 in the body.

    ``allow_tf32`` would not do: reading it raises where ``fp32_precision`` was set, and setting it
    makes ``torch.get_float32_matmul_precision`` raise where that is not "highest".
    """
    set_precision = torch._C._set_fp32_precision_setter
    before = {op: torch._C._get_fp32_precision_getter("cuda", op) for op in ("conv", "matmul")}
    try:
        for op in before:
            set_precision("cuda", op, "ieee")
        yield
    finally:
        for op, value in before.items():
            set_precision("cuda", op, value)


def _poison(like: Results, dtype: torch.dtype) -> None:
    """Leaves NaN in the free memory that results will be allocated from. Else an element that a
    kernel does not write may still hold the right value, from the run of another candidate."""
    tensors = [t for of in like.values() for t in of]
    copies = [t for t in tensors for _ in range(3 if t.numel() < 2**20 else 1)]
    freed = [torch.full_like(t, math.nan, dtype=dtype) for t in copies]
    del freed


class _Judge:
    """Decides whether a candidate computes a call right.

    16-bit results are compared with float32 without TF32, those in float32 with float64 on at most
    two images, and with PyTorch's ops on all.
    """

    def __init__(self, trial: Trial, sample: Any, dtype: torch.dtype) -> None:
        self.trial, self.sample = trial, sample
        single = dtype == torch.float32
        self.images = images = IMAGES_OF_FLOAT64 if single else None
        first = trial.sample(0, images)
        count = min(MOST_SAMPLES, -(-LEAST_ELEMENTS // max(first[0].numel(), 1)))
        self.samples = [first, *(trial.sample(seed, images) for seed in range(1, count))]
        self.more = torch.float64 if single else torch.float32
        self.wanted = list(map(self._wanted, self.samples))
        errors = errors_of(self._run("eager"), self.wanted)
        self.allowed = {k: max(MOST_ERROR * e, LEAST_ERROR) for k, e in errors.items()}
        self.eager = trial.run("eager", sample) if single else None

    def _wanted(self, sample: Any) -> Results:
        with _exact_float32():
            return self.trial.run("eager", self.trial.cast(sample, self.more))

    def _run(self, name: str) -> list[Results]:
        found = []
        for of, wanted in zip(self.samples, self.wanted, strict=True):
            _poison(wanted, of[0].dtype)
            found.append(self.trial.run(name, of))
        return found

    def _is_right_in_most(self, name: str) -> bool:
        """Whether the medians of a candidate's errors are as small as they must be, and none is
        large."""
        names, errors = ("eager", name), []
        for seed in range(MOST_SAMPLES, MOST_SAMPLES + SAMPLES_OF_MEDIAN):
            of = self.trial.sample(seed, self.images)
            wanted = self._wanted(of)
            errors.append([errors_of([self.trial.run(n, of)], [wanted]) for n in names])
        for kind in self.allowed:
            eager, found = zip(*((own[kind], other[kind]) for own, other in errors), strict=True)
            if any(map(math.isnan, found)):
                return False
            allowed = max(MOST_ERROR * statistics.median(eager), LEAST_ERROR)
            most = max(MOST_ERROR * max(eager), MOST_DIFFERENCE)
            if statistics.median(found) > allowed or max(found) > most:
                return False
        return True

    def fault_of(self, name: str) -> str | None:
        """Why a candidate is wrong, in words; None where it is right. Its errors pass through."""
        rule = f"{MOST_ERROR} times PyTorch's own error"
        wrong = _excess(self._run(name), self.wanted, self.allowed, rule)
        if wrong is not None and self._is_right_in_most(name):
            wrong = None
        if wrong is None and self.eager is not None:
            allowed = dict.fromkeys(self.eager, MOST_DIFFERENCE)
            _poison(self.eager, self.sample[0].dtype)
            results = self.trial.run(name, self.sample)
            wrong = _excess([results], [self.eager], allowed, "the comparison with PyTorch's ops")
        return wrong


# --- measuring


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run. On a GPU the longer of the host's and the device's time: the two overlap
    from call to call."""
    if device.type != "cuda":
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    events[1].record()
    events[1].synchronize()
    return max(host, events[0].elapsed_time(events[1]) / 1e3)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of all measurements on a device: the allocator keeps memory for each stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """The body runs on a stream of its own, without autocast, in grad mode, unseen by modes of
    functions (a default device is one)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stream = _stream_of(device)
            stream.wait_stream(torch.cuda.current_stream())
            stack.enter_context(torch.cuda.stream(stream))
            stack.callback(stream.synchronize)
        yield


def measure(device: torch.device, row: Row, trial: Trial, names: list[str]) -> Verdict | None:
    """Measures candidates, keeps the row, and decides by it; None where a sample does not fit into
    the memory."""
    start = time.perf_counter()
    key, known = user_timings.key_of(row), _faulty(device, row)
    names = [name for name in names if name not in known][:MOST_CANDIDATES]
    suspects = [Fault(*key, n, _ENDED, user_timings.this_process()) for n in names]
    faults: list[Fault] = []
    ms, timing = {}, 0.0
    _keep(device, [], suspects, [])
    try:
        with _beside(device):
            ms, timing = _times(device, row, trial, names, faults)
    except Exception as error:  # of PyTorch's ops: out of memory, or what they will raise again
        _log.info("%s is not measured: %s", words(row), error)
    except BaseException:  # Ctrl-C is no candidate's fault
        _keep(device, [], faults, suspects)
        raise
    total = time.perf_counter() - start
    _spent.add(timing, total)
    row = row._replace(ms=ms)
    _keep(device, [row] if ms else [], faults, suspects)
    if not ms:
        return None
    found = by_row(row, trial.names, _faulty(device, row))
    times = ", ".join(f"{name} {t:.3g}" for name, t in ms.items())
    _log.info("measured %s on %s: takes %s; ms: %s; %.2f s of timing, %.1f s in all",
              words(row), device, found.name, times, timing, total)  # fmt: skip
    return found


def _times(
    device: torch.device, row: Row, trial: Trial, names: list[str], faults: list[Fault]
) -> tuple[dict[str, float], float]:
    """Milliseconds of PyTorch's ops and of each right candidate, and the seconds that timing took.
    Adds the faults of the other candidates to ``faults``."""
    sample = trial.sample(0)
    judge = _Judge(trial, sample, getattr(torch, row.dtype))

    def reject(name: str, why: str) -> None:
        faults.append(Fault(*user_timings.key_of(row), name, why))
        _log.warning("%s is not used for %s: %s", name, words(row), why)

    def is_right(name: str) -> bool:
        try:
            wrong = judge.fault_of(name)
        except Exception as error:  # whatever a kernel raises, PyTorch's ops run
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            reject(name, wrong)
        return wrong is None

    ms: dict[str, float] = {}
    right = list(filter(is_right, names))
    start = time.perf_counter()
    size = FLUSHED_BYTES if device.type == "cuda" else 0
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    for turn in range(WARM_UPS + RUNS):
        for name in ["eager", *right]:
            scratch.zero_()
            try:
                seconds = clock(partial(trial.run, name, sample), device)
            except Exception as error:
                if name == "eager":
                    raise
                reject(name, f"{type(error).__name__}: {error}")
                right.remove(name)
                continue
            if turn >= WARM_UPS:
                ms[name] = min(ms.get(name, float("inf")), 1e3 * seconds)
        if time.perf_counter() - start > SECONDS_OF_CALL and turn >= WARM_UPS:
            break
    timing = time.perf_counter() - start
    # once more: the results of a kernel with a race are right now and then
    right = list(filter(is_right, right))
    return {name: float(f"{ms[name]:.4g}") for name in ["eager", *right]}, timing


def _keep(device: torch.device, rows: list[Row], faults: list[Fault], cleared: list[Fault]) -> None:
    """Changes the table in this process, then the file."""
    user_timings.keep(device, rows, faults, cleared)
    try:
        user_timings.write(device, rows, faults, cleared)
    except OSError as error:
        _log.info("timings hold in this process only: %s", error)


def gain_of(row: Row | None, name: str) -> float | None:
    """How many times as fast as PyTorch's ops a candidate was; None where that is not known."""
    if row is None or not {"eager", name} <= row.ms.keys():
        return None
    return row.ms["eager"] / row.ms[name]
