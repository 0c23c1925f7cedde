"""The predictions of kernels.md: what the loops of each kernel take an element, and what bounds
them. ``kernel_loops.json`` keeps the counts, so that a table can be written again without a
compiler."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .bound import Counts, Loop, bound
from .rates import CODE, GPUS

LOOPS = Path(__file__).resolve().parents[1] / "kernel_loops.json"
FEWEST = 4  # float32 instructions: fewer, and a loop is not about elements


class Counted(NamedTuple):
    """A compilation, and what an element takes in its loops: by architecture."""

    kernel: str
    what: tuple[str, ...]
    dtype: str
    counts: dict[str, Counts]


def _cuda_elements(kernel: str, variant: str, dtype: str, stores: bool) -> int:
    """Of a thread in a trip: kBatch eights, as each function of csrc/cuda/bn_act_*.cuh has it."""
    last = "channels_last" in variant
    second = "one norm" not in variant and "reapply" not in kernel
    if "bwd" in kernel:
        few = second or "cooperative" in kernel if stores else last or second
    else:
        few = stores and last and second
    return 8 * (4 if few else 8) // (4 if dtype == "fp32" else 2)


def _triton_elements(tile: str, warps: str, whole: bool) -> float:
    """Of a thread: in a batch, "16x64 x4", or in a tile where ``whole`` is false."""
    size, _, batch = tile.partition(" ")
    tiles = int(batch[1:]) if whole and batch else 1
    return math.prod(map(int, size.split("x"))) * tiles / (32 * int(warps))


def _is_of_elements(loop: Loop) -> bool:
    """And not of channels, whose arithmetic is in float64 and divides, or of their partial sums."""
    c = loop.counts
    return bool(c.bytes and c.fp32 >= FEWEST and not c.special and not loop.doubles)


def _products(loops: list[Loop]) -> Counts | None:
    """Of a multiply-add of matrices; memory is left out: what a loop loads, others have loaded
    into the L2 cache."""
    found = [loop.counts for loop in loops[1:] if loop.counts.tensor + loop.counts.tf32]
    exact = [loop.counts for loop in loops[1:] if loop.counts.fp32 >= loop.counts.issue / 2]
    if not found and not exact:
        return None
    total = sum(found or exact, Counts())
    return total._replace(bytes=0).over(total.tensor + total.tf32 or total.fp32)


def of_element(kernel: str, what: tuple[str, ...], dtype: str, loops: list[Loop]) -> Counts | None:
    """What an element takes: one of x, or of the products of a convolution. None: a kernel whose
    time is that of its launch, as of the merges of sums."""
    if "bn_act" not in kernel or "conv" in kernel:
        return _products(loops)
    if "merge" in kernel or "moments" in kernel:
        return None
    triton = kernel.startswith("_")
    found = [loop for loop in loops[1:] if _is_of_elements(loop)]
    if not found:  # one tile a program, and no loop
        found = loops[:1]
    elif triton and "statistics" in kernel:
        found = found[:1]  # the other is of the other BatchNorm, in programs of its own
    total = Counts()
    for loop in found:
        if triton:
            elements = _triton_elements(*what[:2], whole=loop.depth > 0 and not loop.stores)
        else:
            elements = _cuda_elements(kernel, what[0], dtype, loop.stores)
        total += loop.counts.over(elements)
    return total.over(1)


def counted(rows: Iterable, targets: list[str]) -> list[Counted]:
    """Of the rows of a section, those that have elements."""
    found = []
    for row in rows:
        counts = {
            target: of_element(row.kernel, row.what, row.dtype, list(resources.loops))
            for target, resources in zip(targets, row.found, strict=True)
            if target in {name for names in CODE.values() for name in names}
        }
        if counts and None not in counts.values():
            found.append(Counted(row.kernel, row.what, row.dtype, counts))
    return found


def _cells(counts: dict[str, Counts]) -> list[str]:
    """A column per GPU; "-" where the section has no code for it."""
    cells = []
    for gpu in GPUS:
        code = [counts[name] for name in CODE[gpu.capability] if name in counts]
        cells.append(str(bound(code[0], gpu)) if code else "-")
    return cells


def table(rows: list[Counted], labels: tuple[str, ...]) -> str:
    """Markdown; dtypes with the same figures share a row."""
    header = ["kernel", *labels, "dtype", *(f"{gpu.name}, predicted" for gpu in GPUS)]
    lines = [header, ["---"] * (len(labels) + 2) + ["--:"] * len(GPUS)]
    merged: dict[tuple, list[str]] = {}
    for row in rows:
        kernel = re.sub("_kernel$", "", row.kernel)
        merged.setdefault((kernel, *row.what, *_cells(row.counts)), []).append(row.dtype)
    for cells, dtypes in merged.items():
        at = 1 + len(labels)
        lines.append([*cells[:at], ", ".join(dtypes), *cells[at:]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(path: Path = LOOPS) -> dict[str, list[Counted]]:
    """By section."""
    if not path.exists():
        return {}
    return {
        section: [
            Counted(kernel, tuple(what), dtype, {k: Counts(**v) for k, v in counts.items()})
            for kernel, what, dtype, counts in rows
        ]
        for section, rows in json.loads(path.read_text()).items()
    }


def write(sections: dict[str, list[Counted]], path: Path = LOOPS) -> None:
    """A line per compilation; figures that are 0 are left out."""

    def line(row: Counted) -> str:
        counts = {
            name: {k: v for k, v in c._asdict().items() if v} for name, c in row.counts.items()
        }
        return json.dumps([*row[:3], counts])

    texts = [
        f"{json.dumps(name)}: [\n" + ",\n".join(map(line, rows)) + "\n]"
        for name, rows in sections.items()
    ]
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")
