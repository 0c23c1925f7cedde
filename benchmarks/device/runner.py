"""Runs processes with time limits, one failing, hanging or crashing without harm to the others.

It imports neither torch nor fused_res: what breaks them must not break the record.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = "{seconds}"  # in a command: how long it may work
MARGIN = 0.15  # of a limit, which a command leaves for its start and its last step
GRACE = 2.0  # seconds between SIGTERM and SIGKILL
HEAD = TAIL = 100_000  # bytes of a log that are kept
WORDS = 3000  # characters of a failed job's output in the summary
MOST_BYTES = 15 * 2**20  # of a file in the archive


class Job(NamedTuple):
    """A process. limit: seconds; its part's limit holds too."""

    name: str
    command: list[str]
    limit: float = math.inf
    environ: dict[str, str] | None = None


class Part(NamedTuple):
    """Jobs one after the other, or ``at_once`` at a time. limit: seconds for all of them."""

    name: str
    limit: float
    jobs: tuple[Job, ...]
    at_once: int = 1


class Result(NamedTuple):
    """status: ``passed``, or why not. output: what a failed job printed last."""

    part: str
    job: str
    status: str
    seconds: float
    limit: float
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def limit_of(todo: list[Part], left: float) -> float:
    """Seconds for the first of the parts: all shrink alike where less time is left than they
    want."""
    wanted = sum(part.limit for part in todo)
    return todo[0].limit * min(1.0, max(left, 0.0) / wanted)


# --- one process


def _keep(stream: io.BufferedReader, path: Path, last: deque[bytes]) -> None:
    """Writes the begin of a stream to a log as it comes; at its end what came last."""
    written, tail = 0, 0
    with path.open("wb") as log:
        while block := os.read(stream.fileno(), 2**16):
            log.write(block[: max(HEAD - written, 0)])
            log.flush()
            written += len(block)
            last.append(block)
            tail += len(block)
            while tail - len(last[0]) > TAIL:
                tail -= len(last.popleft())
        if written > HEAD:
            rest = b"".join(last)[-min(TAIL, written - HEAD) :]
            log.write(b"\n... %d bytes in all ...\n" % written + rest)


_running: set[int] = set()  # process groups


def kill(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _wait(process: subprocess.Popen, limit: float) -> str:
    """Waits, and ends the whole group. Returns the status."""
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        code = None
    kill(process.pid, signal.SIGKILL)  # what the process left behind, too
    process.wait()
    if code is None:
        return f"out of time after {limit:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit status {code}" if code else "passed"


def run_job(part: str, job: Job, limit: float, environ: dict[str, str], logs: Path) -> Result:
    """Runs a job in a process group of its own, its output in a log."""
    if limit < 1:
        return Result(part, job.name, "not begun: no time was left", 0.0, limit)
    begin = time.monotonic()
    command = [word.replace(SECONDS, f"{limit * (1 - MARGIN):.0f}") for word in job.command]
    last: deque[bytes] = deque()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environ, **(job.environ or {})}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Result(part, job.name, f"not begun: {error}", 0.0, limit)
    _running.add(process.pid)
    path = logs / f"{part}-{job.name}.log"
    reader = threading.Thread(target=_keep, args=(process.stdout, path, last), daemon=True)
    reader.start()
    try:
        status = _wait(process, limit)
    finally:
        _running.discard(process.pid)
    reader.join(GRACE)  # a process in another session may still hold the pipe
    text = b"".join(list(last)).decode(errors="replace")
    output = "" if status == "passed" else text[-WORDS:]
    return Result(part, job.name, status, time.monotonic() - begin, limit, output)


# --- a run


def unreadable(rows: Path) -> list[str]:
    """Names of the files of rows that are no JSON arrays of objects; they get another name."""
    found = []
    for path in sorted(rows.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
            good = isinstance(content, list) and all(isinstance(row, dict) for row in content)
        except (OSError, ValueError, RecursionError):
            good = False
        if not good and "timings" not in path.parts:
            path.rename(path.with_suffix(".unreadable"))
            found.append(path.name)
    return found


def keep_timings(part: str, cache: Path, rows: Path) -> None:
    """Keeps the tables that first use and ``tune`` wrote, for ``table.py --dispatch``."""
    for path in cache.glob("tuned-*.json"):
        (rows / "timings").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, rows / "timings" / f"{part}-{path.name}")


