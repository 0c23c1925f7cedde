"""Chooses the backend of an op, and says why.

``auto`` takes a fused kernel where one can run and is known to win, else PyTorch's own ops
(``eager``). A backend can be named by an argument, by ``with fused_res.backend(name)`` or by
``FUSED_RES_BACKEND``, in this order of precedence. A named backend never falls back: it raises
where it cannot run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import ops  # noqa: F401  defines the ops that this module calls
from ..env import BACKENDS, CPU_ISAS, settings
from . import cuda_library, shipped_timings

_log = logging.getLogger("fused_res")
if settings.log == "dispatch":
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.INFO)
_logged: set[str] = set()
MOST_LOGGED = 1000

_HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *_HALVES, torch.float64)

# op -> backend -> dtypes with kernels
SUPPORT: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "bn_act": {
        "cpu": DTYPES,
        "cuda": (torch.float32, *_HALVES),
        "triton": (torch.float32, *_HALVES),
    },
    "conv_bn_act": {
        "cpu": (torch.float32, *_HALVES),
        "cuda": (torch.float32, *_HALVES),
        "triton": (torch.float32, *_HALVES),
    },
}
# op -> backend -> dtypes for which `auto` takes the backend on a device without timings, because it
# beats PyTorch's own ops there (benchmarks/results). A GPU without timings runs PyTorch's own ops.
# The CPU's float64 kernel is plain code for gradient checks.
PREFERRED: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "bn_act": {"cpu": (torch.float32, *_HALVES)},
    "conv_bn_act": {"cpu": (torch.float32, *_HALVES)},
}
# Triton's interpreter runs the same kernels on CPU tensors, slowly: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cpu",) if INTERPRETED else ("cuda", "xpu"),
}

current = settings.backend  # of a call that names none


class BackendUnavailable(RuntimeError):
    """A backend that was named cannot run here; the message says why."""


def _path_of(library: str) -> Path:
    return Path(__file__).parent.parent / f"{library}.abi3.so"


def _load(name: str) -> str | None:
    """Loads a library of kernels. Returns the reason of a failure, or None."""
    path = _path_of(name)
    if not path.exists():
        lacked = "compiler" if name == "_C" else "nvcc, or no CUDA in this PyTorch,"
        return f"{path.name} was not built (no {lacked} when fused_res was installed)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _cuda_status() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.device_count():  # which, unlike is_available, does not initialise CUDA
        return "no CUDA device"
    reason = _load("_C_cuda")
    if reason:
        return reason
    path = _path_of("_C_cuda")
    try:
        reason = cuda_library.why_not(cuda_library.read(path))
    except AttributeError:
        reason = "it is of an older fused_res: build it again"
    return reason and f"{path.name} cannot run here: {reason}"


def _look_at_devices() -> None:
    """Runs when the program initialises CUDA, with a library that the driver can run."""
    path = _path_of("_C_cuda")
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    reason = cuda_library.why_not_on(devices, cuda_library.read(path))
    if reason:
        STATUS["cuda"] = f"{path.name} cannot run here: {reason}"


def _triton_status() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    return None if torch.cuda.device_count() else "no GPU that Triton compiles for"


# backend -> why it cannot run on this machine at all, or None
STATUS: dict[str, str | None] = {
    "cpu": _load("_C"),
    "cuda": _cuda_status(),
    "triton": _triton_status(),
    "eager": None,
}
if STATUS["cuda"] is None:
    torch.cuda._lazy_call(_look_at_devices)


def cpu_isa(limit: str | None = None) -> str:
    """The instruction set that the CPU kernels use: ``plain``, ``avx2`` or ``avx512``.

    Args:
        limit: use at most this one from now on; ``best``: the best that the processor has.

    Raises:
        ValueError: ``limit`` is not a known name.
        BackendUnavailable: the CPU library is not loaded.
    """
    if STATUS["cpu"]:
        raise BackendUnavailable(f"backend 'cpu' is not available: {STATUS['cpu']}")
    if limit is not None and limit not in CPU_ISAS:
        raise ValueError(f"limit={limit!r} must be one of: {', '.join(CPU_ISAS)}")
    level = {None: -1, "best": len(CPU_ISAS)}.get(limit, CPU_ISAS.index(limit or "best") - 1)
    return CPU_ISAS[1 + torch.ops.fused_res.cpu_isa(level)]


if STATUS["cpu"] is None:
    cpu_isa(settings.cpu_isa)
    torch.ops.fused_res.training_winograd(settings.winograd)


def empty_cache() -> int:
    """Frees the scratch memory of the CPU kernels, which they keep between ops, at most 256 MB.

    The kernels keep no memory of outputs: PyTorch allocates and frees it.

    Returns:
        The number of bytes freed; 0 without the CPU library.

    Examples:
        >>> block, x = fused_res.FusedResBlock(64, 64).eval(), torch.randn(1, 64, 14, 14)
        >>> y = block(x).detach()
        >>> freed = fused_res.empty_cache()  # bytes
    """
    return 0 if STATUS["cpu"] else torch.ops.fused_res.empty_cache()


def check_name(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of: {', '.join(BACKENDS)}")
    return backend


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the body of a ``with`` with a named backend. May be nested.

    The name holds for all threads of the process, like PyTorch's own backend flags. In the body a
    fused op raises ``BackendUnavailable`` where the backend cannot run it.

    Args:
        name: auto, cpu, cuda, triton or eager (PyTorch's own ops).

    Raises:
        ValueError: no backend has this name.
        BackendUnavailable: it cannot run on this machine; the message says why.

    Examples:
        >>> block, x = fused_res.FusedResBlock(64, 64), torch.randn(8, 64, 14, 14)
        >>> with fused_res.backend("eager"):
        ...     y = block(x)
    """
    global current
    if STATUS.get(check_name(name)):
        raise BackendUnavailable(f"backend {name!r} is not available: {STATUS[name]}")
    before, current = current, name
    try:
        yield
    finally:
        current = before


