"""Rows as they are looked up, and the tables that suites make of them: columns under headings."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness.suite import CL, FUSED

COMPILED = "compile*"  # every mode of torch.compile
GRAPHED = "-graphed"
HEADINGS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "cudnn-fused": "cuDNN's fused calls",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fused_res-auto": "`fuse_`",
    "fused_res-cpu": "CPU kernels",
    "fused_res-cuda": "CUDA kernels",
    "fused_res-triton": "Triton kernels",
    "fused_res-optimized": "`optimize_for_inference`",
    "fused_res-frozen": "`optimize_for_inference(freeze=True)`",
}


# the two of a CPU, see docs/performance.md
ALLOCATORS = {
    "default": "Default allocator",
    "raised": "Allocator that keeps freed memory",
}


def heading(candidate: str) -> str:
    """A candidate's name in words."""
    name, graphed, _ = candidate.partition(GRAPHED)
    known = max((k for k in HEADINGS if name == k or name.startswith(f"{k}-")), key=len, default="")
    words = [HEADINGS.get(known, known), name.removeprefix(known).strip("-")]
    return ", ".join(filter(None, [*words, "in a CUDA graph" if graphed else ""]))


def load(results: Path) -> dict[str, dict[str, list[dict]]]:
    """Rows by device and suite, in the order of their names."""
    out: dict[str, dict[str, list[dict]]] = {}
    for path in sorted(results.glob("*/*.json")):
        out.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    return out


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


class Lookup:
    """The rows of one suite on one device, looked up by workload, direction and allocator.

    ``fused``: the candidates with fused kernels; ``backends``: those that run as they are, without
    CUDA graphs and torch.compile.
    """

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows
        self.workloads = unique(row["workload"] for row in rows)
        self.allocators = unique(row["allocator"] for row in rows)
        self.fused = unique(row["rival"] for row in rows if row["rival"].startswith(FUSED))
        self.backends = [name for name in self.fused if re.fullmatch(rf"{FUSED}[a-z0-9]+", name)]

    def row(self, workload: str, candidate: str, direction: str, allocator: str) -> dict | None:
        """The candidate's row; of two layouts the channels_last one."""
        found = [
            row
            for row in self.rows
            if (row["workload"], row["rival"], row["direction"], row["allocator"])
            == (workload, candidate, direction, allocator)
        ]
        return max(found, key=lambda row: row["layout"] == CL, default=None)

    def speedup(
        self, workload: str, candidate: str, direction: str, allocator: str, baselines: list[str]
    ) -> float | None:
        """Over the fastest of the baselines (``eager``, ``eager channels_last``, ``compile*``, ...)
        that ran."""
        row = self.row(workload, candidate, direction, allocator) or {"speedup_over": {}}
        found = [
            ratio
            for label, ratio in row["speedup_over"].items()
            if label in baselines
            or any(fnmatch.fnmatchcase(label.split()[0], base) for base in baselines)
        ]
        return min(found, default=None)

    def fastest(self, workload: str, direction: str, fused: bool) -> dict | None:
        rows = [
            row
            for row in self.rows
            if (row["workload"], row["direction"]) == (workload, direction)
            and row["median_ms"] is not None
            and row["rival"].startswith(FUSED) == fused
        ]
        return min(rows, key=lambda row: row["median_ms"], default=None)


# --- columns


class Line(NamedTuple):
    """What a line of a table is about."""

    rows: Lookup
    workload: str
    candidate: str
    direction: str
    allocator: str

    def row(self, candidate: str, direction: str, allocator: str) -> dict:
        return self.rows.row(self.workload, candidate, direction, allocator) or {}


class Column(NamedTuple):
    heading: str
    cell: Callable[[Line], str]


def number(x: float | None, digits: str = ".2f") -> str:
    return "-" if x is None else format(x, digits)


def over(
    heading: str, *baselines: str, direction: str = "", of: str = "", graphed: bool = False
) -> Column:
    """Speed-up over the fastest of the baselines.

    Args:
        direction: default: the line's.
        of: a candidate; default: the table's, ``graphed``: in a CUDA graph.
    """

    def cell(line: Line) -> str:
        name = (of or line.candidate) + GRAPHED * graphed
        way = direction or line.direction
        return number(line.rows.speedup(line.workload, name, way, line.allocator, baselines))

    return Column(heading, cell)


def figure(
    heading: str, field: str, digits: str = ".3g", direction: str = "", of: str = ""
) -> Column:
    """A field of the row of the line's candidate, or of another's (``of``)."""

    def cell(line: Line) -> str:
        row = line.row(of or line.candidate, direction or line.direction, line.allocator)
        return number(row.get(field), digits)

    return Column(heading, cell)


def _pair(
    heading: str, names: Callable[[str], tuple[str, str]], field: str, digits: str, mark: str
):
    """A field of two candidates' rows, under the first allocator."""

    def cell(line: Line) -> str:
        allocator = line.rows.allocators[0]
        rows = (line.row(name, line.direction, allocator) for name in names(line.candidate))
        return mark.join(number(row.get(field), digits) for row in rows)

    return Column(heading, cell)


def both_forms(heading: str, field: str, digits: str = ".3g") -> Column:
    """A field as the candidate is, and in a CUDA graph."""
    heading = f"{heading}, as it is / in a CUDA graph"
    return _pair(heading, lambda name: (name, name + GRAPHED), field, digits, " / ")


def arrow(heading: str, field: str, digits: str = ".0f") -> Column:
    """A field of eager PyTorch's row, and of the candidate's."""
    return _pair(f"{heading}: eager → fused", lambda name: ("eager", name), field, digits, " → ")


