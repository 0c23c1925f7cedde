"""``fused_res.tune``: times every candidate for a model's convolutions.

It times each distinct call of ``conv_bn_act`` in one forward pass, in every implementation that can
run the call and in PyTorch's own ops. For training it times each distinct convolution of the
blocks, forward and backward, in ATen and in the fused kernels. ``user_timings`` keeps the rows;
``inference_conv`` and ``training_conv`` follow them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.random import fork_rng
from torch.utils import _pytree as pytree

from ..cli import table
from ..fuse.swap import fuse_, refuse_wrapped
from ..nn.blocks import FusedForward
from ..ops.conv_bn_act import Call, run_as
from ..serve.calls import example_call
from . import (
    backends,
    first_use,
    inference_conv,
    shipped_timings,
    training_block,
    training_conv,
    user_timings,
)
from .inference_conv import IMPLEMENTATIONS, Candidate, Key
from .shipped_timings import Row

_log = logging.getLogger("fused_res")
SECONDS = 0.1  # for one candidate of one call
ROUNDS = 5, 50  # at least and at most
MOST_TURNS = 4  # times as many where the two fastest runs do not agree
# Bytes that are written before every run. They push the weights out of the caches, as other layers
# do in a network.
SCRATCH = {"cpu": 2**26, "cuda": 2**28}


class TableNotWritten(OSError):
    """``tune`` could not write its table. This process uses the timings all the same.

    Attributes:
        report: the ``TuneReport`` of these timings.
    """

    def __init__(self, message: str, report: TuneReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class TuneReport:
    """The timings of ``tune``. Prints as a table.

    Attributes:
        rows: one for each distinct call, with milliseconds by implementation.
        chosen: for each row the implementation that backend ``auto`` takes from now on.
        paths: the files that were written, one per device.
        skipped: (call, reason) of calls that were not timed.
    """

    rows: list[Row] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        found = dict.fromkeys(name for row in self.rows for name in row.ms)
        cells = [
            [
                inference_conv.words(row),
                *(f"{row.ms[name]:.3f}" if name in row.ms else "-" for name in found),
                chosen,
                f"{row.ms['eager'] / row.ms[chosen]:.2f}x",
            ]
            for row, chosen in zip(self.rows, self.chosen, strict=True)
        ]
        header = ["convolution", *(f"{name} ms" for name in found), "chosen", "over eager"]
        skipped = [f"skipped: {call}: {reason}" for call, reason in self.skipped]
        return "\n".join([table(header, cells, "l" + "r" * len(found) + "lr"), *skipped])


def _refuse_to_measure() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("tune cannot measure inside torch.compile: call it before")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune cannot measure while a CUDA graph is captured: call it before")


def _calls_of(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], train: bool
) -> dict[Key, Call] | dict[training_conv.Call, None]:
    """The distinct calls in a forward pass of a copy of the model with the same parameters."""
    try:
        model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:
        raise ValueError(
            f"model must be one that can be copied, got {type(error).__name__}: {error}"
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fuse_ found no residual block")
        report = fuse_(model)
    if not train:
        model.eval()
    elif not model.training:  # a model in training mode keeps its frozen modules in eval mode
        model.train()
    backend, recording = "auto", inference_conv.recording
    if train:
        backend, recording = _backend_of_training(args, kwargs), training_conv.recording
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    gpus = {t.device.index for t in (*inputs, *model.parameters()) if t.is_cuda}
    with torch.no_grad(), backends.backend(backend), recording() as calls, fork_rng(gpus):
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"example must be what model takes, got {', '.join(map(_words, inputs))}, for "
                f"which it raised {type(error).__name__}: {error}"
            ) from error
    if not calls and not any(isinstance(m, FusedForward) for m in model.modules()):
        raise ValueError(
            f"model must have a residual block that can be fused, got {type(model).__name__}:\n"
            f"{report}"
        )
    return calls


def _words(t: Tensor) -> str:
    dtype = str(t.dtype).removeprefix("torch.")
    return f"a tensor of shape {tuple(t.shape)}, {dtype} on {t.device}"


def _candidates(call: Call) -> list[Candidate]:
    """PyTorch's own ops, and each implementation that can run a call, in all its configurations."""
    candidates = [Candidate("eager", "")]
    for name, reason in inference_conv.why_not(call, "auto").items():
        if reason is None:
            configs = IMPLEMENTATIONS[name].configs
            found = [None] if configs is None else configs(call)
            candidates += [Candidate(name, "", config) for config in found]
    return candidates


