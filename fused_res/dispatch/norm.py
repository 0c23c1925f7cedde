"""Chooses what runs ``bn_act`` on a GPU: a BatchNorm and the add and ReLU after it, by itself.

On a CPU rules decide (``backends``, ``cpu_rules``). On a GPU a measurement, forward and backward,
does (``first_use``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Act, Norm
from . import backends, first_use, samples
from .shipped_timings import Row

OP = "bn_act"


class Call(NamedTuple):
    """The arguments of ``bn_act_norms`` but for the backend."""

    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    act: Act


_runner: Callable[..., Tensor] | None = None


def register(runner: Callable[..., Tensor]) -> None:
    """Registers ``bn_act_norms``."""
    global _runner
    _runner = runner


class _Key(NamedTuple):
    op: str
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool
    like: str


def _key_of(call: Call) -> _Key:
    x, norm, residual, second, act = call
    added = "" if residual is None else ", add" if second is None else ", add of a norm"
    like = f"{'training' if norm.training else 'eval'}{added}, {act}"
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return _Key(OP, x.device, x.dtype, tuple(x.shape), last, like)


class _Trial:
    """A ``first_use.Trial`` of a call."""

    def __init__(self, call: Call) -> None:
        x, of = call.x, (call.x.device.type, call.x.dtype)
        self.names = [b for b in backends.SUPPORT[OP] if backends.why_not(OP, b, *of) is None]
        self.quick = [n for n in ("cpu", "cuda", "triton") if n in self.names][:1]
        self._call, self._device = call._replace(x=samples.meta_like(x)), x.device

    def sample(self, seed: int, images: int | None = None) -> Call:
        call, of = self._call, samples.generator(self._device, seed)
        like = call.x if images is None else call.x[:images]
        residual = None if call.residual is None else samples.normal(like, of)
        norms = samples.norm(call.norm, of), samples.norm(call.residual_norm, of)
        return Call(samples.normal(like, of), norms[0], residual, norms[1], call.act)

    def cast(self, sample: Call, dtype: torch.dtype) -> Call:
        return samples.cast(sample, dtype)

    def run(self, name: str, sample: Call) -> first_use.Results:
        """The output, the running statistics, and the gradients of the inputs and the norms."""
        x, residual = map(samples.leaf, (sample.x, sample.residual))
        norms = samples.trained(sample.norm), samples.trained(sample.residual_norm)
        y = _runner(x, norms[0], residual, norms[1], sample.act, name)
        norms = [norm for norm in norms if norm is not None]
        affine = [t for norm in norms for t in norm[2:4] if t is not None]
        inputs = [t for t in (x, residual) if t is not None]
        dy = samples.gradient_of(y, self._call.x.dtype, 1)
        found = torch.autograd.grad(y, [*inputs, *affine], dy)
        return {
            "y": [y.detach()],
            "running statistics": samples.updated(norms),
            "gradients of inputs": [*found[: len(inputs)]],
            "gradients of norms": [*found[len(inputs) :]],
        }


def choose(call: Call) -> str:
    """The backend that ``auto`` takes on a GPU; ``eager``: PyTorch's ops."""
    key = _key_of(call)

    def row() -> Row:
        layout = "channels_last" if key.channels_last else "NCHW"
        dtype = str(key.dtype).removeprefix("torch.")
        return Row("", "", OP, dtype, layout, key.shape, {}, key.like)

    return first_use.decide(key, key.device, row, lambda: _Trial(call)).name
