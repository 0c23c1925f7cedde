"""Times PyTorch, torch.compile and fused_res side by side: ``python benchmarks/run.py --help``.

Every candidate is checked against float64 before it is timed. On a CPU each suite runs twice, in
child processes, under two settings of the allocator. Rows: see ``benchmarks/README.md``.
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

import torch
from harness.measure import Deadline, measure
from harness.rows import OUT_OF_TIME, RESULTS, environment, lines, losses, validate, write_rows
from harness.suite import FUSED, Candidate, Options, Workload
from suites import SUITES, workloads

START = time.monotonic()

# glibc gives every tensor over its threshold fresh pages from the kernel and takes them back, which
# can cost more than the kernels that are timed. "raised" keeps freed memory in the process.
KEEP = 2**32
ALLOCATORS = {
    "default": None,
    "raised": f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}:"
    f"glibc.malloc.top_pad={2**28}",
}
# what curves.py trains has neither
RUN = {name: suite for name, suite in SUITES.items() if suite.workloads or suite.rows}
_left_out: set[str] = set()


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--suite", choices=[*RUN, "all"], default="all")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    words = "a GPU's suites and candidates: the default on one; with --quick on a CPU too"
    add("--gpu", **flag, help=words)
    words = "tiny tensors, three rounds, no torch.compile: shows that everything runs"
    add("--quick", **flag, help=words)
    words = "workloads named so only; the direction may follow the name"
    add("--filter", default="", metavar="SUBSTR", help=words)
    add("--candidates", metavar="NAMES", help="these only, for example eager,fused_res-cuda")
    add("--rounds", type=int, help="default 15; quick 3")
    add("--threads", type=int, default=torch.get_num_threads())
    words = "begin nothing that would not be done N seconds from now: a row says so instead"
    add("--seconds", type=float, metavar="N", help=words)
    words = "torch.compile; with --gpu --quick for the first workload of a suite only"
    add("--compile", action=argparse.BooleanOptionalAction, help=words)
    words = "torch.compile's max-autotune too; it compiles for long (on a GPU: --suite autotune)"
    add("--max-autotune", **flag, help=words)
    words = "folder of <device>/<suite>.json; default benchmarks/results"
    add("--out", type=Path, help=f"{words}, and nothing with --quick or --filter")
    add("--child", help=argparse.SUPPRESS)
    add("--handed", type=Path, help=argparse.SUPPRESS)
    return complete(parser, parser.parse_args(argv))


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """What is not said follows from what is; a contradiction ends the process."""
    args.gpu |= args.device == "cuda"
    if args.suite != "all":
        if not args.gpu and not workloads(args.suite):
            parser.error(f"suite {args.suite} needs a GPU, or --gpu --quick to try it on a CPU")
        why = RUN[args.suite].why_not(args.device)
        if why:
            parser.error(f"suite {args.suite} cannot run: {why}")
    if args.rounds is None:
        args.rounds = 3 if args.quick else 15
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.compile is None:
        args.compile = not args.quick
    if args.out is None and not (args.quick or args.filter):
        args.out = RESULTS
    return args


def wanted(args: argparse.Namespace) -> list[str]:
    """Suites; what takes minutes only where it is named."""
    if args.suite != "all":
        return [args.suite]
    return [name for name, suite in RUN.items() if not (args.gpu and suite.named)]


def selected(args: argparse.Namespace) -> list[tuple[str, Workload]]:
    """(suite, workload) of everything to time."""
    return [
        (name, workload)
        for name in wanted(args)
        for workload in workloads(name, args.gpu, args.quick)
        if args.filter in f"{workload.name} {workload.directions[-1]}"
    ]


def candidates(args: argparse.Namespace, workload: Workload, first: bool) -> list[Candidate]:
    """Those that can run; the others are listed once, with the reason. first: of its suite."""
    compiled = args.compile and (first or not (args.gpu and args.quick))
    options = Options(args.gpu, compiled, args.max_autotune)
    found = workload.candidates(args.device, options)
    if args.candidates:
        found = [one for one in found if one.name in args.candidates.split(",")]
    for one in found:
        line = f"left out: {one.name}: {one.why_not}"
        if one.why_not and line not in _left_out:
            _left_out.add(line)
            print(line)
    return [one for one in found if one.why_not is None]


class Log:
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


def time_all(args: argparse.Namespace, log: Log) -> None:
    torch.set_num_threads(args.threads)
    # for every candidate alike, as users set it who time their nets
    torch.backends.cudnn.benchmark = args.device == "cuda"
    deadline = Deadline() if args.seconds is None else Deadline(START + args.seconds)
    for name in wanted(args) if args.gpu else []:
        if RUN[name].rows:
            for row in RUN[name].rows(args.device, args.rounds, args.quick):
                log.add(name, [row])
    todo = selected(args)
    for i, (suite, workload) in enumerate(todo):
        # else the eighth shape of one function is silently run uncompiled
        torch.compiler.reset()
        gc.collect()
        gc.freeze()  # the collector is called before every graph: it need not look at libraries
        first = i == 0 or todo[i - 1][0] != suite
        found = measure(
            workload,
            candidates(args, workload, first),
            args.device,
            args.rounds,
            least_ms=1.0 if args.quick else 20.0,
            memory=log.allocator != "raised",  # the same bytes under either allocator
            deadline=deadline,
            # the first workloads get more than the last, but must not use up their time
            share=deadline.share(min(1.0, 2 / (len(todo) - i))),
            progress=lambda rows, suite=suite: log.write(suite, log.complete(rows)),
        )
        log.add(suite, found)
    gc.unfreeze()


def run_child(args: argparse.Namespace, argv: list[str], log: Log, allocator: str) -> None:
    """Times everything in a process with the allocator's setting; its rows are added to the log."""
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
        handed.write_text(json.dumps([log.where, log.rows]))
        command = [sys.executable, __file__, *argv, "--child", allocator, "--handed", str(handed)]
        subprocess.run(command, env=environ, check=True)
        log.rows = json.loads(handed.read_text())[1]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.child:
        where, before = json.loads(args.handed.read_text())
        log = Log(None, where, args.child, before)  # the parent writes, when all is done
        time_all(args, log)
        args.handed.write_text(json.dumps([where, log.rows]))
        return 0
    if not selected(args) and (args.suite == "all" or not RUN[args.suite].rows):
        print(f"no workload's name contains {args.filter!r}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    where = environment(args.device)
    print(json.dumps(where))
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if args.compile and not args.max_autotune and args.suite == "all":
        print("torch.compile's max-autotune is left out: slow to compile, see --help")
    log = Log(args.out, where, "cuda" if args.device == "cuda" else "default", {})
    if args.gpu:
        time_all(args, log)
    else:
        for allocator in ALLOCATORS:
            run_child(args, argv, log, allocator)
        for suite in log.rows:
            log.write(suite, [])
    rows = [row for suite in log.rows.values() for row in suite]
    found = losses(rows)
    print("\n".join(["losses of fused_res:", *found]) if found else "no losses of fused_res")
    if args.out is None:
        print("nothing written (--quick and --filter write only where --out says)")
    else:
        for suite in log.rows:
            print(f"wrote {log.path(suite)}")
    refused = [row for row in rows if row["refused"] and row["rival"].startswith(FUSED)]
    return 1 if any(row["refused"] != OUT_OF_TIME for row in refused) else 0


if __name__ == "__main__":
    sys.exit(main())
