"""Whether all that a fused forward depends on is as it was.

A graph of ``torch.fx`` has frozen whatever the forward looked at beside tensors. A ``Record`` holds
all of that as one tuple of tokens, described when the forward was traced: the attributes that were
read, what lists, dictionaries and objects among them hold, the classes' methods, helper functions,
globals, and which children there are. In each call a ``Guard`` compares the places that were read,
by identity; where one differs, all is described anew. Equal tuples: the plan holds. Else the block
runs its own forward.
"""

# Lists, which all() and any() read faster than generators:
# ruff: noqa: C419
from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .reads import Reads, ask, globals_of, is_trusted

FORWARD_HOOKS = "_forward_hooks", "_forward_pre_hooks"
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_OVERRIDES = "forward", "_conv_forward"
_DICTIONARIES = "_parameters", "_buffers", "_modules"

MOST_TOKENS = 10_000
_MISSING = object()
# Converted to each other they compute the same where fused kernels run them
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_VALUES = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...),
           type(NotImplemented), torch.Size, torch.dtype, torch.device, torch.layout,
           torch.memory_format)  # fmt: skip
_CONTAINERS = list, tuple, dict, set, frozenset, deque, OrderedDict, defaultdict
_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType
_BASES_IN_C = {object, types.SimpleNamespace, *_VALUES, *_CONTAINERS}
_HIDE_STATE = Tensor, torch.Generator, torch.UntypedStorage
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made


class Unknowable(Exception):
    """A forward reads what cannot be compared; the message says what."""


def kind_of(module: nn.Module) -> type[nn.Module]:
    """A module's class, or the one that ``fuse_`` found it with."""
    kind = type(module)
    for name in ("model_class", "original"):  # a served model may be a fused block
        kind = kind.__dict__.get(name, kind)
    return kind


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _of_pytorch(module: str | None) -> bool:
    return is_trusted(module) or module == "torch"


# --- places that are compared in each call


def _look(of: weakref.ref, name: str, default: Any) -> Any:
    return getattr(of(), name, default)


class Places:
    """Places outside of a block's modules, and what was in them."""

    def __init__(self) -> None:
        # (id of owner, name) -> what gets it, name, what it got
        self._kept: dict[tuple[int, str], tuple[Callable, str, Any]] = {}
        self._weak: dict[tuple[int, str], tuple[Callable, str, weakref.ref]] = {}
        self._containers: dict[int, tuple[Any, Callable[[], bool]]] = {}
        self._questions: dict[Callable, tuple] = {}

    def put(self, owner: Any, get: Callable, name: str, value: Any, keeps: bool) -> None:
        """``get(name, default)`` returned ``value``, which is kept alive, or not."""
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

    def hold(self) -> bool:
        """Whether there is in each place what was there."""
        if not all([get(name, _MISSING) is value for get, name, value in self._kept.values()]):
            return False
        if not (self._weak or self._containers or self._questions):
            return True
        return (
            all([get(name, _MISSING) is ref() for get, name, ref in self._weak.values()])
            and all([same() for _, same in self._containers.values()])
            and all([ask(question) == answer for question, answer in self._questions.items()])
        )


def _content_check(of: Any) -> Callable[[], bool]:
    if isinstance(of, dict):
        keys, values = list(of), list(of.values())
        return lambda: list(of) == keys and all(map(is_, of.values(), values))
    if isinstance(of, (set, frozenset)):
        before = frozenset(of)
        return lambda: of == before
    values = list(of)
    return lambda: len(of) == len(values) and all(map(is_, of, values))


