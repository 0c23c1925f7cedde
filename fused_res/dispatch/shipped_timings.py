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

# The least speedup over PyTorch's own ops for which `auto` takes a kernel. Timed on the device
# itself: more than timings differ from run to run. Timed on a device of the same architecture: more
# than such devices differ.
LEAST_GAIN, LEAST_GAIN_OF_SIBLING = 1.03, 1.10
# Entries of each cache that has one per shape, 5 KB each: a network of a hundred convolutions needs
# 500 for five sizes of its input.
MOST_SHAPES = 512
# A row applies to a shape if their values per channel, and their channels, differ by at most this
# factor.
NEAR = 4.0


class Row(NamedTuple):
    """A timing row.

    isa: the device's architecture, for example ``sm_90``.
    shape: (N, C, H, W); for convolutions (N, C, H, W, K).
    ms: milliseconds by backend; for convolutions by implementation.
    like: the other facts that a call must share with the row, beside op, dtype and layout; text of
        ``inference_conv.row_of``.
    config: the fields of Triton's fastest configuration, if there are several.
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
    backend: str | None  # None: no timing row applies
    reason: str
    config: dict[str, object] | None = None


@functools.cache
def rows() -> tuple[Row, ...]:
    text = (Path(__file__).parent / "shipped_timings.json").read_text()
    return tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(text))


@functools.cache
def device_of(kind: str, index: int | None) -> tuple[str, str]:
    """Name and architecture of a device."""
    if kind != "cuda" or not torch.cuda.is_available():  # a fake tensor may be on "cuda"
        return kind, kind
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.name, properties.gcnArchName
    return properties.name, f"sm_{properties.major}{properties.minor}"


@functools.cache
def knows(device: torch.device, op: str) -> bool:
    """Whether there is a row of the op for the device, or for another of its architecture."""
    name, isa = device_of(device.type, device.index)
    return any(r.op == op and (r.device == name or r.isa == isa) for r in rows())


def _far(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The largest factor by which the shapes' values per channel, or their channels, differ."""

    def sizes(shape):
        n, c, h, w, *out = shape
        return n * h * w, c, *out

    return max(max(x / y, y / x) for x, y in zip(sizes(a), sizes(b), strict=True))


def fastest(ms: dict[str, float], names: Sequence[str], least: float = LEAST_GAIN) -> str:
    """The fastest name; a later one must be ``least`` times as fast as the one taken before it."""
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
    """The fastest of ``eager`` and ``backends``, by the nearest timing row.

    Args:
        device: its name and architecture.
        dtype: for example ``bfloat16``. layout: ``NCHW`` or ``channels_last``.
        shape, like: as in ``Row``.
        backends: those that can run the op; the first wins a tie.
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
    """A line for each row of a device; without any, for each row of its architecture."""
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
