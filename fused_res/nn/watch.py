"""Whether modules are what they were."""

from __future__ import annotations

from itertools import chain
from operator import is_

from torch import nn

FORWARD_HOOKS = "_forward_hooks", "_forward_pre_hooks"
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


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
