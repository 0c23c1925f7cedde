"""Chooses the implementation of ``conv_bn_act`` that runs a call, and says why.

In order of precedence the choice follows: the user's timing of exactly this call on this device
(``user_timings``, made by ``fused_res.tune``); the package's timings (``shipped_timings``); on a
CPU a rule (``cpu_rules``). Backend ``auto`` chooses among all implementations that can run the call
and PyTorch's own ops (``eager``); a named backend chooses among its own implementations.
Implementations register themselves. Nothing is timed here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from . import backends, first_use, samples, shipped_timings, user_timings
from .cpu_rules import expected_convolution
from .shipped_timings import Row

OP = "conv_bn_act"


# With BatchNorm in the weights, 16 bits round the weights once more: over a net the error is 1.3
# times PyTorch's on average, up to 1.9 times. cuDNN runs 16 bits only where backend cuda is named.
FLOAT32_ALONE = "it is for float32 alone"


class Implementation(NamedTuple):
    """One way to run calls of ``conv_bn_act``.

    prepare: takes a call, and a configuration if it has any; returns ``(x, residual) -> y`` for
        calls of the same sizes, valid while the convolutions' parameters stay unchanged.
    why_not: returns why it cannot run a call; None where it can.
    configs: lists the configurations for a call; None: it has none.
    """

    backend: str
    prepare: Callable[..., Callable]
    why_not: Callable[..., str | None]
    configs: Callable[..., list] | None = None


# By name. Within a backend a later one runs only where it is clearly faster than an earlier one.
IMPLEMENTATIONS: dict[str, Implementation] = {}


_eager: Callable | None = None


def register_eager(run: Callable) -> None:
    """Registers the function that runs a call in PyTorch's ops."""
    global _eager
    _eager = run


def register(name: str, *implementation) -> None:
    """Adds an implementation, the fields of ``Implementation``."""
    IMPLEMENTATIONS[name] = Implementation(*implementation)


class Candidate(NamedTuple):
    """An implementation that may run a call.

    config: one of Triton's configurations; None: the implementation chooses, or has only one.
    final: whether later calls get the same.
    """

    implementation: str
    reason: str
    config: object = None
    final: bool = True


class Key(NamedTuple):
    """Everything that the choice of a candidate depends on."""

    device: torch.device
    threads: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    residual: str  # none, add, concat or shortcut
    second: tuple  # channels of the concatenated residual, or the shortcut's weight and sizes
    act: str
    tf32: bool


def allows_tf32() -> bool:
    conv = getattr(torch.backends.cudnn, "conv", None)  # none before PyTorch 2.9
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def key_of(call) -> Key:
    x, (weight, _, stride, padding, dilation, groups, _), residual, shortcut, concat, act = call
    kind, second = "none", ()
    if shortcut is not None:
        kind = "shortcut"
        second = (shortcut.weight.shape, *map(tuple, shortcut[2:5]), shortcut.groups)
    elif concat:
        kind, second = "concat", (residual.size(1),)
    elif residual is not None:
        kind = "add"
    return Key(
        x.device,
        torch.get_num_threads(),
        x.dtype,
        x.shape,
        x.stride(1) == 1,
        weight.shape,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        kind,
        second,
        act,
        not x.is_cpu and x.dtype is torch.float32 and allows_tf32(),
    )


def _sizes(weight, stride, padding, dilation, groups) -> str:
    def pair(sizes) -> str:
        return "x".join(map(str, sizes))

    words = f"{pair(weight[2:])} stride {pair(stride)} padding {pair(padding)}"
    if dilation != (1, 1):
        words += f" dilation {pair(dilation)}"
    return words if groups == 1 else f"{words} groups {groups}"


def row_of(key: Key, ms: dict[str, float], config: dict | None = None) -> Row:
    """The timing row of a call, without a device."""
    like = _sizes(*key[5:10])
    if key.residual == "shortcut":
        weight = key.second[0]
        like += f", shortcut of {weight[1] * key.second[-1]}: {_sizes(*key.second)}"
    elif key.residual != "none":
        like += ", " + " ".join(map(str, (key.residual, *key.second)))
    if key.dtype == torch.float32 and key.device.type != "cpu":
        like += ", tf32" if key.tf32 else ", no tf32"
    return row_like(f"{like}, {key.act}", OP, key, ms, config)


