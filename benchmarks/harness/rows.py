"""Rows: what is in one, where they were made, how they are written and how they are printed."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import torch

import fused_res
from fused_res.dispatch.backends import STATUS, cpu_isa
from fused_res.dispatch.user_timings import processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_FLOAT, _NONE = (float, type(None)), type(None)
ROW_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("suite", "workload", "dtype", "layout", "rival", "direction"), (str,)),
    **dict.fromkeys(("allocator", "commit", "date"), (str,)),
    **dict.fromkeys(("speedup_over", "device", "versions"), (dict,)),
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "page_faults"), _FLOAT),
    **dict.fromkeys(("gbps", "percent_of_copy", "copy_gbps"), _FLOAT),
    **dict.fromkeys(("rms_error", "error_over_eager"), _FLOAT),
    "shape": (list,), "rounds": (int,), "bytes": (int, _NONE), "refused": (str, _NONE),
}  # fmt: skip
# fields that only some suites' rows have: nets, peaks, inference, convs and curves
EXTRA_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("images_per_s", "peak_mib", "tflops", "peak_tflops"), _FLOAT),
    **dict.fromkeys(("train_loss", "val_loss", "val_accuracy"), (float,)),
    "percent_of_roofline": _FLOAT, "call": (dict,), "config": (dict, _NONE), "seed": (int,),
    "losses": (list,),
}  # fmt: skip
# a row that measures nothing else starts from this
NOTHING = {name: None for name, types in ROW_TYPES.items() if _NONE in types}
OUT_OF_TIME = "out of time"


def validate(row: dict) -> None:
    """Raises ValueError where ``row`` is not of the schema."""
    if not set(ROW_TYPES) <= set(row) <= {*ROW_TYPES, *EXTRA_TYPES}:
        wrong = (set(row) ^ set(ROW_TYPES)) - set(EXTRA_TYPES)
        raise ValueError(f"fields missing or unknown: {sorted(wrong)}")
    for name, value in row.items():
        types = {**ROW_TYPES, **EXTRA_TYPES}[name]
        if not isinstance(value, types):
            raise ValueError(f"{name}={value!r} must be {' or '.join(map(str, types))}")
    done = row["median_ms"] is not None or row["direction"] == "saved" or bool(row.get("losses"))
    if (row["refused"] is None) != done:
        raise ValueError("a row has a time or losses, or says why it was refused")


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
            out.append(f"{head:52} {_figures(row)}  {over}".rstrip())
    return out


MORE_FIGURES = (
    ("images_per_s", "images/s", "8.0f"), ("peak_mib", "MiB", "8.0f"),
    ("tflops", "TFLOP/s", "8.3g"), ("percent_of_roofline", "% of roofline", "4.0f"),
)  # fmt: skip


def _figures(row: dict) -> str:
    out = f"{row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]"
    if row["gbps"] is not None:
        out += f" {row['gbps']:6.1f} GB/s {row['percent_of_copy']:4.0f} %"
    if row["page_faults"] is not None:
        out += f" {row['page_faults']:7.0f} faults"
    for field, unit, digits in MORE_FIGURES:
        if row.get(field) is not None:
            out += f" {row[field]:{digits}} {unit}"
    return out


def losses(rows: list[dict]) -> list[str]:
    """Every comparison in which fused_res is slower."""
    return [
        f"  {row['workload']}, {row['direction']}, allocator {row['allocator']}: "
        f"{row['rival']} is {ratio:.2f}x {base}"
        for row in rows
        if row["rival"].startswith("fused_res")
        for base, ratio in row["speedup_over"].items()
        if ratio < 1
    ]


# --- where they are made: device, versions, commit and date, as every row has them


def _device(device: str) -> dict:
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, cores = properties.name, properties.multi_processor_count
        slug, isa = _slug(name), f"sm_{properties.major}{properties.minor}"
    else:
        name, cores = processor(), os.cpu_count() or 1
        slug = f"cpu-{_slug(name)}-{cores}c"
        isa = torch.backends.cpu.get_cpu_capability().lower() if STATUS["cpu"] else cpu_isa()
    threads = torch.get_num_threads()
    return {"slug": slug, "name": name, "cores": cores, "threads": threads, "isa": isa}


def _slug(name: str) -> str:
    name = re.sub(r"\(r\)|\(tm\)|@.*|\bcpu\b|\bprocessor\b|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with ``-dirty`` where anything but the results differs from it.

    A copy of the tree that has no history is told by ``FUSED_RES_COMMIT``.
    """

    def git(*args: str) -> str:
        command = ["git", "--no-optional-locks", *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FUSED_RES_COMMIT", "unknown")


def environment(device: str) -> dict:
    now = datetime.datetime.now(datetime.timezone.utc)
    versions = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fused_res": fused_res.__version__,
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
    }
    date = now.isoformat(timespec="seconds")
    return {"device": _device(device), "versions": versions, "commit": _commit(), "date": date}
