"""What a GPU is asked, in two short runs: ``make gpu-smoke``, then ``make gpu``.

``python benchmarks/gpu.py smoke`` tries each kernel and times the most telling ones;
``python benchmarks/gpu.py`` tests and times more; with names of parts it runs these. Each part is a
process or several, with a time limit: one that fails, hangs or crashes is recorded, and the others
run. A summary, as JSON and text, and an archive of logs and rows are written after each part.
Without a GPU the same parts run on what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from device import prepared  # noqa: E402
from device.runner import Part, Run, killing  # noqa: E402
from device.runs import (  # noqa: E402
    FULL_SECONDS,
    NAMED,
    SMOKE_SECONDS,
    Runs,
    failed_cases,
)

SLOWER = 5  # may a machine without a GPU be


def facts_here() -> dict:
    """Versions of this machine, from a process of its own: a driver may hang."""
    command = [sys.executable, prepared.__file__, "--facts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"gpu": None, "failed": error.stderr[-2000:]}
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return {"gpu": None, "failed": str(error)}


def environment(cache: Path, dry: bool) -> dict[str, str]:
    """Of every process: the package is this checkout's, installed or not."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    if dry:  # others may be at work on a machine without a GPU
        found["OMP_NUM_THREADS"] = "1"
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    known = Runs(Path(), True)
    found = [known.build(), *known.smoke(), *known.full(("graph",))]
    every = dict.fromkeys([*(part.name for part in found), *NAMED])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("part", nargs="*", help=f"smoke, or any of: {' '.join(every)}; default: the second run")
    words = f"for all; default {FULL_SECONDS:.0f}, smoke {SMOKE_SECONDS:.0f}, named parts their sum"
    add("--seconds", type=float, metavar="N", help=words)
    words = "folder of at most 8 files; default $OUT, else build/gpu"
    add("--out", type=Path, default=os.environ.get("OUT") or ROOT / "build" / "gpu", help=words)
    words = "of the first run: what failed is tried again; default: the one in --out or build/gpu"
    add("--summary", type=Path, metavar="FILE", help=words)
    add("--prepared", type=Path, default=prepared.FOLDER, help="what make gpu-prepare compiled")
    args = parser.parse_args(argv)
    unknown = set(args.part) - {*every, "smoke"}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(every)}")
    if "smoke" in args.part and len(args.part) > 1:
        parser.error("smoke is a run of its own: name no parts beside it")
    return args


def chosen(args: argparse.Namespace, runs: Runs) -> tuple[str, list[Part], float]:
    """The run's name, its parts, and its seconds unless told."""
    if args.part == ["smoke"]:
        return "smoke", runs.smoke(), SMOKE_SECONDS
    if args.part:
        found = [runs.named(name) for name in args.part]
        return "parts", found, sum(part.limit for part in found)
    names = [args.out / "smoke-summary.json", ROOT / "build" / "gpu" / "smoke-summary.json"]
    summary = args.summary or next((p for p in names if p.exists()), names[0])
    return "gpu", runs.full(failed_cases(summary)), FULL_SECONDS


def take(folder: Path, here: dict, cache: Path, package: Path = ROOT / "fused_res") -> dict:
    """Takes what was prepared; without a GPU only to a package that has no libraries, for whichever
    architecture they are."""
    if here["gpu"] is None:
        if any(package.glob("*.so")):
            return {}
        here = {**here, "arch": (prepared.read(folder) or {}).get("arch")}
    return prepared.take(folder, here, package, cache)


def main(argv: list[str] | None = None) -> int:
    args, begin = parse(argv), time.monotonic()
    args.out = args.out.resolve()
    here = facts_here()
    dry, folder = here["gpu"] is None, ROOT / "build" / "gpu"
    print("no GPU: a dry run; its figures mean nothing" if dry else f"GPU: {here['gpu']}")
    if here.get("failed"):
        print(f"torch says nothing of this machine: {here['failed']}")
        if Path("/dev/nvidiactl").exists():
            print("but it has a GPU: a dry run would say nothing of that")
            return 1
    name = "smoke" if args.part == ["smoke"] else "parts" if args.part else "gpu"
    work = folder / f"{name}-work"
    shutil.rmtree(work, ignore_errors=True)
    cache = folder / "triton"
    name, todo, seconds = chosen(args, Runs(work / "rows", dry, here.get("arch")))
    taken = take(args.prepared, here, cache)
    if taken.get(prepared.LIBRARIES) and not dry and name != "parts":
        todo.insert(0, Runs(work / "rows", dry, here["arch"]).build())
    for what, why in taken.items():
        print(f"{what}: {f'built here: {why}' if why else 'as prepared'}")
    run = Run(name, args.out, work, {"machine": here, "built here": taken})
    if dry:  # a limit is for a GPU's machine, which has nothing else to do
        todo = [part._replace(limit=part.limit * SLOWER) for part in todo]
        seconds *= SLOWER
    left = (args.seconds or seconds) - (time.monotonic() - begin)
    with killing():
        passed = run.run(todo, left, environment(cache, dry))
    print(run.table())
    print(f"in {args.out}: {name}-summary.json, {name}-summary.txt, {name}.tar.gz")
    return 0 if passed and not here.get("failed") else 1


if __name__ == "__main__":
    sys.exit(main())
