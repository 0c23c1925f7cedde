"""The log of a run: ``log.jsonl``, and TensorBoard's files if TensorBoard is installed."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Log:
    """Appends records to ``folder/log.jsonl``, a line of JSON each.

    Args:
        size: bytes of an existing log to keep; the rest is newer than the resumed checkpoint.
        epoch: of the resumed checkpoint, for TensorBoard.
    """

    def __init__(self, folder: Path, size: int, epoch: int) -> None:
        self._file = open(folder / "log.jsonl", "ab")  # noqa: SIM115
        self._file.truncate(min(size, self.size))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._board is not None and record["event"] == "epoch":
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{record['net']}/{name}", value, record["epoch"])
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