class Run:
    """What a run does and records: at most three files in ``out``, written anew after each part.

    work: a folder for logs, rows and caches. facts: what the summary says of the machine.
    """

    def __init__(self, name: str, out: Path, work: Path, facts: dict) -> None:
        self.name, self.out, self.work, self.facts = name, out, work, facts
        self.logs, self.rows = work / "logs", work / "rows"
        self.results: list[Result] = []
        self.begin = time.monotonic()
        for folder in (out, self.logs, self.rows):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, todo: list[Part], seconds: float, environ: dict[str, str]) -> bool:
        """Runs the parts in ``seconds`` from now; whether all passed."""
        end = time.monotonic() + seconds
        for i, part in enumerate(todo):
            limit = limit_of(todo[i:], end - time.monotonic())
            print(f"--- {part.name}, at most {limit:.0f} s", flush=True)
            self.add(self._run_part(part, limit, environ))
        return all(result.passed for result in self.results)

    def _run_part(self, part: Part, limit: float, environ: dict[str, str]) -> list[Result]:
        end = time.monotonic() + limit
        cache = self.work / "cache" / part.name  # what other parts timed does not choose
        environ = {**environ, "FUSED_RES_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}

        def run(job: Job) -> Result:
            left = min(job.limit, end - time.monotonic())
            return run_job(part.name, job, left, environ, self.logs)

        with concurrent.futures.ThreadPoolExecutor(part.at_once) as pool:
            results = list(pool.map(run, part.jobs))
        keep_timings(part.name, cache, self.rows)
        garbage = unreadable(self.rows)
        if garbage:
            words = f"wrote rows that cannot be read: {', '.join(garbage)}"
            results = [r._replace(status=words) if r.passed else r for r in results]
        return results

    def add(self, results: list[Result]) -> None:
        self.results += results
        for result in results:
            print(f"{result.job:32} {result.status}, {result.seconds:.1f} s", flush=True)
            if result.output:
                print("    " + "\n    ".join(result.output.splitlines()[-8:]), flush=True)
        self.write()

    def write(self) -> None:
        summary = {
            "run": self.name, "passed": all(r.passed for r in self.results),
            "seconds": round(time.monotonic() - self.begin, 1), **self.facts,
            "jobs": [
                {**r._asdict(), "seconds": round(r.seconds, 1), "limit": round(r.limit, 1)}
                for r in self.results
            ],
        }  # fmt: skip
        _replace(self.out / f"{self.name}-summary.json", json.dumps(summary, indent=1).encode())
        _replace(self.out / f"{self.name}-summary.txt", (self.table() + "\n").encode())
        archive = self.out / f"{self.name}.tar.gz"
        scratch = archive.with_suffix(".part")
        with tarfile.open(scratch, "w:gz", compresslevel=4) as tar:
            for path in sorted([*self.logs.rglob("*"), *self.rows.rglob("*")]):
                if path.is_file() and not path.is_symlink() and path.stat().st_size < MOST_BYTES:
                    tar.add(path, path.relative_to(self.work))
        os.replace(scratch, archive)

    def table(self) -> str:
        lines = [f"{'part':12} {'job':32} {'seconds':>7} {'limit':>6}  status"]
        lines += [
            f"{r.part:12} {r.job:32} {r.seconds:7.1f} {r.limit:6.0f}  {r.status}"
            for r in self.results
        ]
        failed = sum(not r.passed for r in self.results)
        return "\n".join([*lines, f"{len(self.results)} jobs, {failed} of them failed"])


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_bytes(content)
    os.replace(scratch, path)


@contextlib.contextmanager
def killing() -> Iterator[None]:
    """Ends every process of the body when it is left, by SIGTERM too."""

    def leave(number: int, frame: object) -> None:
        for group in list(_running):
            kill(group, signal.SIGKILL)
        raise SystemExit(128 + number)

    before = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for group in list(_running):
            kill(group, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
