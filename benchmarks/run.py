"""Times PyTorch, torch.compile and fused_res side by side: ``python benchmarks/run.py --help``.

Every rival is checked against float64 before it is timed. On a CPU each suite runs twice, in child
processes, under two settings of the allocator. Rows are described in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peaks
import torch
from machine import ROOT, environment
from measure import Deadline, measure
from rivals import compile_modes, inference_modes, rivals
from rows import OUT_OF_TIME, lines, losses, validate, write_rows
from workloads import CPU_SUITES, GPU_SUITES, NAMED, Workload, suites

from fused_res.dispatch.backends import why_not

START = time.monotonic()
RESULTS = ROOT / "benchmarks" / "results"

# glibc gives every tensor over its threshold fresh pages from the kernel and takes them back, which
# can cost more than the kernels that are timed. "raised" keeps freed memory in the process.
KEEP = 2**32
ALLOCATORS = {
    "default": None,
    "raised": f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}:"
    f"glibc.malloc.top_pad={2**28}",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=["peaks", *GPU_SUITES, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="a GPU's suites and rivals: the default on one; with --quick they run on a CPU too",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny tensors, three rounds, no torch.compile: shows that everything runs",
    )
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="workloads named so only")
    parser.add_argument("--rounds", type=int, default=None, help="default 15; quick 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        metavar="N",
        help="begin nothing that would not be done N seconds from now: a row says so instead",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile; with --gpu --quick for the first workload of a suite only",
    )
    parser.add_argument(
        "--max-autotune",
        action="store_true",
        help="torch.compile's max-autotune too; it compiles for long (on a GPU: --suite autotune)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of <device>/<suite>.json; default {RESULTS.relative_to(ROOT)}, "
        "and nothing with --quick or --filter",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--handed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.gpu |= args.device == "cuda"
    if args.suite not in ("all", *CPU_SUITES) and not args.gpu:
        parser.error(f"suite {args.suite} needs a GPU, or --gpu --quick to try it on a CPU")
    if args.suite == "training-convs":
        reason = why_not("bn_act", "triton", args.device, torch.bfloat16)
        if reason:
            parser.error(f"suite {args.suite} needs Triton, on a CPU TRITON_INTERPRET=1: {reason}")
    if args.rounds is None:
        args.rounds = 3 if args.quick else 15
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.compile is None:
        args.compile = not args.quick
    if args.out is None and not (args.quick or args.filter):
        args.out = RESULTS
    return args


def workloads(args: argparse.Namespace) -> list[tuple[str, Workload]]:
    """(suite, workload) of everything to time; what takes minutes only where it is named."""
    known = suites(args.gpu, args.quick)
    wanted = [args.suite]
    if args.suite == "all":
        wanted = [s for s in known if not (args.gpu and s in NAMED)]
    return [(s, w) for s in wanted for w in known.get(s, []) if args.filter in w.name]


def modes(args: argparse.Namespace, suite: str, first: bool) -> dict[str, dict]:
    """torch.compile's modes that run a workload, ``first`` of its suite or not."""
    if not args.compile or (args.gpu and args.quick and not first):
        return {}
    if suite.startswith("inference") or suite == "chains":
        return inference_modes(suite, args.gpu)
    if suite == "autotune":
        return compile_modes("max-autotune")
    names = ["default"]
    names += ["reduce-overhead"] * args.gpu + ["max-autotune"] * args.max_autotune
    return compile_modes(*names)


class Sheet:
    """The rows of a run by suite, written again whenever some are added."""

    def __init__(self, out: Path | None, where: dict, allocator: str, before: dict) -> None:
        self.out, self.where, self.allocator = out, where, allocator
        self.rows: dict[str, list[dict]] = before

    def complete(self, rows: list[dict]) -> list[dict]:
        return [{**row, "allocator": self.allocator, **self.where} for row in rows]

    def path(self, suite: str) -> Path:
        return self.out / self.where["device"]["slug"] / f"{suite}.json"

    def write(self, suite: str, rows: list[dict]) -> None:
        """Writes the suite's rows and ``rows``, complete ones of a workload under way."""
        if self.out is not None:
            write_rows(self.path(suite), [*self.rows.get(suite, []), *rows])

    def add(self, suite: str, rows: list[dict]) -> None:
        rows = self.complete(rows)
        for row in rows:
            validate(row)
        self.write(suite, rows)
        self.rows.setdefault(suite, []).extend(rows)
        print("\n".join(lines(rows)), flush=True)


