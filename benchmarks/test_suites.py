"""Every suite under pytest-benchmark: ``pytest benchmarks --benchmark-only -k "ops/ and 64x32"``

A test is a candidate's call of a workload in one direction; a group, and so a table, is a workload
and a direction. A candidate that is wrong fails before it is timed; one that cannot run is skipped.
On a GPU suites that take minutes are collected where ``-k`` has their name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from harness.measure import DeviceClock, Measurement, free
from harness.suite import Candidate, Options, Workload
from suites import SUITES, workloads

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if GPU:
    pytestmark = pytest.mark.benchmark(timer=DeviceClock())


def cases(keyword: str) -> Iterator:
    for name, suite in SUITES.items():
        if not (GPU and suite.named and name not in keyword):
            for workload in workloads(name, gpu=GPU):
                yield from cases_of(name, workload, suite.why_not(DEVICE))


def cases_of(suite: str, workload: Workload, why_not: str | None) -> Iterator:
    candidates = [] if why_not else workload.candidates(DEVICE, Options(GPU))
    for direction in workload.directions:
        for one in candidates:
            words = suite, workload.name, direction, one.label
            name = "/".join(re.sub(r"[^\w.+-]+", "_", word) for word in words)
            reason = one.why_not and f"{one.name}: {one.why_not}"
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            yield pytest.param(workload, one, direction, id=name, marks=marks)


def pytest_generate_tests(metafunc):
    names = "workload", "candidate", "direction"
    metafunc.parametrize(names, list(cases(metafunc.config.getoption("keyword"))))


@lru_cache(maxsize=1)  # the candidates of a workload follow one another
def measurement_of(workload: Workload) -> Measurement:
    """Values, exact results and the error of eager PyTorch, which limits that of the others."""
    candidates = workload.candidates(DEVICE, Options(GPU))
    found = Measurement(workload, candidates, DEVICE, rounds=0)
    for one in candidates:
        if one.name == "eager":
            found.checked(one)
    return found


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", GPU)
    # else the eighth shape of one function is silently run uncompiled
    torch.compiler.reset()
    yield
    free(DEVICE)


def test_suite(
    benchmark, cleared, workload: Workload, candidate: Candidate, direction: str
) -> None:
    benchmark.group = f"{workload.suite}: {workload.name}, {direction}"
    benchmark.name = candidate.label
    measurement = measurement_of(workload)
    try:
        program = measurement.checked(candidate)
    except ImportError as error:  # another runtime
        pytest.skip(f"{candidate.name}: {error}")
    benchmark(measurement.stepper(candidate.label, program, direction))
