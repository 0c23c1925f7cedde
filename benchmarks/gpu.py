"""What a GPU is asked, in one command: ``make gpu``, or ``python benchmarks/gpu.py [PART ...]``.

Builds the libraries for the GPU that is present, runs its tests, checks small shapes with
compute-sanitizer, times the suites, and writes logs and rows. Each part is a process of its own
with a time limit, and can be run singly. Without a GPU the same parts run on what there is: the
libraries are built for the CPU, the tests skip, the suites time tiny tensors on the CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()


def _build() -> list[list[str]]:
    environ = ["FUSED_RES_BUILD_CUDA=0"]
    if HAS_GPU:
        major, minor = torch.cuda.get_device_capability()
        suffix = "a" if major >= 9 else ""
        environ = ["FUSED_RES_BUILD_CUDA=1", f"TORCH_CUDA_ARCH_LIST={major}.{minor}{suffix}"]
    install = ["pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    return [["env", *environ, sys.executable, "-m", *install], [sys.executable, "-m", "fused_res",
                                                                "doctor"]]  # fmt: skip


def _tests() -> list[list[str]]:
    return [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]]


def _sanitizer() -> list[list[str]]:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not HAS_GPU or not Path(found).exists():
        return [["echo", "no GPU or no compute-sanitizer: nothing to check"]]
    tests = ["-m", "pytest", "-q", "-x", "-m", "gpu", "tests/test_gpu.py", "-k",
             "cuda and masks"]  # fmt: skip
    return [[found, "--tool", tool, "--error-exitcode", "1", sys.executable, *tests]
            for tool in ("memcheck", "racecheck")]  # fmt: skip


def _suite(name: str, rows: Path) -> list[list[str]]:
    options = ["--rounds", "7", "--no-max-autotune"] if HAS_GPU else ["--quick"]
    run = [sys.executable, "benchmarks/run.py", "--suite", name, "--out", str(rows), *options]
    return [run]


LIMITS = {"build": 200, "tests": 300, "sanitizer": 120, "ops": 150, "blocks": 200}  # seconds


def commands(part: str, rows: Path) -> list[list[str]]:
    parts = {"build": _build, "tests": _tests, "sanitizer": _sanitizer}
    return parts[part]() if part in parts else _suite(part, rows)


def run(part: str, out: Path, rows: Path) -> bool:
    """Runs one part, its output on the screen and in a log; whether it passed."""
    begin, passed = time.monotonic(), True
    with open(out / f"{part}.log", "w") as log:
        for command in commands(part, rows):
            left = LIMITS[part] - (time.monotonic() - begin)
            limited = ["timeout", "--kill-after=5", f"{max(left, 1):.0f}", *command]
            process = subprocess.Popen(
                limited, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
            passed &= process.wait() == 0
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help=f"default: {' '.join(LIMITS)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=os.environ.get("OUT"),
        help="folder for logs and rows; default $OUT, else build/gpu for the logs and "
        "benchmarks/results for the rows of a GPU",
    )
    args = parser.parse_args()
    unknown = set(args.part) - set(LIMITS)
    if unknown:
        parser.error(f"part must be of {', '.join(LIMITS)}; got {', '.join(sorted(unknown))}")
    out = Path(args.out or ROOT / "build" / "gpu").resolve()
    rows = out
    if HAS_GPU:
        print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
        rows = out if args.out else ROOT / "benchmarks" / "results"
    else:
        print("no GPU: a dry run, of what can run without one; its figures mean nothing")
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for part in args.part or LIMITS:
        print(f"--- {part}", flush=True)
        begin = time.monotonic()
        results[part] = run(part, out, rows), time.monotonic() - begin
    for part, (passed, seconds) in results.items():
        print(f"{part:10} {'passed' if passed else 'FAILED':7} {seconds:6.1f} s")
    print(f"logs: {out}; rows: {rows}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
