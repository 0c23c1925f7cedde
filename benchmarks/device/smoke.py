"""Each kernel once at a small size, held against float64 and repeated: ``python
benchmarks/device/smoke.py CASE``.

Before every repeat the free memory of a result's size is filled with NaN, so that an element that a
kernel does not write shows; the results must be the same bit by bit, or there is a race. Without a
GPU the sizes are tiny, Triton's kernels run in its interpreter, and CUDA's are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
from harness.measure import Measurement  # noqa: E402
from harness.program import CL, Program  # noqa: E402
from harness.suite import FUSED, Candidate, Options, Workload, graphed  # noqa: E402
from suites import convs, inference, ops  # noqa: E402

from fused_res.dispatch import training_conv  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
REPEATS = 20 if HAS_GPU else 2
# times eager's error: in tensors of so few elements chance alone makes 1.6, and an element that is
# not written, or of another tile, makes hundreds
SLACK = 3.0
PLANS = "automatic", "whole", "cooperative", "split"  # of the op cuda_plan


class Trial(NamedTuple):
    """A workload's candidates: the first ``most`` with such a name."""

    workload: Workload
    name: str
    most: int = 1
    graphed: bool = False
    stream: bool = False
    plan: str = "automatic"


def training(*epilogues: str) -> list[Trial]:
    """Calls of two bottlenecks, one in steps of 2, that have such an epilogue."""
    of = ("bottleneck", (256, 512), 28, 8) if HAS_GPU else ("basic", (8, 8), 4, 2)
    calls = convs.training_convs_of(*of)
    return [Trial(w, "triton") for w in calls if w.call.epilogue in epilogues]


def inference_convolutions() -> list[Trial]:
    n, c, size = (8, 64, 28) if HAS_GPU else (2, 16, 8)
    calls = [
        convs.Conv(c, 3, 1, "add"),
        convs.Conv(2 * c, 3, 2),
        convs.Conv(c, 1, 1, "shortcut", c, 2),
    ]
    return [Trial(convs.conv((n, c, size, size), "bf16", one), "triton", 2) for one in calls]


def conv_halo() -> list[Trial]:
    shape = (8, 64, 28, 28) if HAS_GPU else (2, 16, 8, 8)
    forward = convs.conv(shape, "bf16", convs.Conv(shape[1], 3, 1, "add"))
    both = training(training_conv.STATISTICS, training_conv.RELU)
    return [Trial(forward, "conv_halo"), *(t._replace(name="conv_halo") for t in both)]


def chain(images: int, channels: int, size: int) -> list[Trial]:
    name = "cuda" if HAS_GPU else "cpu"
    return [Trial(inference.chain(3, channels, size, images, "bf16"), name)]


def bn_act(name: str, **how) -> list[Trial]:
    shapes = [(32, 64, 28, 28), (16, 24, 64, 64)] if HAS_GPU else [(2, 16, 6, 6)]
    return [Trial(ops.op(shape, CL, "bf16"), name, **how) for shape in shapes]


# riskiest first; by name as a fused candidate is named after ``fused_res-``
CASES: dict[str, Callable[[], list[Trial]]] = {
    "training-conv-relu": lambda: training(training_conv.RELU),
    "training-conv-statistics": lambda: training(training_conv.STATISTICS),
    "training-conv-add": lambda: training(training_conv.ADD, training_conv.ADD_IN_PLACE),
    "inference-conv": inference_convolutions,
    "conv-halo": conv_halo,
    # fewer images than multiprocessors share them in clusters
    "res-chain-cluster": lambda: chain(1, 32, 16) if HAS_GPU else chain(1, 16, 8),
    "res-chain-block": lambda: chain(1000, 16, 8) if HAS_GPU else chain(3, 16, 8),
    "bn-act-cooperative": lambda: bn_act("cuda", plan="cooperative"),
    "bn-act-triton": lambda: bn_act("triton"),
    "graph": lambda: bn_act("cuda", graphed=True) + bn_act("triton", graphed=True),
    "stream": lambda: bn_act("cuda", stream=True) + bn_act("triton", stream=True),
}


def candidates(trial: Trial) -> tuple[Candidate, list[Candidate], list[str]]:
    """eager, those to try, and why others cannot run."""
    options = Options(gpu=True, compile=False)
    every = trial.workload.candidates(DEVICE, options)
    named = [
        c for c in every if (c.name + "-").startswith(f"{FUSED}{trial.name}-") and not c.graphed
    ]
    able = [c for c in named if c.why_not is None][: trial.most]
    return every[0], able, [c.why_not for c in named if c.why_not]


def poison(results: dict[str, torch.Tensor]) -> None:
    """Leaves NaN in free memory of the results' sizes."""
    freed = [torch.full_like(t, math.nan) for t in results.values() if t.is_floating_point()]
    del freed


def repeat(program: Program, times: int) -> None:
    """Raises RuntimeError where a result differs from the first one."""
    first = program.result()
    for i in range(times):
        poison(first)
        again = program.result()
        for name, t in first.items():
            if not torch.equal(t, again[name]):
                different = (t != again[name]).double().mean()
                raise RuntimeError(f"{name} differs in repeat {i + 1}, in {different:.2%}")


@contextlib.contextmanager
def how(trial: Trial):
    """A plan of the CUDA kernels, or a stream of the trial's own."""
    if not HAS_GPU or trial.name == "cpu":
        yield
        return
    if trial.plan != "automatic":
        torch.ops.fused_res.cuda_plan(PLANS.index(trial.plan))
    stream = torch.cuda.Stream() if trial.stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()
    if trial.plan != "automatic":
        torch.ops.fused_res.cuda_plan(0)


def check(trial: Trial) -> int:
    """Checks and repeats every candidate; how many there are.

    Raises:
        WrongResult: an error is over the rule's bound.
        RuntimeError: a repeat differs.
    """
    eager, able, why = candidates(trial)
    for one in able:
        one = replace(graphed(one) if trial.graphed else one, slack=SLACK)
        measurement = Measurement(trial.workload, [eager, one], DEVICE, 1)
        measurement.checked(eager)
        with how(trial):
            program = measurement.checked(one)
            repeat(program, REPEATS)
        _, ratio = measurement.quality[one.label]
        print(f"{trial.workload.name}: {one.label}: error {ratio:.2f}x eager's, {REPEATS} repeats "
              "alike", flush=True)  # fmt: skip
    if not able:
        print(f"{trial.workload.name}: {trial.name} cannot run: {'; '.join(why) or 'unsuited'}")
    return len(able)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="+", choices=CASES)
    idle = 0
    for case in parser.parse_args(argv).case:
        count = sum(check(trial) for trial in CASES[case]())
        print(f"{case}: {count} candidates on {DEVICE}", flush=True)
        idle += not count
    return 1 if idle and HAS_GPU else 0  # without a GPU most kernels cannot run


if __name__ == "__main__":
    sys.exit(main())
