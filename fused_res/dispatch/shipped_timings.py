"""The timings that the package ships: the table that backend ``auto`` follows.

``shipped_timings.json`` has a row per device, op, dtype, layout and shape, with the milliseconds
that each implementation takes (for ``bn_act``: forward and backward). ``benchmarks/table.py
--dispatch`` writes it from the committed results. A shape without a row follows the nearest row of
the same device, or else of the same architecture, if one is near.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# A kernel is taken where it was measured to be this much faster than PyTorch's own ops: on the
# device itself, more than timings differ from run to run; on a sibling, more than siblings differ.
LEAST_GAIN, LEAST_GAIN_OF_SIBLING = 1.03, 1.10
# Of each thing that is kept for shapes of inputs, so many: a network of a hundred convolutions has
# that many for five sizes of its input, and 5 KB are kept of each.
MOST_SHAPES = 512
# Values per channel and channels of a shape may differ from the measured one's by this factor.
NEAR = 4.0


class Row(NamedTuple):
    """One measurement.

    isa: the device's architecture, ``sm_90``.
    shape: (N, C, H, W), of ``conv_bn_act`` (N, C, H, W, K).
    ms: by backend, of ``conv_bn_act`` by implementation.
    like: what a call must have in common beside op, dtype and layout, in the words of
        ``choices.row_of``.
    config: the fields of Triton's configuration that ``ms`` is of, where it has several.
    """

    device: str
    isa: str
    op: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    ms: dict[str, float]
    like: str = ""
    config: dict[str, object] | None = None


class Verdict(NamedTuple):
    backend: str | None  # None: nothing was measured that says
    reason: str
    config: dict[str, object] | None = None


@functools.cache
def rows() -> tuple[Row, ...]:
    text = (Path(__file__).parent / "shipped_timings.json").read_text()
    return tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(text))


@functools.cache
def device_of(kind: str, index: int | None) -> tuple[str, str]:
    """Name and architecture of a device."""
    if kind != "cuda" or not torch.cuda.is_available():  # there are fake tensors
        return kind, kind
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.name, properties.gcnArchName
    return properties.name, f"sm_{properties.major}{properties.minor}"


@functools.cache
def knows(device: torch.device, op: str) -> bool:
    """Whether anything of an op was measured on the device or on one of its architecture."""
    name, isa = device_of(device.type, device.index)
    return any(r.op == op and (r.device == name or r.isa == isa) for r in rows())


def _far(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The largest of the factors by which values per channel and channels differ."""

    def sizes(shape):
        n, c, h, w, *out = shape
        return n * h * w, c, *out

    return max(max(x / y, y / x) for x, y in zip(sizes(a), sizes(b), strict=True))


def fastest(ms: dict[str, float], names: Sequence[str], least: float = LEAST_GAIN) -> str:
    """The fastest, where it is faster by ``least`` than what comes before it in ``names``."""
    taken = names[0]
    for name in names[1:]:
        if ms[taken] >= least * ms[name]:
            taken = name
    return taken


def _words(row: Row, backend: str) -> str:
    gain = row.ms["eager"] / row.ms[backend]
    shape = "x".join(map(str, row.shape)) + f" {row.like}" * bool(row.like)
    return f"{gain:.2f}x PyTorch at {shape} {row.layout} on {row.device}"


@functools.lru_cache(maxsize=MOST_SHAPES)
def verdict(
    op: str, device: tuple[str, str], dtype: str, layout: str, shape: tuple[int, ...],
    backends: tuple[str, ...], like: str = "",
) -> Verdict:  # fmt: skip
    """The fastest of ``backends`` (which can run the op) and ``eager``, by the nearest measurement.

    Args:
        device: its name and architecture.
        dtype: as ``bfloat16``. layout: ``NCHW`` or ``channels_last``.
        shape, backends, like: as in ``Row``; of equals the first in ``backends`` is taken.
    """
    name, isa = device
    of_op = [r for r in rows() if (r.op, r.dtype, r.layout, r.like) == (op, dtype, layout, like)]
    for found, least in (
        ([r for r in of_op if r.device == name], LEAST_GAIN),
        ([r for r in of_op if r.isa == isa], LEAST_GAIN_OF_SIBLING),
    ):
        near = min(found, key=lambda r: _far(r.shape, shape), default=None)
        if near is None or _far(near.shape, shape) > NEAR:
            continue
        timed = [b for b in backends if b in near.ms]
        if not timed:
            continue
        taken = fastest(near.ms, ("eager", *timed), least)
        best = min(timed, key=near.ms.__getitem__) if taken == "eager" else taken
        return Verdict(taken, f"measured: {best} {_words(near, best)}", near.config)
    size = "x".join(map(str, shape))
    return Verdict(None, f"{op} at about {size}, {dtype} {layout}, was not measured on {name}")


def verdict_on(op: str, x: Tensor, backends: tuple[str, ...]) -> Verdict:
    """``verdict`` for a tensor, (N, C, H, W); no backend for an empty one or symbolic sizes."""
    if any(type(n) is not int or n == 0 for n in x.shape):
        return Verdict(None, "its sizes are symbols, or 0")
    layout = "NCHW" if x.is_contiguous() or x.stride(1) != 1 else "channels_last"
    device = device_of(x.device.type, x.device.index)
    dtype = str(x.dtype).removeprefix("torch.")
    return verdict(op, device, dtype, layout, tuple(x.shape), backends)


def summary(device: torch.device) -> list[str]:
    """What was measured on a device (or, where nothing was, on its siblings), a line per row."""
    name, isa = device_of(device.type, device.index)
    found = [r for r in rows() if r.device == name] or [r for r in rows() if r.isa == isa]
    out = []
    for r in found:
        others = [b for b in r.ms if b != "eager"]
        if others:
            best = min(others, key=r.ms.__getitem__)
            least = LEAST_GAIN if r.device == name else LEAST_GAIN_OF_SIBLING
            taken = fastest(r.ms, ["eager", *others], least)
            out.append(f"{r.op} {r.dtype}: auto takes {taken}; {best} {_words(r, best)}")
    return out