def time_all(args: argparse.Namespace, sheet: Sheet) -> None:
    torch.set_num_threads(args.threads)
    # for every rival alike, as users set it who time their nets
    torch.backends.cudnn.benchmark = args.device == "cuda"
    deadline = Deadline() if args.seconds is None else Deadline(START + args.seconds)
    if args.gpu and args.suite in ("all", "peaks"):
        for row in peaks.measure(args.device, args.rounds, args.quick):
            sheet.add("peaks", [row])
    todo = workloads(args)
    for i, (suite, workload) in enumerate(todo):
        # else the eighth shape of one function is silently run uncompiled
        torch.compiler.reset()
        gc.collect()
        gc.freeze()  # the collector is called before every graph: it need not look at libraries
        first = i == 0 or todo[i - 1][0] != suite
        found = measure(
            workload,
            rivals(workload, args.device, modes(args, suite, first), args.gpu),
            args.device,
            args.rounds,
            least_ms=1.0 if args.quick else 20.0,
            memory=sheet.allocator != "raised",  # the same bytes under either allocator
            deadline=deadline,
            # the first workloads get more than the last, but must not use up their time
            share=deadline.share(min(1.0, 2 / (len(todo) - i))),
            progress=lambda rows, suite=suite: sheet.write(suite, sheet.complete(rows)),
        )
        sheet.add(suite, found)
    gc.unfreeze()


def run_child(args: argparse.Namespace, argv: list[str], sheet: Sheet, allocator: str) -> None:
    """Times everything in a process with the allocator's setting; its rows are added to sheet's."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environ.pop("GLIBC_TUNABLES", None)
    if ALLOCATORS.get(allocator):
        environ["GLIBC_TUNABLES"] = ALLOCATORS[allocator]
    environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.seconds is not None:
        argv = [*argv, "--seconds", str(args.seconds - (time.monotonic() - START))]
    with tempfile.TemporaryDirectory() as folder:
        environ["FUSED_RES_CACHE"] = folder  # what was tuned before does not choose
        handed = Path(folder) / "rows.json"
        handed.write_text(json.dumps([sheet.where, sheet.rows]))
        command = [sys.executable, __file__, *argv, "--child", allocator, "--handed", str(handed)]
        subprocess.run(command, env=environ, check=True)
        sheet.rows = json.loads(handed.read_text())[1]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.child:
        where, before = json.loads(args.handed.read_text())
        sheet = Sheet(None, where, args.child, before)  # the parent writes, when all is done
        time_all(args, sheet)
        args.handed.write_text(json.dumps([where, sheet.rows]))
        return 0
    if not workloads(args) and args.suite != "peaks":
        print(f"no workload's name contains {args.filter!r}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    where = environment(args.device)
    print(json.dumps(where))
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if args.compile and not args.max_autotune and args.suite not in NAMED:
        print("torch.compile's max-autotune is left out: slow to compile, see --help")
    sheet = Sheet(args.out, where, "cuda" if args.device == "cuda" else "default", {})
    if args.gpu:
        time_all(args, sheet)
    else:
        for allocator in ALLOCATORS:
            run_child(args, argv, sheet, allocator)
        for suite in sheet.rows:
            sheet.write(suite, [])
    rows = [row for suite in sheet.rows.values() for row in suite]
    found = losses(rows)
    print("\n".join(["losses of fused_res:", *found]) if found else "no losses of fused_res")
    if args.out is None:
        print("nothing written (--quick and --filter write only where --out says)")
    else:
        for suite in sheet.rows:
            print(f"wrote {sheet.path(suite)}")
    refused = [row for row in rows if row["refused"] and row["rival"].startswith("fused_res")]
    return 1 if any(row["refused"] != OUT_OF_TIME for row in refused) else 0


if __name__ == "__main__":
    sys.exit(main())
