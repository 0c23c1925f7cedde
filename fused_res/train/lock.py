"""One trainer in a folder at a time."""

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
    """Holds ``folder``, which is made if it is not there. The system lets go of it when the process
    ends, in whatever way: nothing stays behind that locks.

    Raises:
        CommandError: another process holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    file = _hold(path)
    try:
        yield
    finally:
        if fcntl is not None:  # while it is held: another that opened it before looks again
            path.unlink(missing_ok=True)
        os.close(file)
        if fcntl is None:
            with contextlib.suppress(OSError):
                path.unlink()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came of it


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
        os.close(file)  # the one who held it took it away


def _lock(file: int) -> bool:
    """Whether it could be locked."""
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
            raise  # those: a file system without locks, where nothing can be refused
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
