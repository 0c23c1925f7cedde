"""Whether modules are what they were."""

from __future__ import annotations

from itertools import chain
from operator import is_

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = "_modules", "_parameters", "_buffers"


class Watch:
    """Modules as they were when this was made: their classes, attributes, children, parameters and
    buffers, and which have hooks.

    A hundred blocks are three hundred modules, and to look at them all must cost less than a
    hundred small kernels: these are loops that run in C.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._own = [m.__dict__ for m in self._modules]
        self._attributes = [dict(own) for own in self._own]
        self._classes = list(map(type, self._modules))
        self._hooks = [own[name] for own in self._own for name in HOOKS]
        self._hooked = list(map(bool, self._hooks))
        self._parts = [own[name] for own in self._own for name in _PARTS]
        self._names = list(map(list, self._parts))
        self._found = self._values()

    def _values(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._parts)))

    def holds(self) -> bool:
        try:
            same = self._own == self._attributes  # what is not the same object is compared
        except Exception:  # an attribute is another tensor or array, say
            return False
        return (
            same
            and list(map(type, self._modules)) == self._classes
            and list(map(bool, self._hooks)) == self._hooked
            and list(map(list, self._parts)) == self._names
            and all(map(is_, self._values(), self._found))
        )
