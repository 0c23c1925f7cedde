"""The correctness standard: our error against fp64 is at most 1.5 times PyTorch's in the same
dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 1.5


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def half_ulp(exact: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of ``dtype`` at the largest magnitude of ``exact``.

    A correctly rounded result is off by as much, so no error under it can be called one.
    """
    largest = exact.abs().max().item() if exact.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return 0.0
    return torch.finfo(dtype).eps / 2 * 2.0 ** math.floor(math.log2(largest))


def rule(ours, theirs, exact, what: str = "") -> None:
    """Asserts the standard, by largest error and by RMS, for tensors or lists of tensors.

    ``ours`` and ``theirs`` have one dtype, ``exact`` is fp64. Non-finite values must agree in
    place.
    """
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs) == len(exact)
        for i, triple in enumerate(zip(ours, theirs, exact, strict=True)):
            rule(*triple, f"{what}[{i}]")
        return
    if exact is None:
        assert ours is None and theirs is None, what
        return
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == exact.shape, what
    assert exact.dtype == torch.float64, what
    assert torch.equal(ours.isfinite(), exact.isfinite()), f"{what}: not finite elsewhere"
    finite = exact.isfinite()
    exact = exact[finite]
    mine, other = (t[finite].double() - exact for t in (ours, theirs))
    floor = half_ulp(exact, ours.dtype)
    for name, measure in (
        ("largest", lambda e: e.abs().max().item() if e.numel() else 0.0),
        ("rms", rms),
    ):
        a, b = measure(mine), measure(other)
        limit = FACTOR * max(b, floor)
        assert a <= limit, f"{what}: {name} error {a:.3g}, PyTorch's {b:.3g}, limit {limit:.3g}"