class _Modules:
    """A block and the modules in it as they were, in lists to loop over. No module is kept alive:
    one that was replaced at the same address, by one of the same class, may stand for it.
    """

    def __init__(self, block: nn.Module) -> None:
        self.numbers: dict[int, int] = {}
        self.values: list[tuple[int, str, Any]] = []  # of attributes
        self.absent: list[tuple[int, str]] = []  # attributes that would stand before the class'
        self.nones: list[tuple[int, str, str]] = []  # parameters and buffers that are None
        self._parents: list[int] = []
        self._names: list[str] = []
        found: list[nn.Module | None] = [block]
        for i, module in enumerate(found):  # which grows
            if module is None or id(module) in self.numbers:
                continue
            self.numbers[id(module)] = i
            if module._modules:
                self._parents.append(i)
                self._names += module._modules
                found += module._modules.values()
        self._ids, self._classes = list(map(id, found)), list(map(type, found))
        self._there = [i for i, module in enumerate(found) if module is not None]
        self._all = len(self._there) == len(found)

    def hold(self, block: nn.Module) -> bool:
        found: list[nn.Module | None] = [block]
        names: list[str] = []
        for i in self._parents:
            children = found[i].__dict__["_modules"]
            names += children
            found += children.values()
        if (
            list(map(id, found)) != self._ids
            or names != self._names
            or list(map(type, found)) != self._classes
        ):
            return False
        if self._all:
            own = list(map(vars, found))
        else:
            own = [None if module is None else vars(module) for module in found]
        inside = own[1:] if self._all else [own[i] for i in self._there[1:]]
        return (
            not any(
                [
                    of["_forward_hooks"]
                    or of["_forward_pre_hooks"]
                    or of["_backward_hooks"]
                    or of["_backward_pre_hooks"]
                    for of in inside
                ]
            )
            and not any([name in own[i] for i, name in self.absent])
            and all([own[i].get(name, _MISSING) is value for i, name, value in self.values])
            and all([own[i][part].get(name, _MISSING) is None for i, part, name in self.nones])
        )


# --- the description


