"""Rules for values. A flag of the command line and a key of a checkpoint share one rule."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cli import CommandError


class CheckpointError(CommandError):
    """A file is no checkpoint, is damaged or does not fit; the message names the file and the
    key."""


class Rule(NamedTuple):
    """``words``: a description of the values that ``accepts`` accepts; ``accepts`` never raises."""

    words: str
    accepts: Callable[[Any], bool]

    def check(self, value: Any, where: str) -> None:
        """
        Args:
            value: from a checkpoint.
            where: the file and the key in it.

        Raises:
            CheckpointError: the value breaks the rule.
        """
        if not self.accepts(value):
            raise CheckpointError(f"{where} must be {self.words}, is {shown(value)}")


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Rule:
    """A finite number that is at least (or above) ``least`` and at most ``most``."""
    noun = "a whole number" if kind is int else "a number"
    limit = f" and at most {most}" if most < math.inf else ""
    kinds = (int,) if kind is int else (int, float)

    def accepts(value: Any) -> bool:
        return (
            type(value) in kinds
            and least <= value <= most
            and (kind is int or abs(value) <= sys.float_info.max)
            and not (above and value == least)
        )

    return Rule(f"{noun} {'above' if above else 'at least'} {least}{limit}", accepts)


def one_of(values: Iterable[Any]) -> Rule:
    values = tuple(values)
    words = "one of " if len(values) > 1 else ""
    return Rule(
        words + ", ".join(map(repr, values)),
        lambda value: type(value) in map(type, values) and value in values,
    )


def maybe(rule: Rule) -> Rule:
    return Rule(f"None or {rule.words}", lambda value: value is None or rule.accepts(value))


def each(kind: type, rule: Rule, least: int, most: int) -> Rule:
    """A ``kind`` of ``least`` to ``most`` different values."""
    return Rule(
        f"a {kind.__name__} of {least} to {most}, each once, each {rule.words}",
        lambda value: (
            type(value) is kind
            and least <= len(value) <= most
            and all(map(rule.accepts, value))
            and len(set(value)) == len(value)
        ),
    )


def text(most: int) -> Rule:
    words = f"text of 1 to {most} characters"
    return Rule(words, lambda value: type(value) is str and 0 < len(value) <= most)


def tensor(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    least: float = -math.inf,
    most: float = math.inf,
) -> Rule:
    """A dense tensor of finite values, between ``least`` and ``most`` if they are real."""
    words = f"a tensor of {str(dtype).removeprefix('torch.')}, shape {tuple(shape)}"
    if least > -math.inf or most < math.inf:
        words += f", values from {least} to {most}"

    def accepts(value: Any) -> bool:
        if not is_like(value, dtype, shape) or not value.isfinite().all():
            return False
        return dtype.is_complex or bool(((value >= least) & (value <= most)).all())

    return Rule(f"{words}, all finite", accepts)


def is_like(
    value: Any, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
) -> bool:
    """Whether ``value`` is a dense tensor of this dtype and shape; ignores its values."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
        and dtype in (None, value.dtype)
        and shape in (None, value.shape)
    )


FLAG = Rule("True or False", lambda value: type(value) is bool)
IDENTIFIER = Rule("a name", lambda value: type(value) is str and value.isidentifier())


def is_plain(value: Any) -> bool:
    """Whether ``value`` is small and made of Python's literals. Stops at lists that contain
    themselves, or another list many times."""
    left, todo = 10_000, [(value, 0)]
    while todo:
        value, depth = todo.pop()
        left -= 1
        if left < 0 or depth > 20:
            return False
        if type(value) in (tuple, list, set, dict):
            if len(value) > left:
                return False
            inner = [*value, *value.values()] if type(value) is dict else value
            todo += [(v, depth + 1) for v in inner]
        elif type(value) in (str, bytes):
            if len(value) > 10_000:
                return False
        elif type(value) in (float, complex):
            if not abs(value) < math.inf:
                return False
        elif value is not None and type(value) not in (bool, int):
            return False
    return True


class _Repr(reprlib.Repr):
    """Makes a short text of one line of any value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxlevel, self.maxdict = 80, 3, 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"a number of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        return f"a {type(x).__name__}"

    def repr_float(self, x: float, level: int) -> str:
        return repr(x)

    repr_bool = repr_NoneType = repr_float

    def repr_Tensor(self, x: Tensor, level: int) -> str:
        return f"a tensor of {str(x.dtype).removeprefix('torch.')}, shape {tuple(x.shape)}"

    repr_Parameter = repr_Tensor


def shown(value: Any) -> str:
    """``value`` in at most 200 characters of one line."""
    text = _Repr().repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
