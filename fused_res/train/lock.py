"""A lock on a folder, so that only one process trains in it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ..cli import CommandError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks ``folder``, which is made if it is missing. The system unlocks it when the process
    ends, even if the process is killed.

    Raises:
        CommandError: another process has locked it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    file = _hold(path)
    try:
        yield
    finally:
        # Removed while locked: a process that has opened the file before finds it gone and retries.
        if fcntl is not None:
            path.unlink(missing_ok=True)
        os.close(file)
        if fcntl is None:
            with contextlib.suppress(OSError):
                path.unlink()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # removes it only if it is empty


def _hold(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file):
                raise CommandError(
                    f"{path.parent} is in use: {_holder(file)} trains there; --out names another "
                    f"folder"
                )
            if _is_at(path, file):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the process that had locked it has removed it


def _lock(file: int) -> bool:
    """Locks the file; returns whether that succeeded."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, 2**20, os.SEEK_SET)  # a byte that nobody reads
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise  # the three mean a file system without locks: the file counts as locked
    os.lseek(file, 0, os.SEEK_SET)
    return True


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    number = os.read(file, 20).decode(errors="replace").strip()
    return f"process {number}" if number.isdecimal() else "another process"
