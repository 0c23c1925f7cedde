"""The correctness rule: errors against float64, and how many times PyTorch's own they are."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
Errors = dict[tuple[str, str], float]  # by tensor, and "largest" or "rms"


def errors(result: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    """Largest and RMS error of every tensor.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if set(result) != set(exact):
        raise ValueError(f"returned {sorted(result)} instead of {sorted(exact)}")
    out = {}
    for name, e in exact.items():
        if result[name].shape != e.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}, not {tuple(e.shape)}")
        off = result[name].double() - e
        out[name, "largest"] = float(off.abs().max())
        out[name, "rms"] = rms(off)
    return out


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def half_ulp(size: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of numbers of that size: rounding alone errs so."""
    if not 0 < size < math.inf:
        return 0.0
    return torch.finfo(dtype).eps / 2 * 2.0 ** math.floor(math.log2(size))


def compare(
    dtype: torch.dtype, result: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[Errors, dict[str, float]]:
    """The errors that count, and the least that each is taken for: half an ulp.

    In 16 bits only RMS errors do, with half an ulp of the RMS: of millions of ReLU inputs some
    round to the other side of zero, and the largest error tells of that chance alone.
    """
    found = errors(result, exact)
    size = rms if dtype in HALVES else lambda e: float(e.abs().max())
    floor = {name: half_ulp(size(e), dtype) for name, e in exact.items()}
    if dtype in HALVES:
        found = {key: error for key, error in found.items() if key[1] == "rms"}
    return found, floor


def compare_net(
    dtype: torch.dtype, result: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[Errors, dict[str, float]]:
    """As ``compare``; of a net's many gradients only the one with the median relative error."""
    found, floor = compare(dtype, result, exact)
    sizes = {name: rms(e) for name, e in exact.items() if name != "y"}
    relative = [found[name, "rms"] / size for name, size in sizes.items() if size]
    found = {("y", "rms"): found["y", "rms"]}
    if relative:
        found["gradients", "rms"] = statistics.median(relative)
        floor["gradients"] = torch.finfo(dtype).eps / 2
    return found, floor


def over_eager(found: Errors, eager: Errors, floor: dict[str, float]) -> tuple[float, str]:
    """The worst error over eager's own, which counts for half an ulp at least; and of what."""
    ratios = {
        key: error / max(eager.get(key, 0.0), floor[key[0]], 1e-300) for key, error in found.items()
    }
    worst = max(ratios, key=lambda key: (math.isnan(ratios[key]), ratios[key]))
    return ratios[worst], f"{worst[0]}, {worst[1]}"
