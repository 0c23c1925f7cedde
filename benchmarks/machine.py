"""Where a run ran: device, versions, commit and date, as every row has them."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fused_res
from fused_res.dispatch.backends import STATUS, cpu_isa

ROOT = Path(__file__).resolve().parent.parent


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict:
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fused_res": fused_res.__version__,
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
    }


def commit() -> str:
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
    return {
        "device": device_info(device),
        "versions": versions(),
        "commit": commit(),
        "date": now.isoformat(timespec="seconds"),
    }
