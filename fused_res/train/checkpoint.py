"""Checkpoints. A new one replaces the old one whole, and a loaded one is checked before its use."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import os
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from . import checks, nets
from .checks import CheckpointError, Rule
from .settings import CLASSES, restored

FORMAT, VERSION = "fused_res.train", 1
KEYS = {
    "settings": dict, "arguments": dict, "classes": list, "mean": Tensor, "std": Tensor,
    "data": str, "processes": int, "epoch": int, "net": int, "step": int, "nets": dict,
    "ranks": list, "best": float, "log": int,
}  # fmt: skip
LARGE = 2**53
# The rule of each key. ``Trainer.load`` checks the rest, which depends on the model and the data.
RULES = {
    "classes": checks.each(list, CLASSES, 2, 100_000),
    "mean": checks.tensor(torch.float32, (3,), 0, 1),
    "std": checks.tensor(torch.float32, (3,), 1e-6, 1),
    "data": Rule(
        "64 hexadecimal digits",
        lambda value: type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None,
    ),
    "processes": checks.number(int, 1, 2**20),
    "epoch": checks.number(int, 0, LARGE),
    "net": checks.number(int, 0, 1),
    "step": checks.number(int, 0, LARGE),
    "best": checks.number(float, -1, 1),
    "log": checks.number(int, 1, LARGE),
}
IS_DICT = Rule("a dict", lambda value: isinstance(value, dict))
NET = {
    "model": IS_DICT, "average": checks.maybe(IS_DICT), "optimizer": IS_DICT, "schedule": IS_DICT,
    "scaler": IS_DICT, "accuracy": checks.number(float, 0, 1),
}  # fmt: skip
RANK = {
    "rng": Rule(
        "states of random number generators",
        lambda value: type(value) is dict and _is_rng_state(value),
    ),
    "sums": checks.tensor(torch.float64, (3,), 0),
    "seconds": checks.number(float, 0),
}
TENSOR_NAME = Rule(
    "names with dots between them",
    lambda value: type(value) is str and re.fullmatch(r"[\w.]{1,200}", value) is not None,
)
COUNTS = ("running_var", "num_batches_tracked", "n_averaged")  # never negative


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. It replaces ``path`` once all of it is on the disk.

    Raises:
        OSError: it cannot be written; names ``path``, which stays as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # other systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # writes the new name to the disk
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state``, a dict of the ``KEYS``, for ``torch.load(path, weights_only=True)``."""
    content = io.BytesIO()  # of a file torch.save does not say why a write failed
    torch.save({"format": FORMAT, "version": VERSION, **state}, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Reads the state that ``save`` wrote, on the CPU, with ``settings`` as ``Settings``.

    Raises:
        CheckpointError: the file cannot be read; it is damaged (``torch.load`` ignores the file's
            checksums); another program or version wrote it; or a value breaks its rule.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if any(info.compress_type for info in archive.infolist()):
                    raise ValueError("it is compressed")
                damaged = archive.testzip()
            if damaged is None:
                file.seek(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}"
            ) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
    if type(state) is not dict or not checks.one_of([FORMAT]).accepts(state.get("format")):
        raise CheckpointError(
            f"{path} is not a checkpoint of fused-res train: key 'format' must be {FORMAT!r}"
        )
    if not checks.one_of([VERSION]).accepts(state.get("version")):
        raise CheckpointError(
            f"{path}: key 'version' is {checks.shown(state.get('version'))}, must be {VERSION}"
        )
    return _checked(state, path)


def _checked(state: dict[Any, Any], path: Path) -> dict[str, Any]:
    for key, kind in KEYS.items():
        if not isinstance(state.get(key), kind):
            found = type(state[key]).__name__ if key in state else "missing"
            raise CheckpointError(f"{path}: key {key!r} must be a {kind.__name__}, is {found}")
    settings = restored(state["settings"], f"{path}: key 'settings'")
    for key, rule in RULES.items():
        rule.check(state[key], f"{path}: {key}")
    if settings.classes is not None:
        checks.one_of([list(settings.classes)]).check(state["classes"], f"{path}: classes")
    arguments = nets.arguments(settings, len(state["classes"]))
    if not checks.is_plain(state["arguments"]) or state["arguments"] != arguments:
        raise CheckpointError(
            f"{path}: arguments must be {checks.shown(arguments)}, by settings and classes, is "
            f"{checks.shown(state['arguments'])}"
        )
    names = settings.nets()
    checks.number(int, 0, settings.epochs).check(state["epoch"], f"{path}: epoch")
    done = state["epoch"] == settings.epochs
    checks.number(int, 0, 0 if done else len(names) - 1).check(state["net"], f"{path}: net")
    checks.number(int, 0, 0 if done else LARGE).check(state["step"], f"{path}: step")
    _fields(state["nets"], dict.fromkeys(names, IS_DICT), f"{path}: nets")
    for name, net in state["nets"].items():
        where = f"{path}: nets.{name}"
        _fields(net, NET, where)
        if (net["average"] is None) != (settings.ema is None):
            raise CheckpointError(f"{where}.average must be there if --ema is, and only then")
    if len(state["ranks"]) != state["processes"]:
        raise CheckpointError(
            f"{path}: ranks must have {state['processes']} entries, as there were processes, has "
            f"{len(state['ranks'])}"
        )
    for rank, mine in enumerate(state["ranks"]):
        where = f"{path}: ranks.{rank}"
        IS_DICT.check(mine, where)
        _fields(mine, RANK, where)
    return {**state, "settings": settings, "arguments": arguments}


