"""Times PyTorch, torch.compile and fused_res side by side: ``python benchmarks/run.py --help``.

Every rival is checked against float64 before it is timed. On a CPU each suite runs twice, in child
processes, under two settings of the allocator. Rows are described in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import copy_gbps, rotate, spread
from torch import Tensor
from workloads import (
    DIRECTIONS,
    QUICK_SUITES,
    SUITES,
    Program,
    Rival,
    Workload,
    compile_modes,
    exact_program,
    ideal_bytes,
    rivals,
    values,
)

import fused_res
from fused_res.backends import STATUS, cpu_isa

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# glibc gives every tensor over its threshold fresh pages from the kernel and takes them back, which
# can cost more than the kernels that are timed. "raised" keeps freed memory in the process.
KEEP = 2**32
ALLOCATORS = {
    "default": None,
    "raised": f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}:"
    f"glibc.malloc.top_pad={2**28}",
}

ROW_TYPES: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "workload": (str,),
    "shape": (list,),
    "dtype": (str,),
    "layout": (str,),
    "rival": (str,),
    "direction": (str,),
    "allocator": (str,),
    "rounds": (int,),
    "median_ms": (float, type(None)),
    "p20_ms": (float, type(None)),
    "p80_ms": (float, type(None)),
    "speedup_over": (dict,),
    "bytes": (int, type(None)),
    "gbps": (float, type(None)),
    "percent_of_copy": (float, type(None)),
    "copy_gbps": (float, type(None)),
    "page_faults": (float, type(None)),
    "rms_error": (float, type(None)),
    "error_over_eager": (float, type(None)),
    "refused": (str, type(None)),
    "device": (dict,),
    "versions": (dict,),
    "commit": (str,),
    "date": (str,),
}


def validate(row: dict) -> None:
    """Raises ValueError where ``row`` is not of the schema."""
    if set(row) != set(ROW_TYPES):
        raise ValueError(f"fields missing or unknown: {sorted(set(row) ^ set(ROW_TYPES))}")
    for name, types in ROW_TYPES.items():
        if not isinstance(row[name], types):
            raise ValueError(f"{name}={row[name]!r} must be {' or '.join(map(str, types))}")
    if (row["refused"] is None) == (row["median_ms"] is None and row["direction"] != "saved"):
        raise ValueError("a row has a time, or says why it was refused")


# --- what is compared with what


def errors(result: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """Largest and RMS error of every tensor.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if set(result) != set(exact):
        raise ValueError(f"returned {sorted(result)} instead of {sorted(exact)}")
    out = {}
    for name, e in exact.items():
        if result[name].shape != e.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}, not {tuple(e.shape)}")
        off = result[name].double() - e
        out[name, "largest"] = float(off.abs().max())
        out[name, "rms"] = float(off.square().mean().sqrt())
    return out


