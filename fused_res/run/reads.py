"""Records everything that a forward reads while it is traced.

A graph of ``torch.fx`` has the operations on tensors. Everything else that the forward reads is
fixed in it: attributes, globals, helper functions, modes. ``recording`` notes these while the
forward runs on proxies, so that ``guards`` can compare them in each call:

- every attribute that is looked up on a module, by a hook into ``nn.Module``;
- the code of every Python function that runs, and the names of the globals and attributes in its
  instructions (more than it did load);
- questions that PyTorch answers by its state (``torch.is_grad_enabled()``), with the answers.

Two things cannot be compared and are refused. The result of a C function may depend on more than
its arguments (``time.time``, a generator's ``random``, ``print``). A forward may catch an exception
that a proxy raises and a tensor does not.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import gc
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from types import BuiltinFunctionType, CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import fx, nn

# Python code that is not recorded: it adds to the graph, or depends on its arguments alone
_TRUSTED = (
    "torch._C", "torch._VF", "torch._jit_internal", "torch._library", "torch._ops",
    "torch._tensor", "torch.amp", "torch.autograd", "torch.functional", "torch.fx", "torch.jit",
    "torch.library", "torch.nn", "torch.overrides", "torch.utils",
    "fused_res", "abc", "contextlib", "enum", "importlib", "inspect", "numbers", "operator",
    "types", "typing",
)  # fmt: skip
_PREFIXES = (*(f"{name}." for name in _TRUSTED), "namedtuple_")
_KNOWN: dict[str, bool] = {}
# Recorded where a forward calls it, but not where the trusted code above calls it
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"torch"}


def is_of_a_library(module: str | None) -> bool:
    """Whether a Python module of this name belongs to PyTorch or Python."""
    return (module or "").partition(".")[0] in _LIBRARIES


def is_trusted(module: str | None) -> bool:
    """Whether the functions of a Python module of this name are taken to depend on their arguments
    alone."""
    name = module or ""
    if name not in _KNOWN:
        _KNOWN[name] = f"{name}.".startswith(_PREFIXES)
    return _KNOWN[name]


# C functions that depend on their arguments alone, or on values that are compared elsewhere
_PURE_BUILTINS = frozenset({
    "abs", "all", "any", "bin", "callable", "chr", "divmod", "format", "getattr", "hasattr",
    "hex", "isinstance", "issubclass", "iter", "len", "max", "min", "next", "oct",
    "ord", "pow", "repr", "round", "sorted", "sum", "vars", "__build_class__", "__import__",
})  # fmt: skip
_PURE_MODULES = frozenset({"math", "_operator", "_functools", "_collections", "_abc", "itertools"})
_PURE_TYPES = (
    str, bytes, int, float, complex, bool, list, tuple, dict, set, frozenset, range, slice,
    torch.Size, torch.dtype, torch.device,
)  # fmt: skip
_PURE_OF_TORCH = frozenset({
    "_log_api_usage_once", "can_cast", "promote_types", "has_torch_function",
    "has_torch_function_unary", "has_torch_function_variadic", "_has_torch_function",
    "_has_torch_function_unary", "_has_torch_function_variadic", "_get_tracing_state",
    "arange", "eye", "full", "linspace", "ones", "tensor", "zeros",
})  # fmt: skip

# Questions about PyTorch's state -> the arguments that they are asked with
QUESTIONS: dict[Callable[..., Any], tuple[tuple, ...]] = {
    torch.is_grad_enabled: ((),),
    torch.is_inference_mode_enabled: ((),),
    torch.is_autocast_enabled: ((), ("cpu",), ("cuda",)),
    torch.get_default_dtype: ((),),
    torch.get_num_threads: ((),),
    torch.get_autocast_dtype: (("cpu",), ("cuda",)),
    torch.is_autocast_cache_enabled: ((),),
    torch.jit.is_scripting: ((),),
    torch.jit.is_tracing: ((),),
    torch.compiler.is_compiling: ((),),
    torch.compiler.is_dynamo_compiling: ((),),
    torch.compiler.is_exporting: ((),),
    torch._C._get_deterministic_algorithms: ((),),
    torch._C._get_cudnn_enabled: ((),),
    torch._C._get_cudnn_benchmark: ((),),
    torch._C._get_mkldnn_enabled: ((),),
}
_QUESTION_CODES = {f.__code__: f for f in QUESTIONS if hasattr(f, "__code__")}
# Methods that return real tensors: a trace takes their sizes and dtypes for constants
_HANDS_OUT = {
    getattr(nn.Module, name).__code__: name
    for name in ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict")
}

_IMPORT_BY_NAME = importlib.import_module.__code__
_OF_TRACES = {
    inspect.unwrap(f).__code__
    for name, f in vars(fx._symbolic_trace).items()
    if name.startswith("is_fx_")
}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_IMPORTS = importlib._bootstrap._find_and_load.__code__.co_filename
_NOT_READ = "__", "_serving", "parametrizations"  # by Python, a served model, this package
_DYNAMIC = frozenset({"getattr", "hasattr", "vars", "attrgetter", "__dict__", "__getattribute__"})
# Properties of a tensor. A proxy's is never the value itself, so a trace answers `is` wrongly.
_COMPARED = frozenset(
    {"dtype", "device", "layout", "shape", "type", "is_floating_point", "is_cuda"}
)
# Names of functions that draw random numbers
_DRAWS = frozenset({
    "bernoulli", "choice", "choices", "dropout", "gauss", "getrandbits", "multinomial", "normal",
    "permutation", "rand", "randint", "randn", "random", "randperm", "sample", "shuffle", "uniform",
})  # fmt: skip


def ask(question: Callable[..., Any]) -> tuple:
    return tuple(question(*args) for args in QUESTIONS[question])


@dataclass(frozen=True)
class Reads:
    """Everything that a forward read.

    attributes: names of attributes of modules, by the module's path from the traced one.
    leaves: paths of the modules that the graph calls; these read anew in every call.
    codes: code of the Python functions that ran, with their globals.
    names: names of the attributes that these functions may load from any object.
    dynamic: whether they may load other attributes, by names that are made at run time.
    questions: questions about PyTorch's state, with the answers.
    """

    attributes: dict[str, frozenset[str]] = field(default_factory=dict)
    leaves: frozenset[str] = frozenset()
    codes: tuple[tuple[CodeType, dict], ...] = ()
    names: frozenset[str] = frozenset()
    dynamic: bool = False
    questions: tuple[tuple[Callable[..., Any], tuple], ...] = ()

    def __or__(self, other: Reads) -> Reads:
        paths = (*self.attributes, *other.attributes)
        none = frozenset()
        return Reads(
            {p: self.attributes.get(p, none) | other.attributes.get(p, none) for p in paths},
            self.leaves | other.leaves,
            tuple({id(code): (code, of) for code, of in (*self.codes, *other.codes)}.values()),
            self.names | other.names,
            self.dynamic or other.dynamic,
            tuple(dict(chain(self.questions, other.questions)).items()),
        )

    def covers(self, other: Reads) -> bool:
        """Whether everything in ``other`` is in this too."""
        return (
            all(of <= self.attributes.get(p, frozenset()) for p, of in other.attributes.items())
            and {id(code) for code, _ in other.codes} <= {id(code) for code, _ in self.codes}
            and other.names <= self.names
            and other.leaves <= self.leaves
            and set(other.questions) <= set(self.questions)
            and self.dynamic >= other.dynamic
        )


def _named(code: CodeType, *instructions: str) -> set:
    return {i.argval for i in dis.get_instructions(code) if i.opname in instructions}


def _constants(values: tuple) -> Iterator[str]:
    """The strings among a function's constants that may name an attribute."""
    for value in values:
        if isinstance(value, tuple):
            yield from _constants(value)
        elif isinstance(value, str) and value.isidentifier():
            yield value


