"""A module's forward as a ``torch.fx`` graph, and questions about its nodes."""

from __future__ import annotations

import contextlib
import copy
import operator
import pickle
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from ..run.description import Description, Unknowable
from ..run.reads import Reads, Recorder, recording
from .modules import child, is_norm, is_norm_act

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Python's x += y and the like; torch.fx itself records x + y
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
            "ilshift", "irshift", "imatmul")  # fmt: skip
_IN_PLACE = {getattr(operator, name) for name in IN_PLACE} | {operator.setitem}
_CATS = {torch.cat, torch.concat, torch.concatenate}

# modules and functions from elsewhere may write into their input
_KNOWN_MODULES = ("torch.nn.modules.", "timm.layers.", "torchvision.ops.")
_KNOWN_FUNCTIONS = ("torch", "_operator", "builtins", "math")


class Unfusable(Exception):
    """The module is a residual block that cannot be fused; the message says why."""


class Untraceable(Unfusable):
    """A trace does not show everything that the module does."""


def in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


_OF_AUTOGRAD = frozenset({"grad", "grad_fn", "requires_grad", "is_leaf", "_version", "_base"})


class _Asked:
    """Reports questions that a proxy answers otherwise than a tensor."""

    def _tell(self, what: str) -> None:
        self.tracer.recorder.refuse_if_asked(sys._getframe(2), what)

    def __hash__(self):
        self._tell("which tensor, dtype, device or shape it is")
        return object.__hash__(self)

    def __repr__(self):
        self._tell("how a tensor is written")
        return super().__repr__()

    def __format__(self, spec):
        self._tell("how a tensor is written")
        return super().__format__(spec)


class _Attribute(_Asked, fx.proxy.Attribute):
    pass


class _Proxy(_Asked, fx.Proxy):
    """A proxy that records operations in place."""

    def __getattr__(self, name):
        if not hasattr(torch.Tensor, name):
            self._tell(f"a tensor for {name}, which is not one of its attributes")
        elif name in _OF_AUTOGRAD:
            self._tell(f"a tensor for {name}")
        return _Attribute(self, name)