def named() -> str:
    """The backend of a call that names none; may be ``auto``."""
    return current


def is_auto(backend: str | None) -> bool:
    """Whether no backend is named, in the call or outside it."""
    return (named() if backend is None else backend) == "auto"


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on such tensors; None where it can."""
    if backend == "eager":
        return None
    if STATUS[backend]:
        return STATUS[backend]
    if backend not in SUPPORT[op]:
        return f"it has no {op} kernel yet"
    if device_type not in DEVICE_TYPES[backend]:
        return f"the tensors are on {device_type!r}"
    if dtype not in SUPPORT[op][backend]:
        return f"it has no {op} kernel for {dtype}"
    return None


def why_not_tensors(*tensors: torch.Tensor | None) -> str | None:
    """Why no fused op can run on these tensors in this context; None where one can."""
    if torch.compiler.is_compiling():
        return "the graph is being exported" if torch.compiler.is_exporting() else None
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform (vmap, grad, jvp, ...) is active"
    if torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    ):
        return "forward-mode AD is active"
    if torch.jit.is_tracing():
        return "the model is being traced"
    return None


def _auto(op: str, x: torch.Tensor) -> tuple[str, str]:
    """The backend that ``auto`` takes for a tensor, and the reason."""
    # not in torch.compile: shapes are symbols, and the timings do not cover Inductor's kernels
    if (
        not torch.compiler.is_compiling()
        and shipped_timings.rows()
        and x.dim() == 4
        and shipped_timings.knows(x.device, op)
    ):
        able = [b for b in SUPPORT[op] if why_not(op, b, x.device.type, x.dtype) is None]
        backend, reason, _ = shipped_timings.verdict_on(op, x, tuple(able))
        if backend is not None:
            return backend, reason
    return preferred(op, x)


def preferred(op: str, x: torch.Tensor) -> tuple[str, str]:
    """The backend that ``auto`` takes for a tensor without timings, and the reason."""
    dtype, kind = x.dtype, "cpu" if x.is_cpu else x.device.type
    for candidate, dtypes in PREFERRED[op].items():
        if kind in DEVICE_TYPES[candidate] and dtype in dtypes and STATUS[candidate] is None:
            return candidate, "it is preferred for the dtype"
    return "eager", f"no fused kernel is preferred for {dtype} on {kind!r}"


@functools.cache
def never_fused(device_type: str, dtype: torch.dtype) -> bool:
    """Whether ``auto`` takes PyTorch's ops for all tensors of a kind: no kernel can run them, or on
    a CPU none is preferred."""
    able = any(
        why_not(op, name, device_type, dtype) is None for op, of in SUPPORT.items() for name in of
    )
    preferred = any(dtype in of.get(device_type, ()) for of in PREFERRED.values())
    return not able or (device_type == "cpu" and not preferred)


FUSED_ON_CPU = frozenset(dtype for dtype in DTYPES if not never_fused("cpu", dtype))


def say(line: str) -> None:
    """Logs a line about dispatch, once; not while a graph is compiled."""
    if torch.compiler.is_compiling() or line in _logged or len(_logged) >= MOST_LOGGED:
        return
    _logged.add(line)
    _log.info(line)


def asked_for(op: str, requested: str | None, *tensors: torch.Tensor | None) -> str:
    """The backend named for a call of ``op``, or ``auto``; ``eager`` where no fused op can run.

    Raises:
        ValueError: ``requested`` is not a backend's name.
        BackendUnavailable: a backend was named and cannot run this.
    """
    name = check_name(requested) if requested is not None else named()
    if name == "eager":
        return "eager"
    x = tensors[0]
    reason = why_not_tensors(*tensors)
    if name != "auto":
        reason = reason or why_not(op, name, x.device.type, x.dtype)
        if reason:
            raise BackendUnavailable(f"backend {name!r} cannot run {op}: {reason}")
        return name
    if reason is None:
        return "auto"
    say(f"{op} runs in PyTorch's own ops: {reason}")
    return "eager"


def taken_by_auto(op: str, x: torch.Tensor, by_shape: bool = True) -> str:
    """The backend that ``auto`` takes for an op on tensors like x."""
    name, reason = (_auto if by_shape else preferred)(op, x)
    if name == "eager":
        say(f"{op} runs in PyTorch's own ops: {reason}")
    return name


def choose(
    op: str, requested: str | None, *tensors: torch.Tensor | None, by_shape: bool = True
) -> str:
    """The backend that runs ``op`` on ``tensors`` (the first one decides device and dtype).

    Args:
        by_shape: False: ignore shapes, so that processes with different batches choose alike.

    Raises:
        as ``asked_for``.
    """
    name = asked_for(op, requested, *tensors)
    return taken_by_auto(op, tensors[0], by_shape) if name == "auto" else name
