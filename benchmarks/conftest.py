"""What pytest-benchmark's tables show unless the command line says otherwise."""

COLUMNS = ["median", "iqr", "min", "rounds", "iterations"]


def pytest_configure(config):
    given = any(
        str(word).startswith("--benchmark-columns") for word in config.invocation_params.args
    )
    if hasattr(config.option, "benchmark_columns") and not given:
        config.option.benchmark_columns = COLUMNS
        config.option.benchmark_sort = "median"
