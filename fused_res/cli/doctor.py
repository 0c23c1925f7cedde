"""``fused-res doctor``: reports versions, devices, libraries, and which implementation runs where
and why."""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from ..dispatch import (
    backends,
    inference_conv,
    norm,
    shipped_timings,
    training_block,
    training_conv,
    user_timings,
)
from ..env import settings
from ..version import __version__
from . import UsageError, table

REPORT = "fused-res-report.json"
VARIABLES = {f"FUSED_RES_{field.upper()}": getattr(settings, field) for field in settings._fields}


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    found = [{"type": "cpu", "name": user_timings.processor()}]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        found.append({"type": "cuda", "name": f"{p.name}, {memory}"})
    return found


def _auto_takes() -> list[str]:
    """A line for each choice of ``auto`` on each device, with its reason."""
    lines = []
    for op, preferred in backends.PREFERRED.items():
        for name, dtypes in preferred.items():
            words = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            lines.append(f"{op} on {name}: auto takes {name} for {words}, measured to win there")
    lines.append("SyncBatchNorm: as bn_act on a CPU, else PyTorch's own; a backend can be named")
    for i in range(torch.cuda.device_count()):
        found = shipped_timings.summary(torch.device("cuda", i))
        nothing = (
            "not measured before: auto measures a call here when it is seen for the second time, "
            "unless FUSED_RES_AUTOTUNE=0; a backend can be named"
        )
        lines += [f"cuda:{i}: {line}" for line in found or [nothing]]
    for device in user_timings.devices():
        lines.append(f"{device}: {inference_conv.OP}: {_timed(device, inference_conv.OP, '')}")
        if device.type != "cpu":
            of_training = training_block.OP, norm.OP, training_conv.OP
            lines += [f"{device}: {op}: {_timed(device, op, '--train ')}" for op in of_training]
    return lines


def _faults() -> list[dict]:
    """The candidates that are not used here, by device and call, with the error of each."""
    return [
        {"on": str(device), **fault._asdict()}
        for device in user_timings.devices()
        for fault in user_timings.faults(device)
    ]


def _fault_lines(faults: list[dict]) -> str:
    lines = [
        f"{f['on']}: {f['candidate']} is not used for {f['op']} {'x'.join(map(str, f['shape']))} "
        f"{f['like']}, {f['dtype']} {f['layout']}: {f['error']}"
        for f in faults
    ]
    lines.append("Please report these: fused-res doctor --report writes a file to send.")
    return "\n".join(lines)


def _timed(device: torch.device, op: str, option: str) -> str:
    """The state of the user's timings of an op on a device, in words."""
    path = user_timings.path_of(user_timings.made_by(device))
    if user_timings.settings.cache is None:
        path = "no file: there is no home directory; set FUSED_RES_CACHE"
    rows = user_timings.table(device).rows.values()
    found = collections.Counter(inference_conv.taken(row) for row in rows if row.op == op)
    if not found:
        return f"not tuned (fused-res tune {option}MODEL --shape ... would write {path})"
    counts = ", ".join(f"{count} by {name}" for name, count in found.most_common())
    return f"auto takes what was measured for {found.total()} calls: {counts} ({path})"


def _libraries() -> list[str]:
    """Names of the libraries of kernels that this process has loaded from the package."""
    folder = Path(__file__).parent.parent
    loaded = (Path(path) for path in torch.ops.loaded_libraries)
    return sorted(path.name for path in loaded if path.parent == folder)


def _op_rows(device_types: list[str]) -> list[dict]:
    """A row for each op, device type, backend and dtype, also for backends that cannot run."""
    rows = []
    for op in backends.SUPPORT:
        places = [(types[0], name) for name, types in backends.DEVICE_TYPES.items()]
        places += [(device_type, "eager") for device_type in device_types]
        for device_type, name in sorted(places, key=lambda place: place[0]):
            for dtype in backends.DTYPES:
                reason = backends.why_not(op, name, device_type, dtype)
                auto = None
                if device_type in device_types:
                    probe = torch.empty(0, dtype=dtype, device=device_type)
                    auto = backends.choose(op, "auto", probe)
                rows.append(
                    {
                        "op": op,
                        "device": device_type,
                        "backend": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "available": reason is None,
                        "auto": auto == name,
                        "reason": reason,
                    }
                )
    return rows