class _Description:
    """Walks through what ``reads`` names, from a module.

    traced: whether PyTorch answers questions as it did when the forward was traced; or as now.

    tokens: equal where all that was read is the same.
    modules, places: what to compare in each call; None: something cannot be compared without
        keeping alive what may lead back to the module.
    children: of all modules inside the path, class and number of children.
    plain: (path, names of attributes, value) of what a compiler can compare.
    """

    def __init__(
        self, root: nn.Module, reads: Reads, opaque: frozenset[str], traced: bool = False
    ) -> None:
        self.tokens: list[Any] = []
        self.places: Places | None = Places()
        self.modules = _Modules(root)
        self.children: list[tuple[str, type, int]] = []
        self.plain: list[tuple[str, tuple[str, ...], Any]] = []
        self._reads, self._opaque = reads, opaque
        self._numbers = self.modules.numbers
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # what has been seen: no address is used twice
        self._where: list[str] = []
        for path, module in root.named_modules():
            self._module(path, module)
        for code, known in reads.codes:
            self._add(code)
            for name in sorted(globals_of(code)):
                self._named(known, known.get, name)
        for question, answer in reads.questions:
            answer = answer if traced else ask(question)
            self._add(question, answer)
            self._put("put_question", question, answer)

    def _put(self, kind: str, *args: Any) -> None:
        if self.places is not None:
            try:
                getattr(self.places, kind)(*args)
            except TypeError:  # a value without weak references
                self.places = None

    def _add(self, *tokens: Any) -> None:
        self.tokens += tokens
        if len(self.tokens) > MOST_TOKENS:
            where = ".".join(self._where) or "more values"
            raise Unknowable(f"its forward reads {where}: too many to compare")

    def _refuse(self, value: Any) -> None:
        kind, where = type(value), ".".join(self._where) or "a value"
        raise Unknowable(
            f"its forward reads {where}, a {kind.__module__}.{kind.__qualname__}, whose state a "
            f"trace does not see"
        )

    def _again(self, value: Any) -> bool:
        """Whether it was described before: things are numbered in the order they come."""
        number = self._seen.setdefault(id(value), len(self._seen))
        self._add(number)
        if number < len(self._alive):
            return True
        self._alive.append(value)
        return False

    def _named(self, owner: Any, get: Callable, name: str, keeps: bool = True) -> None:
        """Describes ``get(name, default)``, which is there in any case, or is kept if need be."""
        value = get(name, _MISSING)
        self._add(name)
        self._where.append(name)
        plain = value is _MISSING or self._value(value)
        self._where.pop()
        self._put("put", owner, get, name, value, keeps or plain)

    # --- modules

    def _module(self, path: str, module: nn.Module) -> None:
        own, number = module.__dict__, self._numbers[id(module)]
        kind = kind_of(module)
        kind = NORMS[0] if kind in NORMS else kind
        self._add(path, kind)
        if path:
            self.children.append((path, kind, len(module._modules)))
            self._add(has_hooks(module), *(name in own for name in _OVERRIDES))
            overrides = _OVERRIDES if isinstance(module, nn.Conv2d) else _OVERRIDES[:1]
            self.modules.absent += [(number, name) for name in overrides if name not in own]
        for name, child in own["_modules"].items():
            self._add(name, None if child is None else self._numbers[id(child)])
        for name in sorted({"inplace", *self._reads.attributes.get(path, ())}):
            self._where.append(name)
            self._attribute(path, module, kind, name)
            self._where.pop()
        if not _of_pytorch(kind.__module__) and path not in self._opaque:
            self._class(kind)

    def _attribute(self, path: str, module: nn.Module, kind: type, name: str) -> None:
        own, number = module.__dict__, self._numbers[id(module)]
        in_class = _in_class(kind, name)
        if name in _DICTIONARIES:
            self._add(name, *own[name], *(v is None for v in own[name].values()))
        elif name in own and not hasattr(type(in_class), "__set__"):
            self._add(name)
            value = own[name]
            if self._value(value):
                self.modules.values.append((number, name, value))
            else:
                get = functools.partial(_look, weakref.ref(module))
                self._put("put", module, get, name, value, False)
            self._plain(path, name, value)
        elif in_class is not _MISSING:  # a method, a property, a constant: described with its class
            self.modules.absent.append((number, name))
        else:
            part = next((part for part in _DICTIONARIES if name in own[part]), None)
            if part in ("_parameters", "_buffers"):
                self._add(name, own[part][name] is None)
                if own[part][name] is None:
                    self.modules.nones.append((number, part, name))

    def _plain(self, path: str, name: str, value: Any) -> None:
        if isinstance(value, (*_VALUES, *_FUNCTIONS)):
            self.plain.append((path, (name,), value))
        elif isinstance(value, (list, tuple, dict)):
            if _is_plain(value):
                self.plain.append((path, (name,), _copied(value)))
        elif _has_dict(value) and not isinstance(value, (type, types.ModuleType)):
            for inner in sorted(self._reads.names & vars(value).keys()):
                if isinstance(vars(value)[inner], _VALUES):
                    self.plain.append((path, (name, inner), vars(value)[inner]))

    # --- values

    def _value(self, value: Any) -> bool:
        """Describes it; whether it may be kept alive: it cannot lead back to a module."""
        kind = type(value)
        if kind in _VALUES:
            self._add(kind, repr(value))
        elif isinstance(value, enum.Enum):
            self._add(kind, value.name)
        elif isinstance(value, _HIDE_STATE):
            self._refuse(value)
        elif isinstance(value, types.ModuleType):
            self._namespace(value)
        elif isinstance(value, type):
            self._add(value)
            if not _of_pytorch(value.__module__):
                self._class(value)
        elif isinstance(value, types.FunctionType):
            return self._function(value)
        elif isinstance(value, _FUNCTIONS):
            return self._in_c(value)
        elif isinstance(value, types.MethodType):
            self._add(kind)
            self._value(value.__func__)
            self._value(value.__self__)
            return False
        elif isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
            parts = ("fget", "fset", "__func__", "func")
            return self._all(kind, [getattr(value, part, None) for part in parts])
        elif kind is functools.partial:
            return self._all(kind, [value.func, value.args, value.keywords])
        elif kind in _CONTAINERS:
            return self._container(value)
        else:
            return self._object(value)
        return True

    def _all(self, kind: type, values: list[Any]) -> bool:
        self._add(kind)
        return all([self._value(value) for value in values])

    def _namespace(self, module: types.ModuleType) -> None:
        if self._again(module):
            return
        for name in sorted(self._reads.names & vars(module).keys()):
            value = vars(module)[name]
            # PyTorch's switches are asked for by functions
            known = isinstance(value, (*_FUNCTIONS, types.ModuleType))
            if known or not _of_pytorch(module.__name__):
                self._named(vars(module), vars(module).get, name)

    def _class(self, kind: type) -> None:
        """What those classes have of the names that were read that are not PyTorch's."""
        self._add(kind)
        if self._again(kind):
            return
        bases = [c for c in kind.__mro__ if not _of_pytorch(c.__module__) and c in _made(kind)]
        for name in sorted(self._reads.names):
            if any(name in vars(base) for base in bases):
                for base in bases:
                    self._named(base, vars(base).get, name)
        if any("__getattribute__" in vars(base) for base in bases):
            self._where.append("attributes by a __getattribute__ of its own")
            self._refuse(kind)

    def _function(self, function: types.FunctionType) -> bool:
        self._add(function)
        if _of_pytorch(function.__module__):
            return function.__closure__ is None
        if self._again(function):
            return True
        get, plain = functools.partial(getattr, function), True
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            value = get(name)
            plain &= self._value(value) if name != "__code__" else not self._add(value)
            self._put("put", function, get, name, value, True)
        for cell in function.__closure__ or ():
            get = functools.partial(getattr, cell)
            value = get("cell_contents", _MISSING)
            inner = value is _MISSING or self._value(value)
            self._put("put", cell, get, "cell_contents", value, inner)
            plain &= inner
        for name in sorted(self._reads.names & vars(function).keys()):
            self._named(vars(function), vars(function).get, name, keeps=False)
        return plain

    def _in_c(self, function: Any) -> bool:
        of = getattr(function, "__self__", None)
        if of is None or isinstance(of, (types.ModuleType, type)):
            self._add(function)
            return True
        self._add(function.__name__)
        self._value(of)
        return False

    def _container(self, value: Any) -> bool:
        self._add(type(value), len(value))
        if self._again(value):
            return True
        if isinstance(value, dict):
            content = chain.from_iterable(value.items())
        elif isinstance(value, (set, frozenset)):
            content = sorted(value, key=repr)
        else:
            content = value
        plain = all([self._value(v) for v in content])
        if not plain:
            self.places = None  # what it holds may lead back
        elif type(value) is not tuple:
            self._put("put_container", value)
        return plain

    def _object(self, value: Any) -> bool:
        kind = type(value)
        if id(value) in self._numbers:
            self._add(self._numbers[id(value)])
            return False
        if kind.__module__ == "numpy" and not hasattr(value, "resize"):  # a number
            self._add(kind, repr(value))
            return True
        if not all(c in _BASES_IN_C or c.__flags__ & _HEAP_TYPE for c in kind.__mro__):
            if not _of_pytorch(kind.__module__):
                self._refuse(value)
            self._add(kind)
            return True
        self._add(kind)
        if self._again(value):
            return False
        if not _of_pytorch(kind.__module__):
            self._class(kind)
        if isinstance(value, _CONTAINERS):
            self.places = None
            base = next(c for c in _CONTAINERS if isinstance(value, c))
            self._container(dict(value) if issubclass(base, dict) else base(value))
        own = vars(value) if _has_dict(value) else {}
        slots = {s for c in kind.__mro__ for s in _slots(c)}
        names = own.keys() | slots
        if not self._reads.dynamic:
            names &= self._reads.names
        get = None
        for name in sorted(names):
            try:
                get = get or functools.partial(_look, weakref.ref(value))
            except TypeError:
                self.places, get = None, functools.partial(getattr, value)
            self._named(value, get, name, keeps=False)
        return False