def _runner(call: Call, candidate: Candidate) -> Callable[[], object]:
    """A function that runs a call. For channels_last on a CPU it is prepared once, as in a block:
    preparing takes 25 to 45 us."""
    if candidate.implementation == "eager" or not call.x.is_cpu or call.x.stride(1) != 1:
        return partial(run_as, call, candidate)
    return partial(IMPLEMENTATIONS[candidate.implementation].prepare(call), call.x, call.residual)


def _clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run."""
    if device.type == "cpu":
        time.sleep(1e-4)  # so that the run starts with a whole time slice of the scheduler
    return first_use.clock(run, device)


def _time(call: Call, candidates: list[Candidate], seconds: float) -> list[float | None]:
    """Milliseconds of each candidate; None where it does not run."""
    makers = {
        f"{candidate.implementation} {candidate.config}": partial(_runner, call, candidate)
        for candidate in candidates
    }
    return _time_in_turns(makers, [call.x, call.residual], seconds)


def _time_in_turns(
    makers: dict[str, Callable[[], Callable[[], object]]],
    inputs: list[Tensor | None],
    seconds: float,
) -> list[float | None]:
    """Milliseconds of the fastest run of each made function; None: it does not run.

    The functions run in turns, until the two fastest runs of each agree. The median is no better:
    on a busy machine more than half of the runs of 2 ms took 7 ms longer, a time slice of the
    scheduler.
    """
    device = inputs[0].device
    scratch = torch.empty(SCRATCH.get(device.type, 2**26), dtype=torch.uint8, device=device)

    def once(run: Callable[[], object]) -> float:
        scratch.zero_()
        for t in inputs:  # in a network the layer before has just written them
            if t is not None:
                t.mul_(1)
        return _clock(run, device)

    samples: list[list[float]] = [[] for _ in makers]
    runs, rounds = [None] * len(makers), [0] * len(makers)
    for i, (name, make) in enumerate(makers.items()):
        try:
            runs[i] = make()
            runs[i]()  # compiles, and packs weights
            start = time.perf_counter()
            once(runs[i])
            spent = time.perf_counter() - start
        except Exception as error:
            _log.warning("tune: %s does not run: %s", name, error)
            continue
        rounds[i] = max(ROUNDS[0], min(ROUNDS[1], int(seconds / spent)))
    for turn in range(MOST_TURNS * max(rounds)):
        for i, run in enumerate(runs):
            planned = turn < rounds[i]
            if planned or (turn < MOST_TURNS * rounds[i] and not _settled(samples[i])):
                samples[i].append(once(run))
    return [1e3 * min(s) if s else None for s in samples]


def _settled(samples: list[float]) -> bool:
    """Whether the two fastest runs agree; a busy machine may have disturbed all but one."""
    first, *rest = sorted(samples)
    return not rest or rest[0] <= shipped_timings.LEAST_GAIN * first


def _measure(key: Key, call: Call, seconds: float) -> Row | None:
    """The timing row of a call; None: there is only one candidate, or ``eager`` does not run."""
    generator = torch.Generator(key.device).manual_seed(0)

    def filled(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.empty_like(t, device=key.device).normal_(generator=generator)

    call = call._replace(x=filled(call.x), residual=filled(call.residual))
    candidates = _candidates(call)
    if len(candidates) == 1:
        return None
    with contextlib.ExitStack() as stack:
        if call.conv.weight.dtype != key.dtype:
            stack.enter_context(torch.autocast(key.device.type, key.dtype))
        if key.device.type == "cuda":
            stack.enter_context(torch.cuda.device(key.device))  # events use the current device
        times = _time(call, candidates, seconds)
    names = [candidate.implementation for candidate in candidates]
    ms, config = _fastest(names, [candidate.config for candidate in candidates], times)
    rule = inference_conv.expected(call, key)
    ms = {name: ms[name] for name in (rule, *ms) if name in ms}  # it wins where none is faster
    return inference_conv.row_of(key, ms, config) if len(ms) > 1 and "eager" in ms else None


def _fastest(names, configs, times) -> tuple[dict[str, float], dict | None]:
    """Milliseconds of each implementation in its fastest configuration, and that configuration."""
    ms, fields = {}, None
    for name, config, t in zip(names, configs, times, strict=True):
        if t is not None and t < ms.get(name, float("inf")):
            ms[name] = float(f"{t:.4g}")
            fields = fields if config is None else config._asdict()
    return ms, fields


def _backend_of_training(args: tuple, kwargs: dict[str, Any]) -> str:
    """The backend on which a model's blocks are recorded."""
    x = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    able = training_block.able(x)
    return "triton" if "triton" in able else "cuda"