def imported_by(code: CodeType, known: dict) -> Iterator[ModuleType]:
    """The modules that a function's instructions import."""
    package = known.get("__package__") or ""
    for name in sorted(_named(code, "IMPORT_NAME")):
        for path in (name, f"{package}.{name}" if name else package):
            names = path.split(".")
            for i in range(1, len(names) + 1):
                module = sys.modules.get(".".join(names[:i]))
                if module is not None:
                    yield module


def why_not(code: CodeType) -> str | None:
    """Why a function may treat a proxy otherwise than a tensor; None: it does not."""
    before = None
    for i in dis.get_instructions(code):
        none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        if i.opname == "IS_OP" and not none and not _COMPARED.isdisjoint(code.co_names):
            return "its forward compares types, dtypes or devices by `is`"
        if i.opname == "MATCH_CLASS":
            return "its forward matches classes"
        before = i
    kinds = "type" in globals_of(code) or "__class__" in attributes_of(code)
    compares = _named(code, "BINARY_SUBSCR", "COMPARE_OP", "CONTAINS_OP")
    if kinds and compares and code.co_name == "forward":
        return "its forward compares types"  # fuse_ changes a block's type
    return None


def globals_of(code: CodeType) -> set[str]:
    """The names of the globals that a function's instructions may load or store."""
    return _named(code, "LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")


