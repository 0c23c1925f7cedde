"""The tables of pytest-benchmark, unless the command line says otherwise; and where suites are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    given = any("--benchmark-columns" in str(arg) for arg in config.invocation_params.args)
    if hasattr(config.option, "benchmark_columns") and not given:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds", "iterations"]
        config.option.benchmark_sort = "median"