def why_not_training(x: Tensor) -> str | None:
    """Why training has one candidate for everything; None where it has more."""
    if x.is_cpu and "cpu" not in backends.DEVICE_TYPES["triton"]:
        return "on a CPU fixed rules say which convolutions of training are native"
    if not x.is_cpu and training_block.able(x):
        return None
    reason = backends.why_not("bn_act", "triton", x.device.type, x.dtype)
    return reason and f"no fused kernel can run blocks in training here: {reason}"


def _measure_training(call: training_conv.Call, _, seconds: float) -> Row | None:
    """As ``_measure``, for a convolution of a block in training."""
    from .training_conv_candidates import Steps, values

    v = values(call, call.device)
    steps = Steps(call, v)
    found = steps.candidates()
    names, configs = [*map(training_conv.name_of, found)], [*map(training_conv.config_of, found)]
    makers = {
        f"{training_conv.OP} {name} {config}": partial(partial, steps.run, choice)
        for choice, name, config in zip(found, names, configs, strict=True)
    }
    with contextlib.ExitStack() as stack:
        if call.device.type == "cuda":
            stack.enter_context(torch.cuda.device(call.device))
        inputs = [v.get(name) for name in ("x", "a", "dy", "other", "masked")]
        times = _time_in_turns(makers, [t for t in inputs if t is not None], seconds)
    ms, config = _fastest(names, configs, times)
    return training_conv.row_of(call, ms, config) if len(ms) > 1 and "eager" in ms else None