def half_ulps(exact: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Half a unit in the last place at each tensor's largest magnitude: rounding alone errs so."""
    half = torch.finfo(dtype).eps / 2
    return {name: half * 2.0 ** math.floor(math.log2(e.abs().max())) for name, e in exact.items()}


def over_eager(found: dict, eager: dict, floor: dict[str, float]) -> tuple[float, str]:
    """The worst error over eager's own, which counts for half an ulp at least; and of what."""
    ratios = {key: error / max(eager[key], floor[key[0]]) for key, error in found.items()}
    worst = max(ratios, key=lambda key: (math.isnan(ratios[key]), ratios[key]))
    return ratios[worst], f"{worst[0]}, {worst[1]}"


def measure(
    workload: Workload,
    candidates: list[Rival],
    device: str = "cpu",
    rounds: int = 15,
    least_ms: float = 20.0,
    memory: bool = True,
) -> list[dict]:
    """Checks every candidate, times those that are right, and returns rows without environment.

    The candidates called ``eager`` set the error that the others are allowed a multiple of.
    """
    v = values(workload, device)
    exact = exact_program(workload, v).result()
    floor = half_ulps(exact, v["x"].dtype)
    size_of_y = float(exact["y"].square().mean().sqrt())
    eager: dict = {}
    programs: dict[str, Program] = {}
    refused: dict[str, str] = {}
    quality: dict[str, tuple[float, float]] = {}
    for rival in candidates:
        try:
            program = rival.build(workload, v)
            for _ in range(2):  # compile, capture, tune: the step that is checked is a warm one
                _mark_step(device)
                program.step()
            _mark_step(device)
            found = errors(program.result(), exact)
        except Exception as error:  # a rival that breaks must not take the others' rows with it
            refused[rival.label] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if rival.name == "eager":
            eager = {key: max(e, eager.get(key, 0.0)) for key, e in found.items()}
        ratio, where = over_eager(found, eager, floor)
        quality[rival.label] = (found["y", "rms"] / size_of_y, ratio)
        if not ratio <= rival.slack:
            refused[rival.label] = (
                f"wrong result: error of {where} is {ratio:.3g}x eager's, over {rival.slack}x"
            )
            continue
        programs[rival.label] = program
    del exact
    gc.collect()

    rows = []
    size = ideal_bytes(workload)
    baselines = [r.label for r in candidates if not r.name.startswith("fused_res")]
    by_label = {r.label: r for r in candidates}

    def row(label: str, direction: str, **fields: object) -> dict:
        rival = by_label[label]
        rms, ratio = quality.get(label, (None, None))
        return {
            "suite": workload.suite,
            "workload": workload.name,
            "shape": list(workload.shape),
            "dtype": str(v["x"].dtype).removeprefix("torch."),
            "layout": rival.layout,
            "rival": rival.name,
            "direction": direction,
            "rounds": rounds,
            "median_ms": None,
            "p20_ms": None,
            "p80_ms": None,
            "speedup_over": {},
            "bytes": None,
            "gbps": None,
            "percent_of_copy": None,
            "copy_gbps": None,
            "page_faults": None,
            "rms_error": _finite(rms),
            "error_over_eager": _finite(ratio),
            "refused": refused.get(label),
            **fields,
        }

    for direction in DIRECTIONS:
        calls = {
            label: _stepper(p.forward if direction == "forward" else p.step, device)
            for label, p in programs.items()
        }
        copy = copy_gbps(device, 16 if least_ms < 10 else 256)
        timed = rotate(calls, rounds, device, least_ms)
        for label in by_label:
            if label in refused:
                rows.append(row(label, direction))
                continue
            median, p20, p80 = spread(timed[label].ms)
            gbps = size[direction] / median / 1e6
            fields = {
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "speedup_over": {
                    base: statistics.median(
                        b / own for b, own in zip(timed[base].ms, timed[label].ms, strict=True)
                    )
                    for base in baselines
                    if base != label and base in timed
                },
                "bytes": size[direction],
                "gbps": gbps,
                "percent_of_copy": 100 * gbps / copy,
                "copy_gbps": copy,
                "page_faults": statistics.median(timed[label].page_faults),
            }
            rows.append(row(label, direction, **fields))
    if memory and workload.suite == "blocks":
        saved = {
            label: p.saved_bytes()
            for label, p in programs.items()
            if not label.startswith("compile")  # AOTAutograd recompiles under saved-tensor hooks
        }
        for label, count in saved.items():
            over = {b: saved[b] / count for b in baselines if b != label and b in saved}
            rows.append(row(label, "saved", rounds=0, bytes=count, speedup_over=over))
    return rows


def _finite(number: float | None) -> float | None:
    """JSON has no NaN and no infinity; ``refused`` says what happened."""
    return number if number is not None and math.isfinite(number) else None


def _mark_step(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def _stepper(call: Callable[[], object], device: str) -> Callable[[], object]:
    """``call``, for a CUDA graph's sake told that the last step's outputs are no longer wanted."""
    if torch.device(device).type != "cuda":
        return call

    def marked() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return marked


# --- where it ran


def device_info(device: str) -> dict:
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        return {
            "slug": _slug(name),
            "name": name,
            "cores": properties.multi_processor_count,
            "threads": torch.get_num_threads(),
            "isa": f"sm_{properties.major}{properties.minor}",
        }
    name, cores = _cpu_name(), os.cpu_count() or 1
    return {
        "slug": f"cpu-{_slug(name)}-{cores}c",
        "name": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability().lower() if STATUS["cpu"] else cpu_isa(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _slug(name: str) -> str:
    name = re.sub(r"\(r\)|\(tm\)|@.*|\bcpu\b|\bprocessor\b|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def versions() -> dict:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "fused_res": fused_res.__version__,
    }


def commit() -> str:
    """The commit, with ``-dirty`` where anything but the results differs from it."""

    def git(*args: str) -> str:
        command = ["git", "--no-optional-locks", *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- output


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a JSON array, one row a line; all of it or nothing."""
    for row in rows:
        validate(row)
    text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def lines(rows: list[dict]) -> list[str]:
    """The table of one workload. A speed-up under 1 is a loss and is marked."""
    out = [f"{rows[0]['workload']}  ({rows[0]['dtype']}, allocator {rows[0]['allocator']})"]
    for row in rows:
        over = "  ".join(
            f"{ratio:.2f}x {base}{' LOSS' if ratio < 1 else ''}"
            for base, ratio in row["speedup_over"].items()
        )
        head = f"  {row['direction']:16} {row['rival']} {row['layout']}"
        if row["refused"]:
            out.append(f"{head:52} not timed: {row['refused']}")
        elif row["direction"] == "saved":
            out.append(f"{head:52} {row['bytes'] / 2**20:9.2f} MiB  {over}")
        else:
            out.append(
                f"{head:52} {row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]"
                f" {row['gbps']:6.1f} GB/s {row['percent_of_copy']:4.0f} %"
                f" {row['page_faults']:7.0f} faults  {over}"
            )
    return out


# --- the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny tensors, three rounds, no torch.compile: shows that everything runs",
    )
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="workloads named so only")
    parser.add_argument("--rounds", type=int, default=None, help="default 15; quick 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--max-autotune",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile's max-autotune too; it compiles for long: default on a GPU only",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of <device>/<suite>.json; default {RESULTS.relative_to(ROOT)}, "
        "and nothing with --quick or --filter",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds is None:
        args.rounds = 3 if args.quick else 15
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.compile is None:
        args.compile = not args.quick
    if args.max_autotune is None:
        args.max_autotune = args.compile and args.device == "cuda"
    if args.out is None and not (args.quick or args.filter):
        args.out = RESULTS
    return args


def workloads(args: argparse.Namespace) -> list[Workload]:
    suites = QUICK_SUITES if args.quick else SUITES
    wanted = suites if args.suite == "all" else [args.suite]
    return [w for suite in wanted for w in suites[suite] if args.filter in w.name]


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    modes = compile_modes(args.max_autotune) if args.compile else {}
    rows = []
    for workload in workloads(args):
        # else the eighth shape of one function is silently run uncompiled
        torch.compiler.reset()
        found = measure(
            workload,
            rivals(workload, args.device, modes),
            args.device,
            args.rounds,
            least_ms=1.0 if args.quick else 20.0,
            memory=args.child != "raised",  # the same bytes under either allocator
        )
        for row in found:
            row["allocator"] = args.child
        print("\n".join(lines(found)), flush=True)
        rows += found
    args.rows.write_text(json.dumps(rows))


def run_child(args: argparse.Namespace, argv: list[str], allocator: str) -> list[dict]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environ.pop("GLIBC_TUNABLES", None)
    if ALLOCATORS.get(allocator):
        environ["GLIBC_TUNABLES"] = ALLOCATORS[allocator]
    environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *argv, "--child", allocator, "--rows", str(rows)]
        subprocess.run(command, env=environ, check=True)
        return json.loads(rows.read_text())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.child:
        child(args)
        return 0
    if not workloads(args):
        print(f"no workload's name contains {args.filter!r}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    environment = {
        "device": device_info(args.device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps(environment))
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if args.compile and not args.max_autotune:
        print("torch.compile's max-autotune is left out (--max-autotune adds it; slow to compile)")
    rows = []
    for allocator in ALLOCATORS if args.device == "cpu" else ["cuda"]:
        rows += [{**row, **environment} for row in run_child(args, argv, allocator)]
    for row in rows:
        validate(row)
    losses = [
        f"  {row['workload']}, {row['direction']}, allocator {row['allocator']}: "
        f"{row['rival']} is {ratio:.2f}x {base}"
        for row in rows
        if row["rival"].startswith("fused_res")
        for base, ratio in row["speedup_over"].items()
        if ratio < 1
    ]
    print("\n".join(["losses of fused_res:", *losses]) if losses else "no losses of fused_res")
    if args.out is None:
        print("nothing written (--quick and --filter write only where --out says)")
    else:
        for suite in sorted({row["suite"] for row in rows}):
            path = args.out / environment["device"]["slug"] / f"{suite}.json"
            write_rows(path, [row for row in rows if row["suite"] == suite])
            print(f"wrote {path}")
    refused = [r for r in rows if r["refused"] and r["rival"].startswith("fused_res")]
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
