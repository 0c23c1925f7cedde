"""The tables of README.md and docs/performance.md, from committed rows: see ``--help``.

README.md has a table of whole networks, between ``<!-- bench:begin networks -->`` and
``<!-- bench:end -->``; docs/performance.md has all tables, after ``<!-- bench:begin -->``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.rows import RESULTS
from report import plot
from report.tables import load, networks, replaced
from suites import SUITES

from fused_res.dispatch import user_timings

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BEGIN_NETWORKS = "<!-- bench:begin networks -->"


def targets(found: dict[str, list[dict]]) -> list[tuple[bool, str]]:
    """(met, what) of every figure that one CPU's rows are held to, 2 threads, float32."""
    return [line for name in SUITES if name in found for line in SUITES[name].targets(found[name])]


def goals(found: dict[str, list[dict]]) -> list[tuple[bool, str]]:
    """(met, what) of what is aimed at and not demanded."""
    return [line for name in SUITES if name in found for line in SUITES[name].goals(found[name])]


def markdown(results: Path) -> str:
    """Every committed suite as a table under a line that says where and when it was measured."""
    sections = []
    for device, found in load(results).items():
        for name, suite in SUITES.items():
            report = suite.report if device.startswith("cpu-") else suite.gpu_report
            if report and found.get(name):
                sections += report(found[name])
    return "\n\n".join(sections) if sections else "No results yet."


def timings_of_gpus(results: Path) -> list[dict]:
    """The rows of the tables that first use and ``tune`` wrote on GPUs."""
    rows = []
    for path in sorted(results.glob("timings/*.json")):
        made, found, _ = user_timings.load(path)
        if "driver" in made:
            device, _, isa = made["device"].rpartition(", ")
            rows += [row._replace(device=device, isa=isa)._asdict() for row in found]
    return rows


def dispatch(results: Path) -> str:
    """JSON of GPUs' timing rows, from which ``auto`` chooses: ``shipped_timings.json``."""
    rows = [
        row
        for device, found in load(results).items()
        if not device.startswith("cpu-")
        for name, suite in SUITES.items()
        for row in suite.timings(found.get(name, []))
    ]
    rows += timings_of_gpus(results)
    lines = [json.dumps(row) for row in rows if "eager" in row["ms"]]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def print_targets(results: Path) -> int:
    cpus = [found for device, found in load(results).items() if device.startswith("cpu-")]
    demanded, aims = ([line for found in cpus for line in f(found)] for f in (targets, goals))
    for met, what in demanded:
        print(f"{'pass' if met else 'FAIL'}  {what}")
    for met, what in aims:
        print(f"{'met ' if met else 'not '}  goal: {what}")
    return 0 if demanded and all(met for met, _ in demanded) else 1


def update(path: Path, results: Path, check: bool) -> int:
    """Replaces the tables in a file, or says whether they are out of date."""
    text = path.read_text()
    try:
        if BEGIN_NETWORKS in text:
            new = replaced(text, BEGIN_NETWORKS, END, networks(load(results)))
        else:
            new = replaced(text, BEGIN, END, markdown(results))
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    if check and new != text:
        print(f"{path} is out of date: python benchmarks/table.py --write {path}")
    if not check and new != text:
        path.write_text(new)
    return int(check and new != text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    mode = parser.add_mutually_exclusive_group()
    add = mode.add_argument
    add("--write", type=Path, metavar="FILE", help="replace the tables in FILE")
    add("--check", type=Path, metavar="FILE", help="exit 1 where FILE's differ")
    words = "write what `auto` follows, shipped_timings.json"
    add("--dispatch", type=Path, metavar="FILE", help=words)
    words = "write speed.png, curves.png and chains.png of one device beside its rows"
    add("--plots", type=Path, metavar="FOLDER", help=words)
    words = "hold CPU results against the targets, and show how far the goals are"
    add("--targets", action="store_true", help=words)
    args = parser.parse_args(argv)
    if args.targets:
        return print_targets(args.results)
    if args.plots:
        return plot.write(args.plots, SUITES)
    if args.dispatch:
        args.dispatch.write_text(dispatch(args.results))
        return 0
    if args.write or args.check:
        return update(args.write or args.check, args.results, check=args.write is None)
    print(markdown(args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