def _fields(found: dict[Any, Any], rules: dict[str, Rule], where: str) -> None:
    for key, rule in rules.items():
        if key not in found:
            raise CheckpointError(f"{where}.{key} does not fit: key {key!r} is missing")
        rule.check(found[key], f"{where}.{key}")
    for key in found.keys() - rules.keys():
        raise CheckpointError(f"{where} does not fit: key {checks.shown(key)} is unknown")


def fitted(found: Any, fresh: Any, rules: dict[str, Rule], where: str) -> Any:
    """``fresh`` with the values that ``found``, from a checkpoint, has for the keys in ``rules``.

    All other values must be the same in both, except for constants that only some versions of
    PyTorch keep.
    """
    if isinstance(fresh, dict):
        IS_DICT.check(found, where)
        values = copy.copy(fresh)
        for key, value in fresh.items():
            inner = where + (f".{key}" if where[-1] != " " else str(key))
            if key not in found:
                if key in rules or isinstance(value, (dict, list)):
                    raise CheckpointError(f"{inner} is missing")
            elif key in rules:
                rules[key].check(found[key], inner)
                values[key] = found[key]
            else:
                values[key] = fitted(found[key], value, rules, inner)
        return values
    if isinstance(fresh, (list, tuple)):
        if type(found) is not type(fresh) or len(found) != len(fresh):
            must, is_ = map(checks.shown, (fresh, found))
            raise CheckpointError(f"{where} must be {must}, is {is_}")
        pairs = enumerate(zip(found, fresh, strict=True))
        return type(fresh)(fitted(a, b, rules, f"{where}.{i}") for i, (a, b) in pairs)
    checks.one_of([fresh]).check(found, where)
    return fresh


def load_weights(model: nn.Module, weights: Any, where: str) -> None:
    """``load_state_dict`` with an error of one line.

    Args:
        model: on any device.
        weights: a state_dict.
        where: the file and the key of ``weights`` in it.
    """
    IS_DICT.check(weights, where)
    wanted = model.state_dict()
    for key in (*wanted, *weights):
        if key not in weights or key not in wanted:
            words = "is missing" if key in wanted else "is not in the model"
            named = key if TENSOR_NAME.accepts(key) else checks.shown(key)
            raise CheckpointError(f"{where}.{named} {words}")
    for key, t in wanted.items():
        found = weights[key]
        if not isinstance(t, Tensor):  # from get_extra_state
            continue
        if not isinstance(found, Tensor) or found.shape != t.shape:
            shape = tuple(getattr(found, "shape", ()))
            raise CheckpointError(
                f"{where}.{key} has shape {shape}, the model's is {tuple(t.shape)}"
            )
        if not checks.is_like(found, t.dtype, t.shape):
            raise CheckpointError(f"{where}.{key} must be a dense tensor of {t.dtype}")
        # a model may contain infinities, in a mask for example
        wrong = ~found.isfinite() & t.isfinite().to(found.device)
        if key.rpartition(".")[2] in COUNTS:
            wrong |= found < 0
        if wrong.any():
            raise CheckpointError(f"{where}.{key} has a value that cannot be: {found[wrong][0]}")
    model.load_state_dict(weights)


def seed_of(*numbers: int) -> int:
    """A pseudo-random seed for each tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def seed_everything(*numbers: int) -> None:
    seed = seed_of(*numbers)
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


def _is_rng_state(state: dict[Any, Any]) -> bool:
    """Whether fresh generators accept ``state``."""
    if not {"torch", "python"} <= state.keys() <= {"torch", "python", "cuda", "numpy"}:
        return False
    if not checks.is_like(state["torch"], torch.uint8, torch.get_rng_state().shape):
        return False
    if "cuda" in state and not checks.is_like(state["cuda"], torch.uint8, (16,)):
        return False
    python = state["python"]
    if not checks.is_plain(python) or type(python) is not tuple or len(python) != 3:
        return False
    try:
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(python)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return False
    if python[2] is not None and not checks.number(float, -math.inf).accepts(python[2]):
        return False
    return "numpy" not in state or _is_numpy_state(state["numpy"])


def _is_numpy_state(state: Any) -> bool:
    word = checks.number(int, 0, 2**32 - 1)
    rules = (
        checks.one_of(["MT19937"]),
        Rule("", lambda v: type(v) is list and len(v) == 624 and all(map(word.accepts, v))),
        checks.number(int, 0, 624),
        checks.number(int, 0, 1),
        checks.number(float, -math.inf),
    )
    return (
        type(state) is tuple
        and len(state) == len(rules)
        and all(rule.accepts(value) for rule, value in zip(rules, state, strict=True))
    )