def _made(kind: type) -> set[type]:
    return {c for c in kind.__mro__ if c.__flags__ & _HEAP_TYPE}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _has_dict(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict)


def _in_class(kind: type, name: str) -> Any:
    """An attribute as it stands in the class."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _MISSING)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, chain.from_iterable(value.items())))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return list(map(_copied, value)) if isinstance(value, list) else value


# --- records and guards


def describe(root: nn.Module, reads: Reads, opaque: frozenset[str] = frozenset()) -> tuple:
    """All that was read, as it is now, in tokens that are equal where it is the same.

    Raises:
        Unknowable: something was read that cannot be compared.
    """
    return tuple(_Description(root, reads, opaque).tokens)


class Record:
    """All that a forward read, as it was when it was traced. Compared and hashed by that."""

    def __init__(self, root: nn.Module, reads: Reads, opaque: frozenset[str] = frozenset()) -> None:
        """
        Raises:
            Unknowable: something was read that cannot be compared.
        """
        self.reads, self.opaque = reads, opaque
        found = _Description(root, reads, opaque, traced=True)
        self.tokens = tuple(found.tokens)
        self.children, self.plain = tuple(found.children), tuple(found.plain)
        self._hash = hash(self.tokens)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.tokens == other.tokens


class Guard:
    """A block as it was when this was made, and whether that is as it was recorded."""

    def __init__(self, block: nn.Module, record: Record) -> None:
        self.record = record
        try:
            found = _Description(block, record.reads, record.opaque)
        except Unknowable:
            self.same, self.places, self._modules = False, None, None
        else:
            self.same = tuple(found.tokens) == record.tokens
            self.places, self._modules = found.places, found.modules

    def still(self, block: nn.Module) -> bool:
        """Whether nothing was changed since."""
        if self.places is None:
            return False
        try:
            return self._modules.hold(block) and self.places.hold()
        except Exception:  # something is no longer there to look into
            return False


_guards: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()


def guard_of(block: nn.Module, record: Record) -> Guard:
    """The guard of a block as it is now."""
    guard = _guards.get(block)
    if guard is None or guard.record is not record or not guard.still(block):
        guard = _guards[block] = Guard(block, record)
    return guard


def _present(module: nn.Module, path: str) -> nn.Module | None:
    """A child that may have been taken away."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def holds_compiled(block: nn.Module, record: Record) -> bool:
    """As much of ``guard_of(block, record).same`` as a compiler can make guards of."""
    for path, kind, children in record.children:
        module = _present(block, path)
        if module is None or len(module._modules) != children or has_hooks(module):
            return False  # replaced or hooked since
        if type(module) is not kind and not (kind in NORMS and type(module) in NORMS):
            return False
    for path, names, value in record.plain:
        found = _present(block, path)
        for name in names:
            found = getattr(found, name, None)
        if found != value:
            return False
    return True


