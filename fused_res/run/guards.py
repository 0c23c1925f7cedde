"""Guards: whether everything that a fused forward depends on is unchanged.

A graph of ``torch.fx`` has fixed every value that the forward read beside tensors. A ``Record`` has
a description of these values from the time of the trace. In each call a ``Guard`` compares the
places that were read, by identity. Where one differs, everything is described again. If the two
descriptions are equal, the plan is still valid. Else the block runs its own forward.
"""

from __future__ import annotations

import weakref
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import nn

from .description import NORMS, Description, Unknowable, has_hooks
from .reads import Reads

FORWARD_HOOKS = "_forward_hooks", "_forward_pre_hooks"


class Record:
    """A description of everything that a forward read, from the time of the trace.

    Records are compared and hashed by this description.

    Args:
        root: the module.
        reads: the names of everything that its forward read.
        opaque: names of children that ``fuse_`` does not look into.
        called: as in ``Description``.

    Raises:
        Unknowable: a value that was read cannot be compared.
    """

    def __init__(
        self,
        root: nn.Module,
        reads: Reads,
        opaque: frozenset[str] = frozenset(),
        called: frozenset[str] = frozenset(),
    ) -> None:
        self.reads, self.opaque, self.called = reads, opaque, called
        found = Description(root, reads, called, traced=True)
        self.tokens, self._hash = found.tokens, hash(found.tokens)
        self.children, self.plain = tuple(found.children), tuple(found.plain)
        self.leads_back = found.places is None  # maybe to the module

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.tokens == other.tokens


class Guard:
    """The state of a module when the guard was made, and whether it was equal to the record.

    kept: for each plan, the steps that inference keeps while the module is unchanged.
    ran: the size of the last input, where kept steps ran; None: others did.
    input: the facts of the last input that no kept steps ran, ``own_forward.Input``.
    """

    ran: tuple | None = None
    input: tuple | None = None

    def __init__(self, module: nn.Module, record: Record) -> None:
        self.kept: dict[int, Any] = {}
        # weak: a record may lead back to the module and keep it alive
        self.record, self.same, self.places = weakref.ref(record), False, None
        try:
            found = Description(module, record.reads, record.called)
        except Unknowable:
            return
        self.same = found.tokens == record.tokens
        self.places, self._modules = found.places, found.modules

    def passes(self, module: nn.Module) -> bool:
        """Whether the module is unchanged since the guard was made."""
        if self.places is None:
            return False
        try:
            return self._modules.passes(module) and self.places.passes()
        except Exception:  # an owner of an attribute is gone
            return False


_guards: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()


def guard_of(module: nn.Module, record: Record) -> Guard:
    """The guard of a module as it is now."""
    guard = _guards.get(module)
    if guard is None or guard.record() is not record:
        guard = _guards[module] = Guard(module, record)
    elif not guard.passes(module):
        old, guard = guard, Guard(module, record)
        guard.kept = old.kept  # its steps have guards of their own
        guard.ran, guard.input = old.ran, old.input
        _guards[module] = guard
    return guard


def last_guard(module: nn.Module) -> Guard | None:
    """The guard of a module from its last check."""
    return _guards.get(module)


def _present(module: nn.Module, path: str) -> nn.Module | None:
    """A child by dotted name; None if it was removed."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def passes_compiled(module: nn.Module, record: Record) -> bool:
    """The comparisons of ``guard_of(module, record).same`` that a compiler can turn into guards."""
    for path, kind, children in record.children:
        child = _present(module, path)
        if child is None or len(child._modules) != children or has_hooks(child):
            return False  # replaced or hooked since
        if type(child) is not kind and not (kind in NORMS and type(child) in NORMS):
            return False
    for of, names, value in record.plain:
        found = _present(module, of) if isinstance(of, str) else of
        for name in names:
            found = getattr(found, name, None)
        if found != value:
            return False
    return True


class ChildrenGuard:
    """The settings and tensors of children, by path, when the guard was made. It keeps no module
    alive: one may lead back to the root, whose steps have this guard.

    Args:
        root: the module.
        paths: dotted names of convolutions and norms.

    Raises:
        KeyError: a setting may change in place, unseen.
    """

    def __init__(self, root: nn.Module, paths: list[str]) -> None:
        self._children = []
        for path in paths:
            names = tuple(path.split("."))
            own = _own(root, names)
            settings = itemgetter(*(name for name in _SETTINGS if name in own))
            values = settings(own)
            if not all(type(value) in _FIXED for value in values):
                raise KeyError(path)
            self._children.append((names, settings, values, _tensors(own)))

    def passes(self, root: nn.Module) -> bool:
        try:
            for names, settings, values, tensors in self._children:
                own = _own(root, names)
                if settings(own) != values or not all(map(is_, _tensors(own), tensors)):
                    return False
        except KeyError:  # one is no longer there
            return False
        return True


_SETTINGS = "stride", "padding", "dilation", "groups", "padding_mode", "training", "eps"
_FIXED = tuple, int, float, bool, str


def _own(root: nn.Module, names: tuple[str, ...]) -> dict:
    own = root.__dict__
    for name in names:
        own = own["_modules"][name].__dict__
    return own


def _tensors(own: dict) -> list:
    return [*own["_parameters"].values(), *own["_buffers"].values()]


class ModulesGuard:
    """The state of modules when the guard was made: classes, attributes, children, parameters,
    buffers, and which of them have forward hooks; and the children of the root that they are in.

    A hundred blocks have four hundred modules. Checking them must cost less than a hundred small
    kernels, so the loops run in C.
    """

    def __init__(self, root: nn.Module, modules: list[nn.Module]) -> None:
        self._children = list(root._modules.values())
        self._modules = list(dict.fromkeys(modules))
        self._own = [m.__dict__ for m in self._modules]
        self._attributes = [dict(own) for own in self._own]
        self._classes = list(map(type, self._modules))
        hooks = [own[name] for own in self._own for name in FORWARD_HOOKS]
        self._hooked = [of for of in hooks if of]
        # empty dictionaries of parameters and buffers are not checked
        children = [own["_modules"] for own in self._own]
        tensors = [own[name] for own in self._own for name in ("_parameters", "_buffers")]
        self._slots = [slot for slot in children + tensors if slot]
        self._empty = [of for of in hooks + children if not of]
        self._names = self._all_names()
        self._found = self._values()

    def _values(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._slots)))

    def _all_names(self) -> list:
        return list(chain.from_iterable(self._slots))

    def passes(self, root: nn.Module) -> bool:
        try:
            same = self._own == self._attributes  # compares values that are not identical
        except Exception:  # tensors and arrays cannot be compared by ==
            return False
        return (
            same
            and list(root._modules.values()) == self._children
            and list(map(type, self._modules)) == self._classes
            and all(self._hooked)
            and not any(self._empty)
            and self._all_names() == self._names
            and all(map(is_, self._values(), self._found))
        )
