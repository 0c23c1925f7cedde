"""The example's call of a forward, and the calls that differ from it in tensors alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_FORMS = 64  # ways to write the same call, by position or by name

_PLAIN = {type(None), bool, int, float, complex, str, bytes}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_ANY = inspect.signature(lambda *args, **kwargs: None)


class _Slot(NamedTuple):
    """Stands for a tensor."""

    index: int


def is_plain(value: Any) -> bool:
    """Whether a value is immutable and ``repr`` shows all of it."""
    if type(value) in (tuple, torch.Size):
        return all(map(is_plain, value))
    return type(value) in _PLAIN


def _same(a: Any, b: Any) -> bool:
    # not ==, by which 0.0 equals -0.0, and 1 equals True
    return type(a) is type(b) and is_plain(a) and is_plain(b) and repr(a) == repr(b)


def has_no_tensor(value: Any) -> bool:
    """Whether a value is plain, or a container of plain values."""
    if type(value) is dict:
        return all(map(has_no_tensor, (*value, *value.values())))
    if type(value) in (tuple, list):
        return all(map(has_no_tensor, value))
    return is_plain(value)


def example_call(example: Any) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments of an example.

    Raises:
        TypeError: it is no tensor, tuple of tensors or dictionary of keyword inputs.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    kinds = "a tensor or a tuple of tensors, or a dict of keyword inputs"
    if isinstance(example, Mapping):
        for name in example:
            if not isinstance(name, str):
                raise TypeError(f"example must have names as keys, got {name!r}")
        args, kwargs = (), dict(example)
    elif isinstance(example, (tuple, list)):
        args, kwargs = tuple(example), {}
        for i, value in enumerate(args):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(
                    f"example[{i}] must be a tensor or None (other values go by name: a dict), "
                    f"got {type(value).__name__}"
                )
    else:
        raise TypeError(f"example must be {kinds}, got {type(example).__name__}")
    if all(map(has_no_tensor, (*args, *kwargs.values()))):
        got = "one without tensors" if args or kwargs else "an empty one"
        raise TypeError(f"example must be {kinds}, got {got}")
    return args, kwargs


class Parameters:
    """The parameters of a class's forward."""

    def __init__(self, forward: Callable) -> None:
        try:
            signature = inspect.signature(forward)
        except (TypeError, ValueError):  # it is not written in Python
            signature = _ANY
        own = list(signature.parameters.values())
        if own and own[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            own = own[1:]  # self
        self._signature = signature.replace(parameters=own)
        # a wrapper may treat a default that is given otherwise than one that is left out
        self._is_exact = (
            isinstance(forward, FunctionType)
            and not hasattr(forward, "__wrapped__")
            and all(p.default is p.empty or is_plain(p.default) for p in own)
        )
        self._changing = {p.name for p in own if isinstance(p.default, (list, dict, set))}

    def _bind(self, args: tuple, kwargs: dict) -> inspect.BoundArguments | None:
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError:
            return None

    def named(self, args: tuple, kwargs: dict) -> dict[Any, Any] | None:
        """All arguments by name; None where they do not fit the forward."""
        bound = self._bind(args, kwargs)
        if bound is None:
            return None
        if self._is_exact:
            bound.apply_defaults()
        found = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                found |= {(name, i): v for i, v in enumerate(value)}
            elif kind is inspect.Parameter.VAR_KEYWORD:
                found |= {(name, key): v for key, v in value.items()}
            else:
                found[name] = value
        return found

    def is_settled(self, named: dict[Any, Any]) -> bool:
        """Whether every argument with a mutable default is given."""
        return self._changing <= named.keys()

    def by_position(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The same call with arguments by position, where the forward sees no difference."""
        bound = self._bind(args, kwargs) if self._is_exact else None
        return (args, kwargs) if bound is None else (bound.args, bound.kwargs)


class Call:
    """The example's call. Its tensors are the arguments that are tensors themselves, in order.

    is_known: whether all other arguments are plain values, which can be compared.
    """

    def __init__(self, parameters: Parameters, args: tuple, kwargs: dict) -> None:
        values = [*args, *kwargs.values()]
        tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        for index, i in enumerate(tensors):
            values[i] = _Slot(index)
        self.is_known = all(type(v) is _Slot or is_plain(v) for v in values)
        self._count = len(tensors)
        self.forms: dict[tuple, tuple[int, ...]] = {}
        if not self.is_known:  # keeps nothing of the example alive
            return
        count, names = len(args), list(kwargs)
        args, kwargs = tuple(values[:count]), dict(zip(names, values[count:], strict=True))
        self._named = parameters.named(args, kwargs)
        self.is_known = self._named is not None and parameters.is_settled(self._named)
        self._args, self._kwargs = parameters.by_position(args, kwargs)
        if self.is_known:  # a compiled forward cannot add forms
            tensors = [name for name, v in self._named.items() if type(v) is _Slot]
            for count in range(len(tensors) + 1):
                self._order(parameters, (count, *(n for n in tensors[count:] if type(n) is str)))

    def with_tensors(self, inputs: tuple[Tensor, ...]) -> tuple[list, dict[str, Any]]:
        """The call with other tensors."""
        args = [inputs[a.index] if type(a) is _Slot else a for a in self._args]
        kwargs = {k: inputs[a.index] if type(a) is _Slot else a for k, a in self._kwargs.items()}
        return args, kwargs

    def _of_kind(self, named: dict | None, kind: type) -> list | None:
        """The arguments in place of the example's tensors, if all others equal the example's."""
        if named is None or list(named) != list(self._named):
            return None
        found = [None] * self._count
        for want, got in zip(self._named.values(), named.values(), strict=True):
            if type(want) is not _Slot:
                if not _same(want, got):
                    return None
            elif isinstance(got, kind):
                found[want.index] = got
            else:
                return None
        return found

    def _order(self, parameters: Parameters, form: tuple) -> tuple[int, ...]:
        """Positions of the example's tensors in a call of this form; () if it is another call."""
        count, *names = form
        slots = list(map(_Slot, range(count + len(names))))
        named = parameters.named(tuple(slots[:count]), dict(zip(names, slots[count:], strict=True)))
        found = self._of_kind(named, _Slot) or ()
        order = tuple(slot.index for slot in found)
        if len(self.forms) < MOST_FORMS:
            self.forms[form] = order
        return order

    def inputs(self, parameters: Parameters, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """The tensors of a call that equals the example's in all other arguments, else None. Calls
        that pass tensors alone are looked up by their form."""
        form = len(args), *kwargs
        order = self.forms.get(form)
        if order is None:
            if not self.is_known or torch.compiler.is_compiling():
                return None
            order = self._order(parameters, form)
        if order:
            values = (*args, *kwargs.values()) if kwargs else args
            found = [t for t in [values[i] for i in order] if isinstance(t, Tensor)]
            if len(found) == self._count:
                return found
        if torch.compiler.is_compiling():
            return None
        return self._of_kind(parameters.named(args, kwargs), Tensor)

    def shared(self, parameters: Parameters, args: tuple, kwargs: dict) -> list[tuple[int, Tensor]]:
        """(index of the example's tensor, tensor) for each tensor of a call at such a place."""
        named = parameters.named(args, kwargs) if self.is_known else None
        if named is None:
            return []
        slots = {n: want.index for n, want in self._named.items() if type(want) is _Slot}
        pairs = ((slots[name], t) for name, t in named.items() if name in slots)
        return [(i, t) for i, t in pairs if isinstance(t, Tensor)]