class Watch:
    """Modules as they were when this was made: their classes, attributes, children, parameters and
    buffers, and which have hooks that run without gradients.

    A hundred blocks are four hundred modules, and to look at them all must cost less than a
    hundred small kernels: these are loops that run in C.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._own = [m.__dict__ for m in self._modules]
        self._attributes = [dict(own) for own in self._own]
        self._classes = list(map(type, self._modules))
        hooks = [own[name] for own in self._own for name in FORWARD_HOOKS]
        self._hooked = [of for of in hooks if of]
        # a module that had no parameters or buffers does not look for any
        children = [own["_modules"] for own in self._own]
        tensors = [own[name] for own in self._own for name in ("_parameters", "_buffers")]
        self._parts = [part for part in children + tensors if part]
        self._empty = [of for of in hooks + children if not of]
        self._names = self._all_names()
        self._found = self._values()

    def _values(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._parts)))

    def _all_names(self) -> list:
        return list(chain.from_iterable(self._parts))

    def holds(self) -> bool:
        try:
            same = self._own == self._attributes  # what is not the same object is compared
        except Exception:  # an attribute is another tensor or array, say
            return False
        return (
            same
            and list(map(type, self._modules)) == self._classes
            and all(self._hooked)
            and not any(self._empty)
            and self._all_names() == self._names
            and all(map(is_, self._values(), self._found))
        )
