"""Places that a forward read, and the values found there. Each call compares them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor, nn

from .reads import ask

MISSING = object()


def look(of: weakref.ref, name: str, default: Any) -> Any:
    return getattr(of(), name, default)


class Places:
    """Places outside of the modules, and the values found there."""

    def __init__(self) -> None:
        # (id of owner, name) -> getter, name, value
        self._kept: dict[tuple[int, str], tuple[Callable, str, Any]] = {}
        self._weak: dict[tuple[int, str], tuple[Callable, str, weakref.ref]] = {}
        self._containers: dict[int, tuple[Any, Callable[[], bool]]] = {}
        self._questions: dict[Callable, tuple] = {}

    def put(self, owner: Any, get: Callable, name: str, value: Any, keeps: bool) -> None:
        """``get(name, default)`` returned ``value``; ``keeps`` tells whether to keep it alive."""
        if keeps:
            self._kept[id(owner), name] = get, name, value
        else:
            self._weak[id(owner), name] = get, name, weakref.ref(value)

    def put_container(self, of: Any) -> None:
        self._containers[id(of)] = of, _content_check(of)

    def put_question(self, question: Callable, answer: tuple) -> None:
        self._questions[question] = answer

    def add(self, other: Places) -> None:
        self._kept |= other._kept
        self._weak |= other._weak
        self._containers |= other._containers
        self._questions |= other._questions

    def passes(self) -> bool:
        """Whether each place still has its value."""
        if not all([get(name, MISSING) is value for get, name, value in self._kept.values()]):
            return False
        if not (self._weak or self._containers or self._questions):
            return True
        return (
            all([get(name, MISSING) is ref() for get, name, ref in self._weak.values()])
            and all([same() for _, same in self._containers.values()])
            and all([ask(question) == answer for question, answer in self._questions.items()])
        )


def _content_check(of: Any) -> Callable[[], bool]:
    if isinstance(of, dict):
        keys, values = list(of), list(of.values())
        return lambda: list(of) == keys and all(map(operator.is_, of.values(), values))
    if isinstance(of, (set, frozenset)):
        before = frozenset(of)
        return lambda: of == before
    values = list(of)
    return lambda: len(of) == len(values) and all(map(operator.is_, of, values))


class Modules:
    """The state of a module and of the modules inside it, in lists to loop over.

    No module is kept alive. A new module of the same class at the same address passes for the old
    one. Modules are numbered as by ``walk``.
    """

    def __init__(self, found: list[tuple[str, nn.Module | None]], parents: list[int]) -> None:
        modules = [module for _, module in found]
        self._parents = parents
        self._names = list(chain.from_iterable(modules[i]._modules for i in parents))
        self._ids = list(map(id, modules))
        self._classes = list(map(type, modules[1:]))  # the first's class has its plan
        self._complete = None not in modules
        self._looked_at: list[int] | None = []  # None: all but the first
        self._values: list[tuple[int, str, Any]] = []
        self._absent: list[tuple[int, str]] = []
        self._inside: list[tuple[int, str, str, Any]] = []

    def put(self, number: int, name: str, value: Any) -> None:
        """An attribute has this value, which is kept alive."""
        self._values.append((number, name, value))

    def put_absent(self, number: int, name: str) -> None:
        """The module has no attribute of this name that hides one of its class."""
        self._absent.append((number, name))

    def put_inside(self, number: int, slot: str, name: str, found: Any) -> None:
        """A parameter or buffer is there (True), is None, or is MISSING."""
        self._inside.append((number, slot, name, found))

    def look_at(self, numbers: list[int]) -> None:
        """These modules have neither hooks nor a forward of their own."""
        self._looked_at = None if numbers == list(range(1, len(self._ids))) else numbers

    def passes(self, root: nn.Module) -> bool:
        """Whether the modules are unchanged in everything that was put here."""
        modules: list[nn.Module | None] = [root]
        names: list[str] = []
        for i in self._parents:
            children = modules[i].__dict__["_modules"]
            names += children
            modules += children.values()
        if (
            list(map(id, modules)) != self._ids
            or names != self._names
            or list(map(type, modules[1:])) != self._classes
        ):
            return False
        if self._complete:
            own = [module.__dict__ for module in modules]
        else:
            own = [None if module is None else module.__dict__ for module in modules]
        looked_at = self._looked_at
        inside = own[1:] if looked_at is None else [own[i] for i in looked_at]
        return (
            not any([
                of["_forward_hooks"] or of["_forward_pre_hooks"] or of["_backward_hooks"]
                or of["_backward_pre_hooks"] or "forward" in of or "_conv_forward" in of
                or "_call_impl" in of
                for of in inside
            ])
            and all([own[i].get(name, MISSING) is value for i, name, value in self._values])
            and not any([name in own[i] for i, name in self._absent])
            and all([is_there(own[i][s], name) is found for i, s, name, found in self._inside])
        )  # fmt: skip


def is_there(tensors: dict[str, Tensor | None], name: str) -> Any:
    found = tensors.get(name, MISSING)
    return found if found is None or found is MISSING else True


def walk(
    root: nn.Module, leaves: frozenset[str]
) -> tuple[list[tuple[str, nn.Module | None]], list[int]]:
    """All modules by path, a shared module once for each path, and the numbers of the modules that
    have their children in the list. The children of ``leaves`` are left out."""
    found: list[tuple[str, nn.Module | None]] = [("", root)]
    parents, seen = [], set()
    for i, (path, module) in enumerate(found):  # the list grows
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if path not in leaves:
            parents.append(i)
            found += [(f"{path}.{n}" if path else n, m) for n, m in module._modules.items()]
    return found, parents
