"""Random tensors in place of a call's own, for measurements."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import ConvNorm, Norm


def meta_like(t: Tensor | None) -> Tensor | None:
    """A tensor of the same size, layout and dtype, without memory."""
    return None if t is None else torch.empty_like(t, device="meta", requires_grad=False)


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(
    like: Tensor | None, of: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Tensor | None:
    """Normal numbers in place of a tensor, on the generator's device."""
    if like is None:
        return None
    return torch.empty_like(like, device=of.device, requires_grad=False).normal_(
        mean, std, generator=of
    )


def gradient_of(y: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """A random gradient for y: the same numbers, of ``dtype``, whatever y's dtype is."""
    dy = torch.empty_like(y, dtype=torch.float32, requires_grad=False)
    return dy.normal_(generator=generator(y.device, seed)).to(dtype).to(y.dtype)


def norm(like: Norm | None, of: torch.Generator) -> Norm | None:
    if like is None:
        return None
    mean, var, weight, bias, *rest = like
    var = normal(var, of, 0.0, 0.2)
    return Norm(
        normal(mean, of, 0.0, 0.2),
        None if var is None else var.abs_().add_(0.5),
        normal(weight, of, 1.0, 0.2),
        normal(bias, of, 0.0, 0.2),
        *rest,
    )


def stage(like: ConvNorm, of: torch.Generator) -> ConvNorm:
    """A convolution with weights as He et al. (2015) initialise them, and its norm."""
    weight = normal(like.weight, of, 0.0, (2 / like.weight[0].numel()) ** 0.5)
    return like._replace(weight=weight, bias=normal(like.bias, of), norm=norm(like.norm, of))


def cast(of, dtype: torch.dtype):
    """A tensor, norm, stage or list of these in another dtype; other values as they are."""
    if isinstance(of, Tensor):
        return of.to(dtype)
    if isinstance(of, tuple) and hasattr(of, "_fields"):
        return type(of)(*(cast(value, dtype) for value in of))
    return [cast(value, dtype) for value in of] if isinstance(of, list) else of


def leaf(t: Tensor | None) -> Tensor | None:
    """An alias of a tensor, which wants a gradient."""
    return None if t is None else t.detach().requires_grad_()


def trained(of: Norm | None) -> Norm | None:
    """A norm whose parameters want gradients, with copies of its running statistics."""
    if of is None:
        return None
    running = [None if t is None else t.clone() for t in of[:2]]
    return Norm(*running, *map(leaf, of[2:4]), *of[4:])


def updated(norms: list[Norm]) -> list[Tensor]:
    """The running statistics that a training step updates."""
    return [t for n in norms if n.training for t in n[:2] if t is not None]
