"""The user's timings: the table that ``fused_res.tune`` writes and every process reads.

The folder ``FUSED_RES_CACHE`` has a JSON file for each device and set of versions; on a CPU also
for each instruction set and number of threads. A process reads a file once, at its first use. It
ignores a file that is damaged or was made elsewhere, with a warning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from ..env import settings
from ..version import __version__
from . import backends, shipped_timings
from .shipped_timings import Row

# (op, dtype, layout, shape, like) -> timing row
Table = dict[tuple, Row]
MOST_ROWS = 10_000  # of a table; a row takes a kilobyte
_OF_DEVICE = ("device", "isa")  # fields that all rows of a file have in common

_tables: dict[Path, Table] = {}


@functools.cache
def processor() -> str:
    """The model of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def made_by(device: torch.device) -> dict[str, str]:
    """Everything that a table's timings depend on: versions, driver, device and its settings."""
    versions = {"fused_res": __version__, "torch": str(torch.__version__)}
    if device.type == "cpu":
        isa = "no kernels" if backends.STATUS["cpu"] else backends.cpu_isa()
        return versions | {"device": f"{processor()}, {isa}, threads: {torch.get_num_threads()}"}
    name, isa = shipped_timings.device_of(device.type, device.index)
    driver = "none"
    if device.type == "cuda" and torch.cuda.is_available():
        driver = str(torch.version.hip or torch._C._cuda_getDriverVersion())
    return versions | {"driver": driver, "device": f"{name}, {isa}"}


def path_of(made: dict[str, str]) -> Path:
    device = re.sub(r"[^A-Za-z0-9.]+", "-", made["device"])
    versions = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
    return Path(settings.cache or "", f"tuned-{device}-{versions}.json")


def _row(given: object) -> Row:
    """A row of a file.

    Raises:
        ValueError: ``given`` is not a row.
    """
    row = Row("", "", **given) if isinstance(given, dict) else None
    if (
        row is None
        or not all(isinstance(text, str) for text in (row.op, row.dtype, row.layout, row.like))
        or not isinstance(row.shape, list)
        or not all(type(n) is int for n in row.shape)
        or not isinstance(row.ms, dict)
        or not all(type(t) in (int, float) and 0 < t < math.inf for t in row.ms.values())
        or not (row.config is None or isinstance(row.config, dict))
    ):
        raise ValueError(f"{given!r} is not a measurement")
    return row._replace(shape=tuple(row.shape))


def key_of(row: Row) -> tuple:
    return row.op, row.dtype, row.layout, row.shape, row.like


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The ``made_by`` of a file, and its rows.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a table.
    """
    try:
        found = json.loads(path.read_text())
        return dict(found["made_by"]), [_row(row) for row in found["rows"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it is not a table of fused_res: {error}") from error


def _read(made: dict[str, str]) -> tuple[Table, str | None]:
    """The table of a device; empty where the file cannot be used, with the reason."""
    if settings.cache is None:
        return {}, None
    try:
        of, rows = load(path_of(made))
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except (OSError, ValueError) as error:
        return {}, str(error)
    if of != made:
        return {}, f"it was made by {of}, and this is {made}"
    return {key_of(row): row for row in rows}, None


def table(device: torch.device) -> Table:
    """The timings of a device."""
    made = made_by(device)
    path = path_of(made)
    if path not in _tables:
        _tables[path], wrong = _read(made)
        if wrong:
            warnings.warn(f"{path} is ignored: {wrong}", stacklevel=2)
    return _tables[path]


def find(device: torch.device, row: Row) -> Row | None:
    """The timing row of the call that ``row`` describes."""
    return table(device).get(key_of(row))


def forget() -> None:
    """Forgets the tables; the next use reads the files again."""
    _tables.clear()


def _add(known: Table, rows: Iterable[Row]) -> None:
    """Adds rows, and removes the oldest beyond ``MOST_ROWS``."""
    for row in rows:
        known.pop(key_of(row), None)
        known[key_of(row)] = row
    for old in tuple(known)[: max(len(known) - MOST_ROWS, 0)]:
        known.pop(old, None)


def keep(device: torch.device, rows: Iterable[Row]) -> None:
    """Adds rows in this process."""
    _add(table(device), rows)


def write(device: torch.device, rows: Iterable[Row]) -> Path:
    """Adds rows to the file, and replaces it at once: readers see the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    if settings.cache is None:
        raise OSError("there is no home directory")
    made = made_by(device)
    path = path_of(made)
    merged = _read(made)[0]
    _add(merged, rows)
    lines = []
    for row in merged.values():
        fields = {k: v for k, v in row._asdict().items() if k not in _OF_DEVICE}
        lines.append(json.dumps(fields))
    head = f'{{\n"made_by": {json.dumps(made)},\n"rows": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(head + ",\n".join(lines) + "\n]\n}\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def devices() -> list[torch.device]:
    """The CPU and each GPU."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def files() -> list[Path]:
    """The paths of all tables in the folder, for any device and version."""
    return [] if settings.cache is None else sorted(Path(settings.cache).glob("tuned-*.json"))
