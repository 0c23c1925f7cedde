"""Rows as they are looked up and shown: what the tables of a CPU and of a GPU share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

OURS = "fused_res-"
CL = "channels_last"
STEP = "forward+backward"


def load(results: Path) -> dict[str, dict[str, list[dict]]]:
    """Rows by device and suite, in the order of their names."""
    out: dict[str, dict[str, list[dict]]] = {}
    for path in sorted(results.glob("*/*.json")):
        out.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    return out


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


class Suite:
    """The rows of one suite on one device, looked up by workload, direction and allocator."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows
        self.workloads = unique(row["workload"] for row in rows)
        self.allocators = unique(row["allocator"] for row in rows)
        self.ours = unique(row["rival"] for row in rows if row["rival"].startswith(OURS))

    def row(self, workload: str, rival: str, direction: str, allocator: str) -> dict | None:
        """The rival's row; of two layouts the channels_last one."""
        found = [
            row
            for row in self.rows
            if (row["workload"], row["rival"], row["direction"], row["allocator"])
            == (workload, rival, direction, allocator)
        ]
        return max(found, key=lambda row: row["layout"] == CL, default=None)

    def speedup(
        self, workload: str, rival: str, direction: str, allocator: str, baselines: list[str]
    ) -> float | None:
        """Over the fastest of the baselines (``eager``, ``eager channels_last``, ...) that ran."""
        row = self.row(workload, rival, direction, allocator)
        if row is None:
            return None
        found = [
            ratio
            for base, ratio in row["speedup_over"].items()
            if base in baselines or base.split()[0] in baselines
        ]
        return min(found, default=None)


def to_markdown(header: list[str], body: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, align, *body)]


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
