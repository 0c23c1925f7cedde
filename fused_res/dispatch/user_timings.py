"""The user's timings: the table that ``fused_res.tune`` writes and every process reads.

The folder ``FUSED_RES_CACHE`` has a JSON file for each device and set of versions; on a CPU also
for each instruction set and number of threads. A process reads a file once, at its first use. It
ignores a file that is damaged or was made elsewhere, with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..env import settings
from ..version import __version__
from . import backends, shipped_timings
from .shipped_timings import Row


class Fault(NamedTuple):
    """A candidate that is not used for a call on this device. The first five fields are the key of
    a row.

    error: how its results are wrong, or what it raised.
    process: the process that runs it for the first time. A kernel may end that process, or never
        end. While the process lives this is no fault yet.
    """

    op: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    like: str
    candidate: str
    error: str
    process: str = ""

    @property
    def key(self) -> tuple:
        return self[:6]

    @property
    def of(self) -> tuple:
        """The key of the call's row."""
        return self[:5]


class Table(NamedTuple):
    """rows: by key, (op, dtype, layout, shape, like). faults: by key and candidate."""

    rows: dict[tuple, Row]
    faults: dict[tuple, Fault]


FORMAT = "2"  # of the file; another format is another file
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
    versions = {"format": FORMAT, "fused_res": __version__, "torch": str(torch.__version__)}
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


def _fault(given: object) -> Fault:
    """A fault of a file.

    Raises:
        ValueError: ``given`` is not a fault.
    """
    fault = Fault(**given) if isinstance(given, dict) else None
    if (
        fault is None
        or not isinstance(fault.shape, list)
        or not all(type(n) is int for n in fault.shape)
        or not all(isinstance(text, str) for text in (*fault[:3], *fault[4:]))
    ):
        raise ValueError(f"{given!r} is not a fault")
    return fault._replace(shape=tuple(fault.shape))


def key_of(row: Row) -> tuple:
    return row.op, row.dtype, row.layout, row.shape, row.like


def load(path: Path) -> tuple[dict[str, str], list[Row], list[Fault]]:
    """The ``made_by`` of a file, its rows and its faults.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a table.
    """
    try:
        found = json.loads(path.read_text())
        made = dict(found["made_by"])
        return made, [*map(_row, found["rows"])], [*map(_fault, found["faults"])]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it is not a table of fused_res: {error}") from error


def _read(made: dict[str, str]) -> tuple[Table, str | None]:
    """The table of a device; empty where the file cannot be used, with the reason."""
    nothing = Table({}, {})
    if settings.cache is None:
        return nothing, None
    try:
        of, rows, faults = load(path_of(made))
    except (FileNotFoundError, NotADirectoryError):
        return nothing, None
    except (OSError, ValueError) as error:
        return nothing, str(error)
    if of != made:
        return nothing, f"it was made by {of}, and this is {made}"
    return Table({key_of(row): row for row in rows}, {f.key: f for f in faults}), None


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
    return table(device).rows.get(key_of(row))


def faults(device: torch.device) -> list[Fault]:
    """The candidates that are not used on a device, by call."""
    return [fault for fault in table(device).faults.values() if not _lives(fault.process)]


def _start_of(pid: int) -> str:
    """When a process started, in a word; empty where it has ended or the system does not say."""
    try:
        state, *_, start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else start


@functools.cache
def _name_of(pid: int) -> str:
    return f"{platform.node()}:{pid}:{_start_of(pid)}"


def this_process() -> str:
    return _name_of(os.getpid())


def _lives(process: str) -> bool:
    """Whether a process still runs; one on another machine counts as ended.

    In a container that starts again the new process may have the number of the old one.
    """
    host, pid, start, *_ = *process.split(":"), "", ""
    if host != platform.node() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        pass
    return _start_of(int(pid)) == start


def forget() -> None:
    """Forgets the tables; the next use reads the files again."""
    _tables.clear()


def _add(
    known: Table, rows: Iterable[Row], faults: Iterable[Fault], cleared: Iterable[Fault]
) -> None:
    """Removes the cleared faults, adds rows and faults, and removes the oldest beyond
    ``MOST_ROWS``."""
    for fault in cleared:
        known.faults.pop(fault.key, None)
    added = {key_of(row): row for row in rows}, {fault.key: fault for fault in faults}
    for of, new in zip(known, added, strict=True):
        for key, value in new.items():
            of.pop(key, None)
            of[key] = value
        for old in tuple(of)[: max(len(of) - MOST_ROWS, 0)]:
            of.pop(old, None)


def keep(
    device: torch.device,
    rows: Iterable[Row],
    faults: Iterable[Fault] = (),
    cleared: Iterable[Fault] = (),
) -> None:
    """Adds rows and faults in this process; faults that are cleared are none any more."""
    _add(table(device), rows, faults, cleared)


def _merged(made: dict[str, str], *changes: Iterable) -> str:
    """The text of a device's file with rows and faults added, and faults cleared."""
    known = _read(made)[0]
    _add(known, *changes)
    texts = [
        [json.dumps({k: v for k, v in one._asdict().items() if k not in _OF_DEVICE}) for one in of]
        for of in (known.rows.values(), known.faults.values())
    ]
    head = f'{{\n"made_by": {json.dumps(made)},\n"rows": [\n'
    return head + ",\n".join(texts[0]) + '\n],\n"faults": [\n' + ",\n".join(texts[1]) + "\n]\n}\n"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Other processes that write into a folder wait until the body is done."""
    try:
        import fcntl
    except ImportError:  # Windows has none: of two writers one may lose its rows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(
    device: torch.device,
    rows: Iterable[Row],
    faults: Iterable[Fault] = (),
    cleared: Iterable[Fault] = (),
) -> Path:
    """Adds rows and faults to the file, and replaces it at once: readers see the old file or the
    new one, and of several processes that write none loses its rows.

    Raises:
        OSError: the file cannot be written.
    """
    if settings.cache is None:
        raise OSError("there is no home directory")
    made = made_by(device)
    path = path_of(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        text = _merged(made, rows, faults, cleared)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
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