def row_like(like: str, op: str, key, ms: dict[str, float], config: dict | None) -> Row:
    """A timing row of a convolution; ``key`` has its dtype, layout, shape and weight."""
    return Row(
        "",
        "",
        op,
        str(key.dtype).removeprefix("torch."),
        "channels_last" if key.channels_last else "NCHW",
        (*key.shape, key.weight[0]),
        ms,
        like,
        config,
    )


def words(row: Row) -> str:
    *shape, channels = row.shape
    return f"{'x'.join(map(str, shape))} to {channels}, {row.like}, {row.dtype} {row.layout}"


def taken(row: Row) -> str:
    """The name that backend ``auto`` takes by a row of the user's timings. The first of the row is
    the one that the rules expect to win: another must be clearly faster."""
    return shipped_timings.fastest(row.ms, [n for n in row.ms if n in ("eager", *IMPLEMENTATIONS)])


def expected(call, key: Key) -> str:
    """The name that backend ``auto`` takes for a call without timings."""
    able = [name for name, reason in why_not(call, "auto").items() if reason is None]
    backend, _ = backends.preferred(OP, call.x)
    able = [name for name in able if IMPLEMENTATIONS[name].backend == backend]
    if able and key.device.type == "cpu":
        return expected_convolution(key, able)
    return able[0] if able else "eager"


_chosen: dict[tuple[Key, str, bool], Candidate] = {}
_recorded: dict[Key, object] | None = None
_forgotten = 0


def choose(call, backend: str) -> Candidate:
    """The candidate that runs ``call`` on ``backend``: auto, or a backend that can run here."""
    key = key_of(call)
    if _watched is not None:
        _watched.append(_choose(call, key, backend))
    place = key, backend, torch._C._get_mkldnn_enabled()
    known = _chosen.get(place)
    if known is None:
        known = _first(call, key, backend)
        if not known.final:
            return known
        _chosen[place] = known
        while len(_chosen) > shipped_timings.MOST_SHAPES:
            _chosen.pop(next(iter(tuple(_chosen)), None), None)
    return known


_watched: list[Candidate] | None = None


@contextlib.contextmanager
def watching() -> Iterator[list[Candidate]]:
    """Collects the candidates of the calls that are made in the body."""
    global _watched
    _watched = found = []
    try:
        yield found
    finally:
        _watched = None


def may_leave(x: torch.Tensor, backend: str | None) -> bool:
    """Whether ``auto`` may leave a whole block on x to PyTorch's ops, by its calls."""
    covered = first_use.covers(x) and not torch.compiler.is_compiling()
    return covered and backends.is_auto(backend)


def is_left(call) -> bool:
    """Whether PyTorch's ops run a call that has just run, now and later. To choose again would be a
    second sighting."""
    known = _chosen.get((key_of(call), "auto", torch._C._get_mkldnn_enabled()))
    return known is not None and known.implementation == "eager"


@functools.cache
def knows(device: torch.device) -> bool:
    """Whether backend ``auto`` may take a kernel on a device: there are timings of it, or ``tune``
    runs."""
    mine = any(row.op == OP for row in user_timings.table(device).rows.values())
    return _recorded is not None or shipped_timings.knows(device, OP) or mine


def forget() -> None:
    """Forgets all choices; call it after a change of the tables."""
    global _forgotten
    _forgotten += 1
    _chosen.clear()
    knows.cache_clear()
    first_use.forget()


def state() -> tuple:
    """A value that differs when another candidate than before may run a call."""
    return _forgotten, backends.named(), torch._C._get_mkldnn_enabled()


@contextlib.contextmanager
def recording() -> Iterator[dict[Key, object]]:
    """Collects the distinct calls made in the body, without the contents of their tensors. They run
    in PyTorch's own ops."""
    global _recorded
    _recorded = calls = {}
    forget()
    try:
        yield calls
    finally:
        _recorded = None
        forget()


def _first(call, key: Key, backend: str) -> Candidate:
    if _recorded is None:
        choice = _choose(call, key, backend)
        row = row_of(key, {})
        backends.say(f"{OP} {words(row)} runs {choice.implementation}: {choice.reason}")
        return choice
    residual = call.residual
    if residual is not None:
        residual = torch.empty_like(residual, device="meta")
    x = torch.empty_like(call.x, device="meta")
    _recorded.setdefault(key, call._replace(x=x, residual=residual))
    return Candidate("eager", "the calls of a model are recorded")


