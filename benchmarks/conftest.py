"""What pytest-benchmark's tables show unless the command line says otherwise."""


def pytest_configure(config):
    given = any("--benchmark-columns" in str(arg) for arg in config.invocation_params.args)
    if hasattr(config.option, "benchmark_columns") and not given:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds", "iterations"]
        config.option.benchmark_sort = "median"
