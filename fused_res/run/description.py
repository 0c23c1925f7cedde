"""Describes everything that a forward read, as tokens, and lists the places where it was read.

Two forwards that read the same have equal tokens. Numbers and strings are described by type and
text. Lists, dictionaries and objects are described by their contents, and numbered when they first
occur. Functions are described by identity, code, defaults and closure. Classes and modules are
described by the attributes that were read; modules also by class and children.
"""

from __future__ import annotations

import enum
import functools
import operator
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .places import MISSING, Modules, Places, is_there, look, walk
from .reads import Reads, ask, globals_of, imported_by, is_of_a_library, is_trusted

MOST_TOKENS = 10_000
# Fused kernels compute the same for both, so one may be converted to the other
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_OVERRIDES = "forward", "_conv_forward", "_call_impl"
PLAIN_VALUES = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...),
           type(NotImplemented), torch.Size, torch.dtype, torch.device, torch.layout,
           torch.memory_format)  # fmt: skip
_CONTAINERS = list, tuple, dict, set, frozenset, deque, OrderedDict, defaultdict
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType,
              types.WrapperDescriptorType, types.GetSetDescriptorType,
              types.MemberDescriptorType)  # fmt: skip
_BASES_IN_C = {object, types.SimpleNamespace, *PLAIN_VALUES, *_CONTAINERS}
_HIDE_STATE = (Tensor, torch.Generator, torch.UntypedStorage, operator.attrgetter,
               operator.methodcaller, type(functools.lru_cache(len)))  # fmt: skip
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made


