"""Rows as they are looked up, and the tables that suites make of them: columns under headings."""

from __future__ import annotations

import fnmatch
import itertools
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
    "compile-freezing": "torch.compile, frozen",
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
ALLOCATORS = {"default": "Default allocator", "raised": "Allocator that keeps freed memory"}


def heading(candidate: str, quote: str = "`") -> str:
    """A candidate's name in words; quote: what is around code."""
    name, graphed, _ = candidate.partition(GRAPHED)
    known = max((k for k in HEADINGS if name == k or name.startswith(f"{k}-")), key=len, default="")
    words = [HEADINGS.get(known, known), name.removeprefix(known).strip("-")]
    words.append("in a CUDA graph" if graphed else "")
    return ", ".join(filter(None, words)).replace("`", quote)


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

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(candidate with fused kernels, allocator)"""
        return list(itertools.product(self.fused, self.allocators))

    def row(self, workload: str, candidate: str, direction: str, allocator: str) -> dict:
        """The candidate's row; of two layouts the channels_last one; empty where there is none."""
        fields = ("workload", "rival", "direction", "allocator")
        wanted = [workload, candidate, direction, allocator]
        found = [row for row in self.rows if [row[field] for field in fields] == wanted]
        return max(found, key=lambda row: row["layout"] == CL, default={})

    def speedup(
        self, workload: str, candidate: str, direction: str, allocator: str, *baselines: str
    ) -> float | None:
        """Over the fastest of the baselines (``eager``, ``eager channels_last``, ``compile*``, ...)
        that ran."""
        ratios = self.row(workload, candidate, direction, allocator).get("speedup_over", {})
        found = [
            ratio
            for label, ratio in ratios.items()
            if label in baselines
            or any(fnmatch.fnmatchcase(label.split()[0], base) for base in baselines)
        ]
        return min(found, default=None)

    def speedups(self, workloads: Iterable[str], *args: str) -> list[float | None]:
        """Of each workload; the other arguments as of ``speedup``."""
        return [self.speedup(workload, *args) for workload in workloads]


# --- columns


class Line(NamedTuple):
    """What a line of a table is about."""

    rows: Lookup
    workload: str
    candidate: str
    direction: str
    allocator: str

    def row(self, candidate: str, direction: str, allocator: str) -> dict:
        return self.rows.row(self.workload, candidate, direction, allocator)


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
        return number(line.rows.speedup(line.workload, name, way, line.allocator, *baselines))

    return Column(heading, cell)


def figure(
    heading: str, field: str, digits: str = ".3g", direction: str = "", of: str = ""
) -> Column:
    """A field of the row of the line's candidate, or of another's (``of``)."""

    def cell(line: Line) -> str:
        row = line.row(of or line.candidate, direction or line.direction, line.allocator)
        return number(row.get(field), digits)

    return Column(heading, cell)


def both_forms(heading: str, field: str, digits: str = ".3g") -> Column:
    """A field as the candidate is, and in a CUDA graph."""

    def cell(line: Line) -> str:
        names = line.candidate, line.candidate + GRAPHED
        rows = (line.row(name, line.direction, line.allocator) for name in names)
        return " / ".join(number(row.get(field), digits) for row in rows)

    return Column(f"{heading}, as it is / in a CUDA graph", cell)


def arrow(heading: str, field: str) -> Column:
    """A field of eager PyTorch's row, and of the candidate's."""

    def cell(line: Line) -> str:
        rows = (line.row(n, line.direction, line.allocator) for n in ("eager", line.candidate))
        return " → ".join(number(row.get(field), ".0f") for row in rows)

    return Column(f"{heading}: eager → fused", cell)


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
                out.append(self.table(found, name, allocator))
        if found.allocators == ["cuda"]:
            out.append(behind(found))
        return [*out, caption(rows)]

    def table(self, found: Lookup, candidate: str, allocator: str) -> str:
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


def to_markdown(header: list[str], body: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *body))


def replaced(text: str, begin: str, end: str, new: str) -> str:
    """``text`` with ``new`` between the two markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{begin} and {end} must each be there once, in this order")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{new}\n{end}{tail}"


def behind(found: Lookup) -> str:
    """Where the fastest candidate is not a fused one, and by how much."""
    # by workload and direction: the fastest row of the others and of the fused ones
    fastest: dict[tuple[str, str], dict[bool, dict]] = {}
    for row in found.rows:
        if row["median_ms"] is not None:
            of = fastest.setdefault((row["workload"], row["direction"]), {})
            fused = row["rival"].startswith(FUSED)
            of[fused] = min(of.get(fused, row), row, key=lambda one: one["median_ms"])
    lost, count = [], 0
    for line, of in fastest.items():
        if len(of) == 2:
            count += 1
            ratio = of[False]["median_ms"] / of[True]["median_ms"]
            if ratio < 1:
                name = f"{heading(of[False]['rival'])}, {of[False]['layout']}"
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


# --- whole networks: the README's table, of a CPU, in inference, with the default allocator

# suite -> what its networks run as, the candidate whose weights are as fixed as the rivals'
NETWORKS = {"inference": "fused_res-optimized", "chains": "fused_res-frozen"}
NETWORK_COLUMNS = (
    figure("PyTorch, ms", "median_ms", ".2f", of="eager"),
    figure("fused_res, ms", "median_ms", ".2f"),
    over("speed-up over PyTorch", f"eager {CL}"),
    over("over torch.compile", "compile-freezing"),
    over("over ONNX Runtime", "onnxruntime"),
    over("over OpenVINO", "openvino"),
)


def networks(devices: dict[str, dict[str, list[dict]]]) -> str:
    """A table for each CPU, under it where and when it was measured."""
    sections, header = [], ["inference, float32", *(column.heading for column in NETWORK_COLUMNS)]
    for suites in (suites for device, suites in devices.items() if device.startswith("cpu-")):
        body, shown = [], []
        for suite, candidate in NETWORKS.items():
            rows = [row for row in suites.get(suite, []) if "ResNet" in row["workload"]]
            found = Lookup(rows)
            for workload in found.workloads:
                line = Line(found, workload, candidate, "eval", found.allocators[0])
                cells = (column.cell(line) for column in NETWORK_COLUMNS)
                body.append([workload.removeprefix("torchvision "), *cells])
            shown += rows
        if body:
            sections += [to_markdown(header, body), _where(shown)]
    return "\n\n".join(sections) if sections else "No results yet."


def _where(rows: list[dict]) -> str:
    """Device, versions, commits and dates of the rows."""
    device, versions = rows[0]["device"], rows[0]["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino")]
    runs = " and ".join(unique(f"commit {row['commit']}, {row['date'][:10]}" for row in rows))
    isa = f"{device['isa']}, {device['cores']} cores, {device['threads']} threads"
    return f"*{device['name']} ({isa}), {', '.join(named)}, {runs}.*"
