"""bn_act under pytest-benchmark: ``pytest benchmarks/bench_ops.py --benchmark-only``.

For a closer look at one shape (``-k``, ``--benchmark-compare``). Rivals run one after the other and
unchecked here; figures that are quoted come from ``run.py``, which checks and interleaves them.
"""

import pytest
from pytest_rivals import cases, prepare


@pytest.mark.parametrize(("workload", "label", "direction"), cases("ops"))
def test_op(benchmark, workload, label, direction):
    benchmark(prepare(benchmark, workload, label, direction))
