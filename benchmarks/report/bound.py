"""What bounds a kernel, predicted from its machine code and from what NVIDIA publishes: the
instructions in its loops, per element, against ``report/rates.py``.

A loop is what lies between a branch backwards and its target. Each instruction in it counts once,
executed or not: the model knows no branches that are not taken, no bank conflicts, no latency.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from .rates import RATES, Gpu

# Kinds of instructions, by how their names begin. The rest counts for the issue slots alone.
KINDS = {
    "fp32": r"(F(ADD|MUL|FMA)|IMAD)2?\b",
    "fp64": r"D(ADD|MUL|FMA|SETP)\b",
    "convert64": r"(F2F|F2I|I2F)\b.*64",
    "integer": r"(U?IADD3?|VIADD\w*|U?LOP3?|PLOP3|U?ISETP|FSETP|FSEL|U?SEL|[FI]MNMX3?|U?SHF|U?PRMT"
    r"|U?LEA|F2FP)\b",
    "convert": r"(F2F|F2I|I2F)\b(?!.*64)",
    "special": r"MUFU\b",
    "shuffle": r"SHFL\b",
}
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
# by the shape in a name, multiply-adds of a thread: a warp's or, from sm_90 on, a warpgroup's
PRODUCTS = re.compile(r"(HMMA\.(?P<m>16)(?P<n>8)(?P<k>\d+)|HGMMA\.(\d+)x(\d+)x(\d+))")


class Counts(NamedTuple):
    """Of one thread, or of one element: instructions of a kind; bytes; multiply-adds of products
    of matrices on tensor cores, of 16-bit numbers and of TF32."""

    bytes: float = 0  # of global memory
    fp32: float = 0
    fp64: float = 0
    convert64: float = 0
    integer: float = 0
    convert: float = 0
    special: float = 0
    shuffle: float = 0
    shared: float = 0  # bytes
    tensor: float = 0
    tf32: float = 0
    issue: float = 0  # all instructions

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def over(self, n: float) -> Counts:
        """Of one of n elements, as kernels.md has it."""
        return Counts(*(float(f"{value / n:.3g}") for value in self))


def _width(name: str) -> int:
    """Bytes that an instruction moves for a thread."""
    words = name.split(".")
    if words[0] == "LDSM":
        return 4 * int(words[-1]) if words[-1].isdigit() else 4
    return next((BYTES[w] for w in words[1:] if w in BYTES), 4)


def _products(name: str) -> float:
    found = PRODUCTS.match(name)
    if not found:
        return 0
    if found["m"]:
        return 16 * 8 * int(found["k"]) / 32
    m, n, k = map(int, found.groups()[-3:])
    return m * n * k / 128


def counts(names: list[str]) -> Counts:
    """Of a list of instructions, "LDG.E.128" for one."""
    total = Counter(issue=len(names))
    for name, n in Counter(names).items():
        for kind, pattern in KINDS.items():
            if re.match(pattern, name):
                total[kind] += n
        if re.match(r"(LDG|STG|LDGSTS|LD|ST)\b", name):
            total["bytes"] += n * _width(name)
        if re.match(r"(LDSM?|STSM?)\b", name):
            total["shared"] += n * _width(name)
        total["tf32" if ".TF32" in name else "tensor"] += n * _products(name)
    return Counts(**total)


class Loop(NamedTuple):
    """An innermost loop. depth: how many loops it is in, itself included. stores: to global
    memory. doubles: it loads float64 alone."""

    depth: int
    counts: Counts
    stores: bool = False
    doubles: bool = False


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;\n]*)", re.M)


def loops(sass: str) -> list[Loop]:
    """The innermost loops of one function, as cuobjdump prints it; the first entry is all of it, at
    depth 0."""
    code = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(sass)]
    ranges: dict[int, int] = {}  # a loop's first address, its last
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            first = int(target[1], 16)
            ranges[first] = max(at, ranges.get(first, 0))
    found = [Loop(0, counts([name for _, name, _ in code]))]
    for first, last in sorted(ranges.items()):
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in ranges.items()):
            continue
        depth = sum(a <= first and last <= b for a, b in ranges.items())
        body = [name for at, name, _ in code if first <= at <= last]
        loaded = [_width(name) for name in body if re.match(r"LDG?\b", name)]
        stores = any(re.match(r"STG?\b", name) for name in body)
        of_body = counts(body)
        doubles = of_body.fp64 > 0 and set(loaded) == {8}
        found.append(Loop(depth, of_body, stores, doubles))
    return found


class Bound(NamedTuple):
    picoseconds: float  # an element
    by: str

    def __str__(self) -> str:
        time, unit = (self.picoseconds, "ps") if self.picoseconds >= 0.1 else (
            self.picoseconds * 1000, "fs")  # fmt: skip
        return f"{float(f'{time:.2g}'):g} {unit} {self.by}"


def times(c: Counts, gpu: Gpu) -> dict[str, float]:
    """Picoseconds that each of a GPU's units takes for an element, all multiprocessors working."""
    rates = RATES[gpu.capability]
    clocks = {
        "tensor cores": (c.tensor + 2 * c.tf32) / gpu.tensor,
        "FP64": c.fp64 / rates.fp64 + c.convert64 / rates.convert64,
        "FP32": c.fp32 / rates.fp32,
        "integer": c.integer / rates.integer,
        "conversions": c.convert / rates.convert + c.special / rates.special,
        "shared memory": c.shared / rates.shared + c.shuffle / rates.shuffle,
        "issue slots": c.issue / rates.issue,
    }
    per_clock = 1e3 / (gpu.multiprocessors * gpu.clock)
    return {
        "memory": c.bytes / gpu.bandwidth * 1e3,
        **{name: n * per_clock for name, n in clocks.items()},
    }


def bound(c: Counts, gpu: Gpu) -> Bound:
    """The time an element takes, where all units work at once: the slowest one's."""
    by, time = max(times(c, gpu).items(), key=lambda item: item[1])
    return Bound(time, by)
