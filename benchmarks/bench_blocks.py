"""Whole blocks under pytest-benchmark: ``pytest benchmarks/bench_blocks.py --benchmark-only``.

For a closer look at one block (``-k``, ``--benchmark-compare``). Rivals run one after the other and
unchecked here; figures that are quoted come from ``run.py``, which checks and interleaves them.
"""

import pytest
from pytest_rivals import cases, prepare


@pytest.mark.parametrize(("workload", "label", "direction"), cases("blocks"))
def test_block(benchmark, workload, label, direction):
    benchmark(prepare(benchmark, workload, label, direction))
