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
    """Maximum and RMS error of every tensor, relative to the exact one's maximum and RMS.

    Raises:
        ValueError: a tensor is missing, or has another shape or dtype than it must.
    """
    if set(result) != set(exact):
        raise ValueError(f"returned {sorted(result)} instead of {sorted(exact)}")
    out = {}
    for name, e in exact.items():
        if result[name].shape != e.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}, not {tuple(e.shape)}")
        off = result[name].double() - e
        for metric, size in ("max", lambda t: t.abs().max()), ("rms", lambda t: t.norm()):
            out[name, metric] = float(size(off) / size(e).clamp_min(1e-300))
    return out


def over_eager(found: dict, eager: dict, half_ulp: float) -> tuple[float, str]:
    """The worst error, less half an ulp, over eager's own; and of which tensor."""

    def ratio(key: tuple[str, str]) -> float:
        beyond = found[key] - half_ulp
        if not beyond <= 0:  # NaN goes on
            return beyond / eager[key] if eager[key] else float("inf")
        return 0.0

    worst = max(found, key=lambda key: (ratio(key) != ratio(key), ratio(key)))
    return ratio(worst), f"{worst[0]}, {worst[1]}"


def measure(
    workload: Workload,
    candidates: list[Rival],
    device: str = "cpu",
    rounds: int = 15,
    least_ms: float = 20.0,
    memory: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Checks every candidate, times those that are right, and returns rows without environment.

    The candidates called ``eager`` set the error that the others are allowed a multiple of.
    """
    v = values(workload, device)
    exact = exact_program(workload, v).result()
    half_ulp = torch.finfo(v["x"].dtype).eps / 2
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
        ratio, where = over_eager(found, eager, half_ulp)
        quality[rival.label] = (max(e for (_, m), e in found.items() if m == "rms"), ratio)
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
            "rms_error": rms,
            # JSON has no NaN and no infinity; ``refused`` says what happened
            "error_over_eager": ratio if ratio is not None and ratio < 1e30 else None,
            "refused": refused.get(label),
            **fields,
        }

    for direction in DIRECTIONS:
        calls = {
            label: _stepper(p.forward if direction == "forward" else p.step, device)
            for label, p in programs.items()
        }
        copy = copy_gbps(device, 16 if least_ms < 10 else 256)
        for label, timed in rotate(calls, rounds, device, least_ms).items():
            samples[label] = timed.ms if (samples := locals().get("samples")) else timed.ms
    return rows