def _in_place(function):
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Records each convolution, norm, module without children and ``opaque`` module as one call."""

    proxy_buffer_attributes = True  # buffers are read anew in every call
    grad = True  # the mode in which the forward is traced

    def __init__(self, opaque: Collection[str] = ()) -> None:
        super().__init__()
        self.opaque = frozenset(opaque)
        self.autocast = torch.is_autocast_enabled("cpu")
        self.modes_changed = False
        self.made = 0  # number of nodes
        self.leaves: set[str] = set()  # paths of the modules that the graph calls
        self.recorder: Recorder | None = None  # the other reads of the forward
        self._thread = threading.get_ident()

    def is_elsewhere(self) -> bool:
        """Whether another thread runs a model: torch.fx replaces methods of all modules while it
        traces."""
        return threading.get_ident() != self._thread

    def call_module(self, m, forward, args, kwargs):
        if self.is_elsewhere():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            self.leaves.add(path)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if self.is_elsewhere():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args, **kwargs) -> fx.Node:
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.modes_changed |= modes != (self.grad, self.autocast)
        self.made += 1
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (nn.Conv2d, _NormBase)) or is_norm(module):
            return True
        if parametrize.is_parametrized(module) or qualified_name in self.opaque:
            return True
        return not any(True for _ in module.children())


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _is_kept(name: str) -> bool:
    """Whether PyTorch owns the attribute. torch.fx puts constants on the module that it traces."""
    return name in _OF_EVERY_MODULE or name.startswith("_tensor_constant")


def _value(of: object) -> object:
    """A value that changes if ``of`` is written to."""
    if isinstance(of, dict):
        return [(k, _value(v)) for k, v in of.items()]
    if isinstance(of, (list, tuple)):
        return [_value(v) for v in of]
    if isinstance(of, set):
        return set(map(id, of))
    return of if isinstance(of, (int, float, complex, str, bytes)) else id(of)


def _state(block: nn.Module) -> list:
    return [
        (name, {k: _value(v) for k, v in m.__dict__.items() if not _is_kept(k)}, {
            k: (id(t), t._version) for k, t in (*m._buffers.items(), *m._parameters.items())
            if t is not None
        })
        for name, m in block.named_modules()
    ]  # fmt: skip


class _Generators:
    """The states of the global generators of random numbers."""

    def __init__(self) -> None:
        self._numpy = sys.modules.get("numpy.random")
        self._states = self._now()

    def _now(self) -> tuple:
        numpy = self._numpy and self._numpy.get_state()
        return torch.get_rng_state(), random.getstate(), numpy

    def put_back(self) -> bool:
        """Restores the states; returns whether one had changed."""
        before, now = self._states, self._now()
        same = torch.equal(before[0], now[0]) and before[1] == now[1]
        same = same and pickle.dumps(before[2]) == pickle.dumps(now[2])
        if not same:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            if self._numpy:
                self._numpy.set_state(before[2])
        return not same


@contextlib.contextmanager
def _seen(tracer: Tracer) -> Iterator[None]:
    """Tells the tracer of mode changes, which a graph does not show."""
    kinds = torch.autocast, torch.enable_grad, torch.autograd.graph.saved_tensors_hooks
    originals = [kind.__enter__ for kind in kinds]

    def telling(original: Callable) -> Callable:
        def enter(self):
            tracer.modes_changed |= not tracer.is_elsewhere()
            return original(self)

        return enter

    for kind, original in zip(kinds, originals, strict=True):
        kind.__enter__ = telling(original)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__enter__ = original


def does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Sequential and not len(module))


_QUIET = {("torch.nn.modules.dropout", name) for name in nn.modules.dropout.__all__} | {
    ("timm.layers.drop", "DropPath"),
    ("timm.layers.drop", "DropBlock2d"),
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
    ("torchvision.ops.drop_block", "DropBlock2d"),
}


def _is_quiet(module: nn.Module | None) -> bool:
    """Whether the module returns its input in eval mode."""
    return (type(module).__module__, type(module).__name__) in _QUIET


_one_at_a_time = threading.RLock()  # a trace changes global functions


def _copied(block: nn.Module, opaque: Collection[str]) -> nn.Module:
    """A deep copy that shares the tensors of ``opaque`` children, which a trace does not run, and
    attributes that cannot be copied (a process group, a lock)."""
    inner = [m for path, m in block.named_modules() if path in opaque]
    shared = {id(t): t for m in inner for t in (*m.parameters(), *m.buffers())}
    try:
        return copy.deepcopy(block, dict(shared))
    except Exception:
        memo = shared
        for value in (v for m in block.modules() for v in m.__dict__.values()):
            try:
                copy.deepcopy(value)
            except Exception:
                memo[id(value)] = value
        for own in (m.__dict__ for m in block.modules()):  # PyTorch's own dictionaries are copied
            for name in _OF_EVERY_MODULE:
                memo.pop(id(own.get(name)), None)
        return copy.deepcopy(block, memo)


class Trace(NamedTuple):
    """A forward's graph, its other reads, and why these do not determine its result, if so."""

    graph: fx.Graph
    reads: Reads
    refused: str | None = None

    def seen(self) -> Trace:
        """
        Raises:
            Unfusable: graph and reads do not determine the forward's result.
        """
        if self.refused is not None:
            raise Unfusable(self.refused)
        return self


def trace(
    block: nn.Module,
    training: bool,
    tracer: Tracer,
    inputs: int | None = None,
    known: Reads | None = None,
) -> Trace:
    """The graph of the block's forward in one mode. It is traced on a copy, as it may write state.

    Args:
        inputs: the number of inputs, if the forward takes ``*inputs``.
        known: earlier reads, which the forward must not change.

    Raises:
        Untraceable: the forward does something that a trace does not show.
    """
    with _one_at_a_time:
        return _trace(block, training, tracer, inputs, known or Reads())


