"""The rule of ``auto`` on a GPU, for calls that were not measured there.

It is PyTorch's ops, until the package ships timings that say otherwise for every call of an op.
"""

from __future__ import annotations

from . import shipped_timings
from .shipped_timings import LEAST_GAIN_OF_SIBLING, Row

# A candidate is expected to win where so many shipped timings on GPUs, of at least two
# architectures, say so, and none says otherwise.
LEAST_ROWS, LEAST_ARCHITECTURES = 6, 2


def expected(row: Row, names: list[str]) -> str:
    """The candidate that is expected to win a call; ``eager`` where none is known to.

    Args:
        row: of the call, without milliseconds.
        names: the candidates that can run it, beside ``eager``.
    """
    facts = row.op, row.dtype, row.layout
    found = [
        r
        for r in shipped_timings.rows()
        if (r.op, r.dtype, r.layout) == facts and r.isa != "cpu" and "eager" in r.ms
    ]
    if len(found) < LEAST_ROWS or len({r.isa for r in found}) < LEAST_ARCHITECTURES:
        return "eager"
    for name in names:
        gains = [r.ms["eager"] / r.ms[name] for r in found if name in r.ms]
        if len(gains) == len(found) and min(gains) >= LEAST_GAIN_OF_SIBLING:
            return name
    return "eager"