class Unknowable(Exception):
    """A forward reads a value that cannot be compared; the message names it."""


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``fuse_`` and ``optimize_for_inference`` changed it."""
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


class Description:
    """Visits every value that ``reads`` names, starting from a module.

    Args:
        called: paths of leaves that the graph calls in their current state. The classes and hooks
            of other leaves are described too.
        traced: whether the answers to questions are those from the trace; else they are asked for
            now.

    Attributes:
        tokens: equal if every value that was read is the same.
        modules, places: compared in each call. ``places`` is None if a comparison would keep alive
            a value that may lead back to the module.
        children: path, class and number of children of each child module that is described.
        plain: (path or owner, names of attributes, value) of values that a compiler can compare.

    Raises:
        Unknowable: a value that was read cannot be compared.
    """

    def __init__(
        self,
        root: nn.Module,
        reads: Reads,
        called: frozenset[str] = frozenset(),
        traced: bool = False,
    ) -> None:
        self.places: Places | None = Places()
        self.children: list[tuple[str, type, int]] = []
        self.plain: list[tuple[Any, tuple[str, ...], Any]] = []
        self._tokens: list[Any] = []
        self._reads = reads
        self._names = reads.names.union(*reads.attributes.values())
        self._plain: dict[int, bool] = {}  # id of a value -> whether it may be kept alive
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # the values seen: no address is used twice
        self._where: list[str] = []
        found, parents = walk(root, reads.leaves)
        self.modules = Modules(found, parents)
        self._looked_at: list[int] = []
        self._numbers: dict[int, int] = {}
        for i, (_, module) in enumerate(found):
            self._numbers.setdefault(id(module), i)
        for i, (path, module) in enumerate(found):
            self._add(path, None if module is None else self._numbers[id(module)])
            if module is not None and self._numbers[id(module)] == i:
                self._module(i, path, module, path in called)
        self.modules.look_at(self._looked_at)
        for name in ("batch_norm", "conv2d", "relu"):  # kernels replace these
            self._named(vars(F), vars(F).get, name)
        for code, known in reads.codes:
            self._add(code)
            module = sys.modules.get(known.get("__name__", ""))
            for name in sorted(globals_of(code)):
                self._named(known, known.get, name)
                if vars(module) is known if module else False:
                    self._compare_compiled(module, name, known.get(name))
            for module in imported_by(code, known):
                self._value(module)
        for question, answer in reads.questions:
            answer = answer if traced else ask(question)
            self._add(question, answer)
            self._put("put_question", question, answer)
        self.tokens = tuple(self._tokens)

    def _put(self, kind: str, *args: Any) -> None:
        if self.places is not None:
            try:
                getattr(self.places, kind)(*args)
            except TypeError:  # a value without weak references
                self.places = None

    def _add(self, *tokens: Any) -> None:
        self._tokens += tokens
        if len(self._tokens) > MOST_TOKENS:
            where = ".".join(self._where) or "more values"
            raise Unknowable(f"its forward reads {where}: too many to compare")

    def _refuse(self, value: Any) -> None:
        kind, where = type(value), ".".join(self._where) or "a value"
        raise Unknowable(
            f"its forward reads {where}, a {kind.__module__}.{kind.__qualname__}, whose state a "
            f"trace does not see"
        )

    def _again(self, value: Any) -> bool:
        """Whether the value was described before; adds its number."""
        number = self._seen.setdefault(id(value), len(self._seen))
        self._add(number)
        if number < len(self._alive):
            return True
        self._alive.append(value)
        return False

    def _named(self, owner: Any, get: Callable, name: str, keeps: bool = True) -> None:
        """Describes ``get(name, default)`` and adds it to the places."""
        value = get(name, MISSING)
        plain = self._described(name, value)
        self._put("put", owner, get, name, value, keeps or plain)

    def _described(self, name: str, value: Any) -> bool:
        """Describes a value under a name; returns whether it may be kept alive."""
        self._add(name)
        self._where.append(name)
        plain = value is MISSING or self._value(value)
        self._where.pop()
        return plain

    # --- modules

    def _module(self, number: int, path: str, module: nn.Module, called: bool) -> None:
        kind = kind_of(module)
        kind = NORMS[0] if kind in NORMS else kind
        names = set(self._reads.attributes.get(path, ()))
        if not called:
            if "inplace" in module.__dict__:
                names.add("inplace")
            self._add(kind)
            if path:
                self.children.append((path, kind, len(module._modules)))
                self._unchanged(number, module)
            if not _of_pytorch(kind.__module__) and path not in self._reads.leaves:
                self._class(kind)
            elif _of_pytorch(kind.__module__) and path:  # kernels replace its forward
                self._named(kind, functools.partial(getattr, kind), "forward")
        for name in sorted(names):
            self._where.append(name)
            self._attribute(number, path, module, name)
            self._where.pop()

    def _unchanged(self, number: int, module: nn.Module) -> None:
        """Describes whether the module has hooks or a forward of its own."""
        overrides = [name for name in _OVERRIDES if name in module.__dict__]
        hooked = has_hooks(module)
        self._add(hooked, *overrides)
        if hooked or overrides:
            self.places = None
            return
        self._looked_at.append(number)

    def _attribute(self, number: int, path: str, module: nn.Module, name: str) -> None:
        own, in_class = module.__dict__, _in_class(kind_of(module), name)
        if name in own and not hasattr(type(in_class), "__set__"):
            self._add(name)
            value = own[name]
            if self._value(value):
                self.modules.put(number, name, value)
            else:
                get = functools.partial(look, weakref.ref(module))
                self._put("put", module, get, name, value, False)
            self._compare_compiled(path, name, value)
        elif in_class is not MISSING:  # described with its class
            self.modules.put_absent(number, name)
        else:
            self.modules.put_absent(number, name)
            if name in own["_modules"]:  # all children are compared
                return
            slots = [slot for slot in ("_parameters", "_buffers") if name in own[slot]]
            if not slots:  # its class may get this attribute
                for base in _made(kind_of(module)):
                    self._named(base, vars(base).get, name)
            for slot in slots or ("_parameters", "_buffers"):
                found = is_there(own[slot], name)
                self._add(name, slot, found is None, found is MISSING)
                self.modules.put_inside(number, slot, name, found)

    def _compare_compiled(self, path: Any, name: str, value: Any) -> None:
        if isinstance(value, (*PLAIN_VALUES, *_FUNCTIONS)):
            self.plain.append((path, (name,), value))
        elif isinstance(value, (list, tuple, dict)):
            if _is_plain(value):
                self.plain.append((path, (name,), _copied(value)))
        elif _has_dict(value) and not isinstance(value, (type, types.ModuleType)):
            for inner in sorted(self._reads.names & vars(value).keys()):
                if isinstance(vars(value)[inner], PLAIN_VALUES):
                    self.plain.append((path, (name, inner), vars(value)[inner]))

    # --- values

    def _value(self, value: Any) -> bool:
        """Describes a value; returns whether it may be kept alive: it leads back to no module."""
        kind = type(value)
        if kind in PLAIN_VALUES:
            self._add(kind, repr(value))
        elif isinstance(value, enum.Enum):
            self._add(kind, value.name)
            for name in sorted(self._names & vars(value).keys()):
                self._named(vars(value), vars(value).get, name)
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
            names = ("fget", "fset", "__func__", "func")
            return self._all(kind, [getattr(value, name, None) for name in names])
        elif hasattr(kind, "__get__") and not kind.__flags__ & _HEAP_TYPE:
            self._add(kind)  # a descriptor in C: a field of a named tuple
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
            # forwards ask for PyTorch's switches by functions
            known = isinstance(value, (*_FUNCTIONS, types.ModuleType))
            if known or not _of_pytorch(module.__name__):
                self._named(vars(module), vars(module).get, name)

    def _class(self, kind: type) -> None:
        """Describes the attributes that were read of a class and its bases, PyTorch's left out."""
        self._add(kind)
        if self._again(kind):
            return
        self._put("put", kind, functools.partial(getattr, kind), "__mro__", kind.__mro__, True)
        bases = [c for c in kind.__mro__ if not is_of_a_library(c.__module__) and c in _made(kind)]
        for name in sorted(self._names):
            if any(name in vars(base) for base in bases):
                for base in bases:
                    self._named(base, vars(base).get, name)
                if isinstance(getattr(kind, name), (*PLAIN_VALUES, types.FunctionType)):
                    self.plain.append((kind, (name,), getattr(kind, name)))
        if not _of_pytorch(type(kind).__module__) and type(kind) is not type:
            self._class(type(kind))
        if any("__getattribute__" in vars(base) for base in bases):
            self._where.append("attributes by a __getattribute__ of its own")
            self._refuse(kind)

    def _function(self, function: types.FunctionType) -> bool:
        self._add(function)
        if _of_pytorch(function.__module__):
            return function.__closure__ is None
        if self._again(function):
            return self._plain.get(id(function), False)
        get, plain = functools.partial(getattr, function), True
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            value = get(name)
            plain &= self._value(value) if name != "__code__" else not self._add(value)
            self._put("put", function, get, name, value, True)
        for cell in function.__closure__ or ():
            get = functools.partial(getattr, cell)
            value = get("cell_contents", MISSING)
            inner = value is MISSING or self._value(value)
            self._put("put", cell, get, "cell_contents", value, inner)
            plain &= inner
        for name in sorted(self._reads.names & vars(function).keys()):
            self._named(vars(function), vars(function).get, name, keeps=False)
        self._plain[id(function)] = plain
        if not plain:  # its closure may lead back to the module
            self.places = None
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
            return self._plain.get(id(value), False)
        if isinstance(value, dict):
            content = chain.from_iterable(value.items())
        elif isinstance(value, (set, frozenset)):
            content = sorted(value, key=repr)
        else:
            content = value
        plain = all([self._value(v) for v in content])
        if not plain:
            self.places = None  # its contents may lead back to the module
        elif type(value) is not tuple:
            self._put("put_container", value)
        self._plain[id(value)] = plain
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
        try:
            get = functools.partial(look, weakref.ref(value))
            self._put("put", value, get, "__class__", kind, True)
        except TypeError:
            self.places = None
        own = vars(value) if _has_dict(value) else {}
        slots = {s for c in kind.__mro__ for s in _slots(c)}
        names = set(self._reads.names)
        if self._reads.dynamic or _in_class(kind, "__getattr__") is not MISSING:
            names |= own.keys() | slots
            self.places = None  # a new attribute counts too
        names &= {*own, *slots, *chain.from_iterable(map(vars, _made(kind)))}
        for name in sorted(names):
            found = (functools.partial(getattr, value) if name in slots else own.get)(name, MISSING)
            plain = self._described(name, found)
            try:
                get = functools.partial(look if name in slots else _look_inside, weakref.ref(value))
                self._put("put", value, get, name, found, plain)
            except TypeError:
                self.places = None
        return False


def _look_inside(of: weakref.ref, name: str, default: Any) -> Any:
    """An attribute of the object itself, not of its class."""
    return vars(of()).get(name, default)


def _made(kind: type) -> set[type]:
    return {c for c in kind.__mro__ if c.__flags__ & _HEAP_TYPE}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _has_dict(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict)


def _in_class(kind: type, name: str) -> Any:
    """An attribute of a class or its bases, without calling descriptors."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), MISSING)


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