def _trace(
    original: nn.Module, training: bool, tracer: Tracer, inputs: int | None, known: Reads
) -> Trace:
    block = _copied(original, tracer.opaque)
    for m in block.modules():  # attributes, not train(): models override that (to freeze a norm)
        m.training = training
    before, read = _state(block), _described(block, known)
    recorder = tracer.recorder = Recorder(block, lambda: tracer.made, original)
    with torch.set_grad_enabled(tracer.grad), _seen(tracer):
        generators = _Generators()
        try:
            with recording(recorder):
                graph = tracer.trace(block, inputs and (fx.PH,) * inputs)
        finally:  # draws of other threads stay, unless the forward may draw too
            drawn = recorder.may_draw and generators.put_back()
    if drawn:
        raise Untraceable("its forward draws random numbers")
    if tracer.modes_changed:
        raise Untraceable("its forward changes the grad or autocast mode, or uses checkpoints")
    nodes = Nodes(block, graph)
    into = {n for node in graph.nodes if nodes.writes(node) for n in node.all_input_nodes[:1]}
    if _state(block) != before or any(n.op == "get_attr" for n in into):
        raise Untraceable("its forward writes to the module")
    refused = recorder.refused
    if refused is None and _described(block, known) != read:
        refused = "its forward changes what it reads"
    for node in list(graph.nodes):
        if node.op == "call_module" and does_nothing(child(block, node.target)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    recorder.leaves |= tracer.leaves
    return Trace(graph, recorder.reads(), refused)


def _described(block: nn.Module, reads: Reads) -> tuple:
    try:
        return Description(block, reads).tokens
    except Unknowable as reason:  # Record raises the same error
        return (str(reason),)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses this one; None where there is none or more than one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


class Nodes:
    """The traced nodes of a block, and questions about them."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, graph

    def module(self, node: fx.Node) -> nn.Module | None:
        return child(self.block, node.target) if node.op == "call_module" else None

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        return node.target in _RELUS and len(node.all_input_nodes) == 1

    def operands_of_add(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
            return None
        operands = (*node.args, *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs))
        extra = set(node.kwargs) - {"input", "other"}
        if extra or len(operands) != 2 or not all(isinstance(o, fx.Node) for o in operands):
            return None
        return operands

    def operands_of_cat(self, node: fx.Node) -> list[fx.Node] | None:
        if node.op != "call_function" or node.target not in _CATS:
            return None
        values = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        if values.get("dim", values.get("axis", 0)) not in (1, -3):
            return None
        tensors = values.get("tensors")
        return list(tensors) if isinstance(tensors, (list, tuple)) else None

    def look_residual(self) -> bool:
        """Whether there is a convolution, and an add or concatenation of tensors."""
        convolves = any(isinstance(self.module(n), nn.Conv2d) for n in self.graph.nodes)
        joins = any(
            n.op in ("call_function", "call_method")
            and n.target in _ADDS | _CATS
            and len(n.all_input_nodes) > 1
            for n in self.graph.nodes
        )
        return convolves and joins

    def describe(self, node: fx.Node) -> str:
        """A node in words: the innermost child that it belongs to."""
        if node.op == "call_module":
            paths = [node.target]
        else:
            paths = [path for path in node.meta.get("nn_module_stack") or () if path]
        if paths:
            return f"{paths[-1]} ({type(child(self.block, paths[-1])).__name__})"
        return f"{getattr(node.target, '__name__', str(node.target))}()"

    def times_called(self, node: fx.Node) -> int:
        """How often the module of a node is called."""
        return sum(n.op == "call_module" and n.target == node.target for n in self.graph.nodes)

    def _is_known(self, node: fx.Node) -> bool:
        """Whether PyTorch or a known library has the code that a node calls: its name and
        arguments say whether it writes."""
        if node.op == "call_module":
            modules = self.module(node).modules()
            return all(type(m).__module__.startswith(_KNOWN_MODULES) for m in modules)
        module = getattr(node.target, "__module__", None) or ""
        return node.op == "call_method" or module.startswith(_KNOWN_FUNCTIONS)

    def writes(self, node: fx.Node) -> bool:
        """Whether a node may write into an existing tensor."""
        if node.op == "call_module":
            in_place = any(getattr(m, "inplace", False) for m in self.module(node).modules())
            return in_place or not self._is_known(node)
        if node.op == "call_method":
            bare = node.target.strip("_")
            dunder = node.target.startswith("__")
            return bare in (*IN_PLACE, "setitem") if dunder else node.target.endswith("_")
        if node.op != "call_function":
            return False
        if not self._is_known(node):
            return True
        relu_in_place = self.is_relu(node) and node.args[1:] == (True,)
        named = getattr(node.target, "__name__", "").endswith("_") or relu_in_place
        given = any(node.kwargs.get(name) not in (None, False) for name in ("inplace", "out"))
        return named or given or node.target in _IN_PLACE

    def writes_first(self, node: fx.Node) -> bool:
        """Whether a node that ``writes`` writes into its first argument alone."""
        return "out" not in node.kwargs and self._is_known(node)

    def without_what_is_quiet(self) -> tuple[str, ...]:
        """Removes the children that return their input in eval mode; returns their names."""
        quiet = [n for n in self.graph.nodes if _is_quiet(self.module(n))]
        for node in quiet:
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)
        return tuple(dict.fromkeys(node.target for node in quiet))

    def split_norms(self) -> None:
        """Records ``drop`` and ``act`` of timm's BatchNorms as separate calls."""
        for node in list(self.graph.nodes):
            module = self.module(node)
            if not is_norm_act(module) or self.times_called(node) > 1:
                continue
            last, users = node, list(node.users)
            for name in ("drop", "act"):
                if not does_nothing(getattr(module, name)):
                    with self.graph.inserting_after(last):
                        last = self.graph.call_module(f"{node.target}.{name}", (last,))
            for user in users:
                user.replace_input_with(node, last)
