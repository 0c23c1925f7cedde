"""Sweeps of which `make test` runs a few and `make test-slow` the others."""

import pytest


def sweep(values, quick, unpack=False):
    """``values`` as parameters of a test; all but those in ``quick`` are slow.

    ``unpack``: each value is a tuple of several parameters.
    """

    def slow(value):
        return pytest.param(*(value if unpack else (value,)), marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]
