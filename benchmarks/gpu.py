"""What a GPU is asked, in one command: ``make gpu``, or ``python benchmarks/gpu.py [PART ...]``.

Builds the libraries for the GPU that is present, runs its tests, checks small shapes with
compute-sanitizer, times the suites, and writes a log, rows and a plot. Each part is a process of
its own with a time limit, and can be run singly. Without a GPU the same parts run on what there is:
the libraries are built for the CPU, the tests skip, the suites time tiny tensors on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # it may not be installed yet
from suites import SUITES as REGISTERED  # noqa: E402

HAS_GPU = torch.cuda.is_available()

# Seconds; 540 in all. What other parts leave, the suites share.
LIMITS = {"build": 120, "tests": 130, "sanitizer": 50, "peaks": 20, "ops": 45, "blocks": 45,
          "nets": 50, "inference": 45, "chains": 20, "plots": 15}  # fmt: skip
SUITES = [name for name, suite in REGISTERED.items() if suite.workloads or suite.rows]
# run only when named: they take minutes
NAMED = {name: 500 for name in [*SUITES, "curves"] if name not in LIMITS}
# a suite begins nothing that would end later than this before its limit
MARGIN = 12


def _build() -> list[list[str]]:
    environ = ["FUSED_RES_BUILD_CUDA=0"]
    if HAS_GPU:
        major, minor = torch.cuda.get_device_capability()
        suffix = "a" if major >= 9 else ""
        environ = ["FUSED_RES_BUILD_CUDA=1", f"TORCH_CUDA_ARCH_LIST={major}.{minor}{suffix}"]
    module = [sys.executable, "-m"]
    install = [*module, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    return [["env", *environ, *install], [*module, "fused_res", "doctor"]]


def _tests() -> list[list[str]]:
    # Triton compiles on the CPU, for longer than the kernels run
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    run = [sys.executable, "-m", "pytest", "-q", *parallel, "-m", "gpu"]
    convs = ["tests/conv_bn_act/test_gpu.py", "tests/conv_halo/test_gpu.py"]
    return [
        [*run, "tests/bn_act/test_gpu.py"],
        [*run, *convs, "tests/serve/test_optimize.py"],
        [*run, "tests/res_chain/test_gpu.py"],
        [*run, "tests/res_block/test_gpu.py"],
        [*run, "tests/dispatch/test_gpu.py"],
    ]


def _sanitizer() -> list[list[str]]:
    cases = [sys.executable, "tests/tools/sanitizer_cases.py"]
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not HAS_GPU or not Path(found).exists():
        return [["echo", "no GPU or no compute-sanitizer: the cases run unchecked"], cases]
    # PyTorch asks for features that a driver may refuse, and copes: kernels alone are checked
    options = ["--error-exitcode", "1", "--report-api-errors", "no"]
    return [[found, "--tool", tool, *options, *cases] for tool in ("memcheck", "racecheck")]


def _suite(name: str, rows: Path, limit: float) -> list[list[str]]:
    run = [sys.executable, "benchmarks/run.py", "--gpu", "--suite", name, "--out", str(rows)]
    run += ["--seconds", f"{max(limit - MARGIN, limit / 2):.0f}"]
    if HAS_GPU:
        return [[*run, "--rounds", "7"]]
    # one thread: others may be at work on a machine without a GPU
    run += ["--quick", "--compile", "--threads", "1"]
    return [["env", "TRITON_INTERPRET=1", *run] if name == "training-convs" else run]


def _plots(rows: Path) -> list[list[str]]:
    folders = {path.parent for name in SUITES for path in rows.glob(f"*/{name}.json")}
    wanted = sorted(str(f) for f in folders if f.name.startswith("cpu-") != HAS_GPU)
    return [[sys.executable, "benchmarks/table.py", "--plots", folder] for folder in wanted]


def _curves(rows: Path) -> list[list[str]]:
    run = [sys.executable, "benchmarks/curves.py", "--out", str(rows)]
    return [run + ([] if HAS_GPU else ["--quick", "--threads", "1"])]


def commands(part: str, rows: Path, limit: float) -> list[list[str]]:
    if part in SUITES:
        return _suite(part, rows, limit)
    if part in ("plots", "curves"):
        return {"plots": _plots, "curves": _curves}[part](rows)
    return {"build": _build, "tests": _tests, "sanitizer": _sanitizer}[part]()


def say(line: str, log: TextIO) -> None:
    """On the screen and in the log."""
    print(line, flush=True)
    print(line, file=log, flush=True)


def run(part: str, rows: Path, limit: float, log: TextIO, cache: Path) -> bool:
    """Runs one part, its output on the screen and in the log; whether it passed.

    What is tuned goes to the folder ``cache``: what was tuned before does not choose.
    """
    environ = {**os.environ, "FUSED_RES_CACHE": str(cache)}
    begin, passed = time.monotonic(), True
    for command in commands(part, rows, limit):
        left = limit - (time.monotonic() - begin)
        limited = ["timeout", "--kill-after=5", f"{max(left, 1):.0f}", *command]
        process = subprocess.Popen(limited, cwd=ROOT, env=environ, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)  # fmt: skip
        for line in process.stdout:
            say(line.removesuffix("\n"), log)
        passed &= process.wait() == 0
    return passed


def keep_timings(part: str, cache: Path, rows: Path) -> None:
    """Keeps the tables that first use and ``tune`` wrote, for ``table.py --dispatch``."""
    for path in cache.glob("tuned-*.json"):
        (rows / "timings").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, rows / "timings" / f"{part}-{path.name}")


def limits_left(names: list[str], total: float, elapsed: float) -> float:
    """Seconds for the first of ``names``: its limit; a suite's grows with what was not used."""
    limit = LIMITS[names[0]]
    if names[0] not in SUITES:
        return limit
    return (total - elapsed) * limit / sum(LIMITS[part] for part in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = f"default: {' '.join(LIMITS)}; only when named: {' '.join(NAMED)}"
    parser.add_argument("part", nargs="*", help=words)
    words = f"of each part that is named; default {LIMITS | NAMED}"
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=words)
    words = "folder; default $OUT, else build/gpu for the log, benchmarks/results for a GPU's rows"
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help=words)
    args = parser.parse_args()
    known = LIMITS | NAMED
    unknown = set(args.part) - set(known)
    if unknown:
        parser.error(f"part must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    if args.limit is not None and not args.part:
        parser.error("--limit is of the parts that are named, and none is")
    out = Path(args.out or ROOT / "build" / "gpu").resolve()
    rows = out
    if HAS_GPU:
        print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
        rows = out if args.out else ROOT / "benchmarks" / "results"
    else:
        print("no GPU: a dry run, of what can run without one; its figures mean nothing")
    out.mkdir(parents=True, exist_ok=True)
    names = args.part or list(LIMITS)
    results, start = {}, time.monotonic()
    with open(out / "gpu.log", "a" if args.part else "w") as log:
        for i, part in enumerate(names):
            begin = time.monotonic()
            limit = args.limit or NAMED.get(part) or (LIMITS[part] if args.part else None)
            limit = limit or limits_left(names[i:], sum(LIMITS.values()), begin - start)
            say(f"--- {part}, at most {limit:.0f} s", log)
            with tempfile.TemporaryDirectory() as cache:
                passed = run(part, rows, limit, log, Path(cache))
                keep_timings(part, Path(cache), rows)
            results[part] = passed, time.monotonic() - begin
        for part, (passed, seconds) in results.items():
            say(f"{part:10} {'passed' if passed else 'FAILED':7} {seconds:6.1f} s", log)
    print(f"log: {out / 'gpu.log'}; rows: {rows}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