def saved(direction: str = "") -> Column:
    """MiB kept for backward, which eval mode does not have."""

    def cell(line: Line) -> str:
        rows = [line.row(n, "saved", line.rows.allocators[0]) for n in ("eager", line.candidate)]
        if (direction or line.direction) == "eval" or not all(rows):
            return "-"
        return " → ".join(f"{row['bytes'] / 2**20:.3g}" for row in rows)

    return Column("saved for backward, MiB: eager → fused", cell)


# over what a GPU's blocks and nets are held against
AGAINST = (
    over("over PyTorch, NCHW", "eager NCHW"),
    over(f"over PyTorch, {CL}", f"eager {CL}"),
    over("over torch.compile", COMPILED),
    over("over cuDNN's fused calls", "cudnn-fused"),
    over("in CUDA graphs, over the fastest of the others", "eager-graphed", "cudnn-fused-graphed",
         "compile-reduce-overhead", graphed=True),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A suite's rows -> for each candidate a paragraph and a table for each allocator, then where
    they were made.

    title: of the section. intro: with ``{candidate}`` in it.
    first: heading of the workloads' column.
    by_direction: a line for each direction, which is named; else for each workload.
    candidates: what is shown of those that are there; default, or where there is none: every fused
    one that runs as it is.
    """

    title: str
    intro: str
    first: str
    columns: list[Column] = field(default_factory=list)
    by_direction: bool = False
    candidates: tuple[str, ...] = ()

    def __call__(self, rows: list[dict]) -> list[str]:
        found, out = Lookup(rows), [f"### {self.title}"]
        for name in [c for c in self.candidates if c in found.fused] or found.backends:
            out.append(self.intro.format(candidate=heading(name)) + " Under 1 is slower.")
            for allocator in found.allocators:
                if len(found.allocators) > 1:
                    out.append(f"**{ALLOCATORS[allocator]}**")
                out.append("\n".join(self.table(found, name, allocator)))
        if found.allocators == ["cuda"]:
            out.append(behind(found))
        return [*out, caption(rows)]

    def table(self, found: Lookup, candidate: str, allocator: str) -> list[str]:
        mode = ["mode"] if self.by_direction else []
        body = []
        for workload, direction in self._lines(found):
            line = Line(found, workload, candidate, direction, allocator)
            shown = [workload.removeprefix("bn_act ")]
            if self.by_direction:
                shown.append("eval" if direction == "eval" else "training")
            body.append([*shown, *(column.cell(line) for column in self.columns)])
        return to_markdown([self.first, *mode, *(c.heading for c in self.columns)], body)

    def _lines(self, found: Lookup) -> list[tuple[str, str]]:
        timed = [row for row in found.rows if row["direction"] != "saved"]
        lines = unique((row["workload"], row["direction"]) for row in timed)
        if self.by_direction:
            return lines
        # the direction matters to columns without one of their own: the last, which is checked
        return list(dict(lines).items())


def to_markdown(header: list[str], body: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, align, *body)]


def behind(found: Lookup) -> str:
    """Where the fastest candidate is not a fused one, and by how much."""
    rows = [row for row in found.rows if row["direction"] != "saved"]
    lost, count = [], 0
    for line in unique((row["workload"], row["direction"]) for row in rows):
        fused, other = found.fastest(*line, fused=True), found.fastest(*line, fused=False)
        if fused and other:
            count += 1
            if other["median_ms"] < fused["median_ms"]:
                ratio = other["median_ms"] / fused["median_ms"]
                name = f"{heading(other['rival'])}, {other['layout']}"
                lost.append(f"{', '.join(line)}: {ratio:.2f} ({name})")
    head = f"The fastest fused candidate loses to the fastest other in {len(lost)} of {count}"
    return f"{head}: {'; '.join(lost)}." if lost else f"{head}."


def claims(*found: tuple[str, list[float | None], float, int, int]) -> list[tuple[bool, str]]:
    """(met, what) of (what, figures, the least of them, how many must reach it, of how many)."""
    out = []
    for what, figures, least, enough, total in found:
        met = sum(x is not None and x >= least for x in figures)
        shown = " ".join(map(number, figures))
        text = f"{what}, >= {least:.2f} on {enough} of {total}: {shown}"
        out.append((met >= enough and len(figures) >= total, text))
    return out


def on_device(row: dict) -> dict:
    """What a timing row says of where it was measured."""
    device = {"device": row["device"]["name"], "isa": row["device"]["isa"]}
    return {**device, "dtype": row["dtype"], "layout": row["layout"]}


def made(rows: list[dict]) -> str:
    """Commits and dates of the rows; of more than one run, which workloads are of each."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        runs.setdefault(f"{row['commit']}, {row['date'][:10]}", []).append(row["workload"])
    if len(runs) == 1:
        return f"commit {next(iter(runs))}"
    return "; ".join(f"{', '.join(unique(w))}: commit {run}" for run, w in runs.items())


def caption(rows: list[dict]) -> str:
    """Device, versions, commit and date of the rows."""
    row = rows[0]
    d, v = row["device"], row["versions"]
    versions = ", ".join(f"{name} {number}" for name, number in v.items() if number)
    units = f"{d['cores']} cores, {d['threads']} threads"
    if d["isa"].startswith("sm_"):
        units = f"{d['cores']} multiprocessors"
    dtypes = ", ".join(unique(row["dtype"] for row in rows))
    return f"*{d['name']} ({d['isa']}, {units}), {dtypes}, {versions}, {made(rows)}.*"
