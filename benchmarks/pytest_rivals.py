"""What the two pytest-benchmark suites share: a case for every workload, rival and direction."""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from programs import values
from rivals import compile_modes, rivals
from workloads import Workload, suites

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = compile_modes("default")
_values = lru_cache(maxsize=1)(values)  # a workload's cases follow one another


def cases(suite: str) -> list:
    return [
        pytest.param(w, r.label, direction, id=f"{w.name}-{direction}-{r.label}".replace(" ", "_"))
        for w in suites(gpu=DEVICE == "cuda", quick=False)[suite]
        for direction in w.directions
        for r in rivals(w, DEVICE, MODES)
    ]


def prepare(benchmark, workload: Workload, label: str, direction: str) -> Callable[[], None]:
    """The rival's step, warm, in the group of its workload and direction."""
    benchmark.group = f"{workload.name}, {direction}"
    torch.compiler.reset()
    rival = next(r for r in rivals(workload, DEVICE, MODES) if r.label == label)
    program = rival.build(workload, _values(workload, DEVICE))
    program.run()
    call = program.calls[direction]

    def step() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step
