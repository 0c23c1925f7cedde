"""Running a test's body with less than the processor has."""

import contextlib

from fused_res.dispatch import backends

ISAS = ("plain", "avx2", "avx512")


@contextlib.contextmanager
def instruction_set(name):
    """Uses at most ``name``; what is in use is the context's value."""
    try:
        yield backends.cpu_isa(name)
    finally:
        backends.cpu_isa("best")