def attributes_of(code: CodeType) -> set[str]:
    """The names of the attributes that a function's instructions may load or store."""
    loads = "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "IMPORT_FROM"
    return _named(code, *loads) | set(_constants(code.co_consts))


def _in_words(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", "?")
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module and module != "builtins" else name


class Recorder:
    """Collects the reads of a forward that runs in this thread.

    refused: why the reads do not determine the forward's result; None: they do.
    leaves: paths of the modules that the graph calls; the tracer adds them.
    """

    def __init__(self, root: nn.Module, made: Callable[[], int], original: nn.Module) -> None:
        self.refused: str | None = None
        self.leaves: set[str] = set()
        self._made = made
        self._thread = threading.get_ident()
        self._paths: dict[int, str] = {}
        for module in (root, original):  # functions that were copied may lead to either
            for path, part in module.named_modules():
                self._paths.setdefault(id(part), path)
        self._attributes: dict[str, set[str]] = {path: set() for path in self._paths.values()}
        self._codes: dict[int, tuple[CodeType, dict]] = {}
        self._questions: dict[Callable[..., Any], tuple] = {}
        self._importing = 0  # modules
        # C functions that have not returned, with the number of nodes when they were called
        self._open: list[tuple[FrameType, Any, int]] = []

    def reads(self) -> Reads:
        names, dynamic = set(), False
        for code, _ in self._codes.values():
            names |= {code.co_name, *attributes_of(code)}
            dynamic |= not _DYNAMIC.isdisjoint(code.co_names)
        attributes = {path: frozenset(of) for path, of in self._attributes.items()}
        codes, questions = tuple(self._codes.values()), tuple(self._questions.items())
        leaves = frozenset(self.leaves)
        return Reads(attributes, leaves, codes, frozenset(names), dynamic, questions)

    @property
    def may_draw(self) -> bool:
        """Whether the code that ran names a function that draws random numbers, or was refused."""
        names = [code.co_names for code, _ in self._codes.values()]
        return self.refused is not None or not _DRAWS.isdisjoint(chain.from_iterable(names))

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def refuse_if_asked(self, frame: FrameType, what: str) -> None:
        """Refuses where the forward's own code asks a proxy for something."""
        if threading.get_ident() == self._thread and self._is_users(frame):
            self.refuse(f"its forward asks {what}")

    def _is_users(self, frame: FrameType | None) -> bool:
        """Whether a frame is code of the forward, or of a library that this code calls."""
        while frame is not None:
            module = frame.f_globals.get("__name__") or ""
            if is_trusted(module):
                return False
            if not is_of_a_library(module):
                return True
            frame = frame.f_back
        return False

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if code.co_name == "_find_and_load" and code.co_filename == _IMPORTS:
            self._importing += {"call": 1, "return": -1}.get(event, 0)
        elif self._importing:
            pass  # a module's own code runs once, when it is imported
        elif event == "call":
            if code in _QUESTION_CODES:
                if self._is_users(frame.f_back):
                    self._ask(_QUESTION_CODES[code])
            elif self._is_users(frame):
                if code not in _HANDS_OUT and id(code) not in self._codes:
                    self._codes[id(code)] = code, frame.f_globals
                    module = frame.f_globals.get("__name__") or ""
                    reason = None if is_of_a_library(module) else why_not(code)
                    if module == "copy":
                        reason = "its forward copies objects"
                    if reason is not None:
                        self.refuse(reason)
            elif code is _IMPORT_BY_NAME and self._is_users(frame.f_back):
                self.refuse("its forward imports a module by name")
            elif code in _OF_TRACES and self._is_users(frame.f_back):
                self.refuse("its forward asks whether it is traced")
            elif code in _HANDS_OUT and self._is_users(frame.f_back):
                self.refuse(f"its forward calls {_HANDS_OUT[code]}(), which a trace does not see")
        elif event == "c_call" and self._is_users(frame):
            if arg in QUESTIONS:
                self._ask(arg)
            elif not self._is_pure(arg):
                self._open.append((frame, arg, self._made()))
        elif event in ("c_return", "c_exception") and self._open:
            of, function, before = self._open[-1]
            if of is frame and function is arg:
                self._open.pop()
                if self._made() == before:
                    name = _in_words(arg)
                    self.refuse(f"its forward calls {name}(), whose result a trace does not know")

    def _ask(self, question: Callable[..., Any]) -> None:
        try:
            self._questions[question] = ask(question)
        except Exception:  # this build does not have the device
            self.refuse(f"its forward asks for {_in_words(question)}()")

    def _is_pure(self, function: Any) -> bool:
        of = getattr(function, "__self__", None)
        if of is builtins:
            return function.__name__ in _PURE_BUILTINS
        if not isinstance(function, BuiltinFunctionType):  # an unbound method of a class
            of = getattr(function, "__objclass__", object)
        if isinstance(of, type):
            return issubclass(of, _PURE_TYPES)
        known = getattr(function, "__module__", None) in _PURE_MODULES
        return known or function.__name__ in _PURE_OF_TORCH or isinstance(of, _PURE_TYPES)

    def _exceptions(self, frame: FrameType, event: str, arg: Any):
        """A trace function that skips frames of PyTorch and of the interpreter."""
        if self._importing or not self._is_users(frame):
            return None
        frame.f_trace_lines = False

        def local(frame: FrameType, event: str, arg: Any):
            if event == "exception" and not issubclass(arg[0], (StopIteration, GeneratorExit)):
                self.refuse("its forward catches an exception, which a trace may raise by itself")
            return local

        return local

    def _look_up(self, module: nn.Module, name: str) -> Any:
        if threading.get_ident() == self._thread:
            path = self._paths.get(id(module))
            if path is not None and not name.startswith(_NOT_READ) and name not in _OF_EVERY_MODULE:
                self._attributes[path].add(name)
            if name in ("__dict__", "_parameters", "_buffers") and self._is_users(sys._getframe(1)):
                self.refuse(f"its forward reads {name}, which a trace does not see into")
        return object.__getattribute__(module, name)

    def is_instance(self, value: Any, kinds: Any) -> bool:
        if _IS_INSTANCE(value, fx.Proxy):
            self.refuse_if_asked(sys._getframe(2), "whether something is a tensor")
        return _IS_INSTANCE(value, kinds)


_IS_INSTANCE = isinstance


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Sends the reads of the body, in this thread, to the recorder."""
    profile, tracer, collects = sys.getprofile(), sys.gettrace(), gc.isenabled()

    def __getattribute__(module, name):
        return recorder._look_up(module, name)

    def __hash__(module):
        recorder.refuse_if_asked(sys._getframe(1), "which module it is")
        return object.__hash__(module)

    def is_instance(value, kinds):
        return recorder.is_instance(value, kinds)

    gc.disable()  # finalizers that it runs have nothing to do with the forward
    nn.Module.__getattribute__ = __getattribute__
    nn.Module.__hash__ = __hash__
    builtins.isinstance = is_instance
    sys.settrace(recorder._exceptions)
    sys.setprofile(recorder._profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        if callable(profile):
            sys.setprofile(profile)
        elif profile is not None:  # cProfile's
            profile.enable()
        sys.settrace(tracer)
        builtins.isinstance = _IS_INSTANCE
        del nn.Module.__getattribute__, nn.Module.__hash__
        if collects:
            gc.enable()