def why_not(call, backend: str) -> dict[str, str | None]:
    """Why each implementation of a backend cannot run a call; None where it can."""
    reasons = {}
    for name, implementation in IMPLEMENTATIONS.items():
        if backend not in ("auto", implementation.backend):
            continue
        if backend == "auto" and implementation.backend == "triton" and backends.INTERPRETED:
            continue  # the interpreter is for tests
        if backend == "auto" and name == "cudnn" and call.x.dtype != torch.float32:
            reasons[name] = FLOAT32_ALONE
            continue
        reasons[name] = backends.why_not(
            OP, implementation.backend, call.x.device.type, call.x.dtype
        ) or implementation.why_not(call)
    return reasons


def _config(call, name: str, wanted: dict | None) -> object:
    """The configuration that a table names; None if this call has no such configuration now."""
    configs = None if name == "eager" else IMPLEMENTATIONS[name].configs
    if configs is None or wanted is None:
        return None
    return next((config for config in configs(call) if config._asdict() == wanted), None)


class _Trial:
    """A ``first_use.Trial`` of a call."""

    def __init__(self, call, key: Key, able: list[str]) -> None:
        self.names = able
        # Triton compiles each kernel for seconds
        self.quick = [name for name in able if IMPLEMENTATIONS[name].backend != "triton"]
        residual = samples.meta_like(call.residual)
        self._call = call._replace(x=samples.meta_like(call.x), residual=residual)
        self._key = key

    def sample(self, seed: int, images: int | None = None):
        call, of = self._call, samples.generator(self._key.device, seed)
        inputs = call.x, call.residual
        if images is not None:
            inputs = [None if t is None else t[:images] for t in inputs]
        x, residual = (samples.normal(t, of) for t in inputs)
        conv = samples.stage(call.conv, of)
        shortcut = None if call.shortcut is None else samples.stage(call.shortcut, of)
        made = call._replace(x=x, conv=conv, residual=residual, shortcut=shortcut)
        return samples.cast(made, self._key.dtype)  # as autocast does

    def cast(self, sample, dtype: torch.dtype):
        return samples.cast(sample, dtype)

    def run(self, name: str, sample) -> first_use.Results:
        with torch.no_grad():
            if name == "eager":
                return {"y": [_eager(sample)]}
            run = IMPLEMENTATIONS[name].prepare(sample)
            return {"y": [run(sample.x, sample.residual)]}


def _choose(call, key: Key, backend: str) -> Candidate:
    reasons = why_not(call, backend)
    able = [name for name, reason in reasons.items() if reason is None]
    row = row_of(key, {})
    mine = user_timings.find(key.device, row)
    names = ["eager", *able] if backend == "auto" else able
    timed = [] if mine is None else [name for name in mine.ms if name in names]
    if timed:
        name = shipped_timings.fastest(mine.ms, timed)
        gain = f", {mine.ms['eager'] / mine.ms[name]:.2f}x PyTorch" if "eager" in mine.ms else ""
        config = _config(call, name, mine.config)
        return Candidate(name, f"tuned: {mine.ms[name]:.3g} ms{gain}", config)
    if backend == "auto":
        device = shipped_timings.device_of(key.device.type, key.device.index)
        name, reason, config = shipped_timings.verdict(
            OP, device, row.dtype, row.layout, row.shape, tuple(able), row.like
        )
        if name is not None:
            return Candidate(name, reason, _config(call, name, config))
        if first_use.covers(key.device):
            trial = partial(_Trial, call, key, able)
            name, reason, final = first_use.decide((OP, key), key.device, lambda: row, trial)
            return Candidate(name, reason, final=final)
        backend, reason = backends.preferred(OP, call.x)
        if backend == "eager":
            return Candidate("eager", reason)
        able = [name for name in able if IMPLEMENTATIONS[name].backend == backend]
    if able and key.device.type == "cpu":
        return Candidate(expected_convolution(key, able), "expected to win at this shape")
    if able:
        return Candidate(able[0], "the backend's first")
    return Candidate("eager", "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