@torch.no_grad()
def tune(
    model: nn.Module,
    example: Tensor | tuple[Tensor | None, ...] | Mapping[str, Any],
    *,
    seconds: float | None = None,
    train: bool = False,
) -> TuneReport:
    """Times the kernels that can run each convolution of ``model`` on this device.

    Runs a copy of the model on ``example`` once. Then it times, for each distinct shape, PyTorch's
    own ops and every kernel that can replace them. From then on backend ``auto`` takes the fastest
    one for exactly this shape, dtype, layout and number of threads, in this process and in later
    ones, which read a file in ``FUSED_RES_CACHE``. Other shapes run as before. Tuning again
    replaces the timings.

    It covers residual blocks, and everything that ``optimize_for_inference`` fused in a model it
    returned. The model does not change: neither mode, parameters and buffers nor hooks.

    With ``train`` it times the convolutions of the blocks that Triton can run, each forward and
    backward: ATen with the passes over memory that a fused kernel saves (``eager``), and the fused
    kernels (``triton`` in each configuration, ``conv_halo``). Then, on a GPU, it times each whole
    block, forward and backward: PyTorch's ops (``eager``), the CUDA library (``cuda``), and Triton
    with the convolutions that were faster in a fused kernel (``triton``), those of 1x1, or all of
    them. A candidate whose results are wrong is left out. ``auto`` takes the fastest. Of a model in
    eval mode all modules are timed in training mode; in a model in training mode frozen modules
    stay frozen. Parameters, gradients, running statistics and random number generators stay as they
    were.

    Args:
        model: any module, fused or not; not wrapped, compiled or scripted.
        example: inputs of the model: a tensor, a tuple of tensors, or a dict of keyword inputs.
            Give them the layout (channels_last, for example) that later inputs have, and call
            ``tune`` under the same autocast.
        seconds: for each implementation of each shape, in at least five runs; default: 0.1. A
            ResNet-50 at batch 1 takes less than half a minute on a CPU.
        train: time training instead of inference.

    Returns:
        TuneReport: milliseconds by shape and implementation, the choices, the paths of the files.
            Empty where there is one candidate for everything: 16-bit tensors on a CPU, training on
            a CPU, training without Triton.

    Raises:
        TypeError: ``model`` is not a module, or ``example`` is not made of tensors.
        ValueError: ``model`` cannot be copied, cannot run ``example``, has no block that can be
            fused, or is wrapped, compiled or scripted; ``seconds`` is negative.
        RuntimeError: called inside ``torch.compile`` or while a CUDA graph is captured.
        TableNotWritten: the file cannot be written (an OSError). This process uses the timings all
            the same; the exception has them as ``report``.

    Examples:
        >>> model = fused_res.models.create("resnet20").eval()
        >>> x = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
        >>> report = fused_res.tune(model, x)  # print(report) shows a table
    """
    _refuse_to_measure()
    refuse_wrapped(model, "tune")
    args, kwargs = _example(example)
    seconds = SECONDS if seconds is None else seconds
    if not seconds >= 0:
        raise ValueError(f"seconds={seconds!r} must be at least 0")
    report = TuneReport()
    first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
    reason = why_not_training(first) if train and first is not None else None
    if reason is not None:
        _log.info("tune: nothing to choose: %s", reason)
        return report
    with training_block.recording() as blocks:
        calls = _calls_of(model, args, kwargs, train)
    measure = _measure_training if train else _measure
    by_device: dict[torch.device, list[Row]] = {}
    for i, (key, call) in enumerate(calls.items(), 1):
        row = measure(key, call, seconds)
        if row is None:
            of = training_conv.row_of(key, {}) if train else inference_conv.row_of(key, {})
            report.skipped.append((inference_conv.words(of), "PyTorch's ops alone can run it"))
            continue
        report.rows.append(row)
        report.chosen.append(taken := inference_conv.taken(row))
        by_device.setdefault(key.device, []).append(row)
        _log.info("tune: %d of %d: %s: %s", i, len(calls), inference_conv.words(row), taken)
    _write(by_device, report)
    if train:
        _tune_blocks(blocks, report)
    return report


def _tune_blocks(blocks: dict[tuple, training_block.Trial], report: TuneReport) -> None:
    """Times the candidates for whole blocks, which may run the convolutions by their rows."""
    for i, (key, trial) in enumerate(blocks.items(), 1):
        found = first_use.covers(key[1].device) and training_block.measure(key, trial)
        if found:
            row, taken = found
            report.rows.append(row)
            report.chosen.append(taken)
            _log.info("tune: block %d of %d: %s", i, len(blocks), taken)
    inference_conv.forget()


def _example(
    example: Tensor | tuple[Tensor | None, ...] | Mapping[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """The arguments and keyword arguments of a call."""
    if isinstance(example, Mapping):
        return example_call(example)
    args = (example,) if isinstance(example, Tensor) else example
    if not isinstance(args, (tuple, list)) or not all(
        t is None or isinstance(t, Tensor) for t in args
    ):
        raise TypeError(f"example must be a tensor or a tuple of tensors, got {example!r:.100}")
    return tuple(args), {}


def _write(by_device: dict[torch.device, list[Row]], report: TuneReport) -> None:
    """Adds the rows in this process, then to files.

    Raises:
        TableNotWritten: a file cannot be written.
    """
    for device, rows in by_device.items():
        user_timings.keep(device, rows)
    inference_conv.forget()
    for device, rows in by_device.items():
        try:
            report.paths.append(user_timings.write(device, rows))
        except OSError as error:
            path = user_timings.path_of(user_timings.made_by(device))
            raise TableNotWritten(
                f"tune could not write {path} ({error}): its choices hold in this process only; "
                f"FUSED_RES_CACHE must name a folder that can be written to",
                report,
            ) from error
