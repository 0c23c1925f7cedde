"""Checkpoints: replaced as a whole or not at all, and checked before anything in them is used."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..cli import CommandError
from .settings import Settings

FORMAT, VERSION = "fused_res.train", 1
KEYS = {
    "settings": dict, "arguments": dict, "classes": list, "mean": Tensor, "std": Tensor,
    "data": str, "processes": int, "epoch": int, "net": int, "step": int, "nets": dict,
    "ranks": list, "best": float, "log": int,
}  # fmt: skip


class CheckpointError(CommandError):
    """A file that is no checkpoint, or is damaged, or does not fit. Names the file and the key."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once all of it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state``, the ``KEYS``, for ``torch.load(path, weights_only=True)``."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """What ``save`` wrote, on the CPU, ``settings`` as ``Settings``.

    Raises:
        CheckpointError: it cannot be read, is damaged (``torch.load`` does not look at the
            checksums in the file), or is another program's or version's.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is None:
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: {type(error).__name__}: {reason}"
            ) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of fused-res train: key 'format' must be {FORMAT!r}"
        )
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: key 'version' is {state.get('version')!r}, must be {VERSION}"
        )
    for key, kind in KEYS.items():
        if not isinstance(state.get(key), kind):
            found = type(state[key]).__name__ if key in state else "missing"
            raise CheckpointError(f"{path}: key {key!r} must be a {kind.__name__}, is {found}")
    for name in {f.name for f in fields(Settings)} ^ state["settings"].keys():
        raise CheckpointError(f"{path}: key 'settings' does not fit: {name} is missing or unknown")
    return {**state, "settings": Settings(**state["settings"])}


def load_weights(model: nn.Module, weights: Any, where: str) -> None:
    """``load_state_dict``, which says in one line what does not fit.

    Args:
        model: takes the weights, on the device it is on.
        weights: a state_dict.
        where: the file and the key of ``weights`` in it.
    """
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where} must be a dict, is {type(weights).__name__}")
    wanted = model.state_dict()
    for key in (*wanted, *weights):
        if key not in weights or key not in wanted:
            words = "is missing" if key in wanted else "is not in the model"
            raise CheckpointError(f"{where}.{key} {words}")
    for key, t in wanted.items():
        if not isinstance(weights[key], Tensor) or weights[key].shape != t.shape:
            shape = tuple(getattr(weights[key], "shape", ()))
            raise CheckpointError(
                f"{where}.{key} has shape {shape}, the model's is {tuple(t.shape)}"
            )
    model.load_state_dict(weights)


def seed_of(*parts: int) -> int:
    """A seed for each tuple of numbers, as if by chance."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_everything(*parts: int) -> None:
    seed = seed_of(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def rng_state() -> dict[str, Any]:
    """The states of the process's random number generators."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