def report() -> dict:
    """The facts of ``fused-res doctor``, in plain JSON types.

    Returns:
        ``versions``: name -> version or None; ``machine``: platform, processor, cores, threads,
        instruction_set; ``devices``: type and name of each; ``libraries``: file names of the loaded
        libraries; ``backends``: name -> available, reason; ``environment``: variable -> value,
        default; ``ops``: one entry for each op, device type, backend and dtype, with available,
        auto (whether backend ``auto`` takes it) and reason; ``choices``: the choices of ``auto``
        with their reasons, as lines of text; ``faults``: the candidates that are not used for a
        call, because they were wrong or failed there.
    """
    devices = _devices()
    return {
        "versions": {
            "fused_res": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
        },
        "machine": {
            "platform": platform.platform(),
            "processor": devices[0]["name"],
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": None if backends.STATUS["cpu"] else backends.cpu_isa(),
        },
        "devices": devices,
        "libraries": _libraries(),
        "backends": {
            name: {"available": reason is None, "reason": reason}
            for name, reason in backends.STATUS.items()
        },
        "environment": {
            name: {"value": value, "default": not os.environ.get(name)}
            for name, value in VARIABLES.items()
        },
        "ops": _op_rows(list(dict.fromkeys(device["type"] for device in devices))),
        "choices": _auto_takes(),
        "faults": _faults(),
    }


def _op_table(entries: list[dict]) -> str:
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in entries))
    grouped: dict[tuple[str, str, str], list[dict]] = {}
    for entry in entries:
        grouped.setdefault((entry["op"], entry["device"], entry["backend"]), []).append(entry)
    rows = []
    for place, group in grouped.items():
        cells = ["auto" if e["auto"] else "yes" if e["available"] else "no" for e in group]
        reasons = dict.fromkeys(e["reason"] for e in group if e["reason"])
        rows.append([*place, *cells, "; ".join(reasons)])
    return table(["op", "device", "backend", *dtypes, "why not"], rows)


def render(facts: dict) -> str:
    """``report()`` as text."""
    versions, machine = facts["versions"], facts["machine"]
    absent = {"cuda": "none (this PyTorch was built without CUDA)", "triton": "not installed"}
    isa = machine["instruction_set"] or "none (the CPU library is not loaded)"
    pairs = [
        *((name, value or absent[name]) for name, value in versions.items()),
        ("platform", machine["platform"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("threads", machine["threads"]),
        ("libraries", ", ".join(facts["libraries"]) or "none loaded"),
        ("CPU kernels", isa),
        *((f"device {i}", d["name"]) for i, d in enumerate(facts["devices"][1:])),
    ]
    width = max(len(name) for name, _ in pairs)
    backend_rows = [
        [name, "yes" if entry["available"] else "no", entry["reason"] or ""]
        for name, entry in facts["backends"].items()
    ]
    variable_rows = [
        [name, entry["value"], "default" if entry["default"] else "set"]
        for name, entry in facts["environment"].items()
    ]
    return "\n\n".join(
        [
            "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs),
            table(["backend", "runs here", "why not"], backend_rows),
            table(["environment variable", "value", ""], variable_rows),
            _op_table(facts["ops"])
            + "\n(auto: what backend 'auto' takes; yes: runs where it is asked for by name)",
            "\n".join(facts["choices"]),
            *([_fault_lines(facts["faults"])] if facts["faults"] else []),
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")
    parser.add_argument(
        "--report", metavar="FILE", nargs="?", const=REPORT, help=f"write it to FILE ({REPORT})"
    )


def run(args: argparse.Namespace) -> int:
    facts = report()
    if args.report:
        try:
            Path(args.report).write_text(json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"--report {args.report} cannot be written: {error}") from error
        print(f"wrote {args.report}")
        return 0
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0
