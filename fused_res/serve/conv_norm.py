"""Runs a convolution outside residual blocks, and the BatchNorm and ReLU after it, as one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..fuse.modules import conv_norm_of, is_exported, tensors_of
from ..ops.conv_bn_act import Call, conv_bn_act, prepared
from ..reference import ConvNorm
from ..run.description import NORMS, has_hooks
from ..run.weight_cache import fingerprint


def plain_conv_norm(
    conv: nn.Module, bn: nn.Module | None, relu: nn.Module | bool
) -> ConvNorm | None:
    """The convolution and BatchNorm, if one op computes the same as the modules in their current
    state."""
    if isinstance(relu, nn.Module) and (
        type(relu) is not nn.ReLU or has_hooks(relu) or "forward" in relu.__dict__
    ):
        return None
    if bn is not None:
        changed = type(bn) not in NORMS or has_hooks(bn) or "forward" in bn.__dict__
        if changed or bn.training or bn.running_mean is None:
            return None
    return conv_norm_of(conv, bn)


def conv_norm_relu(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, relu: nn.Module | bool
) -> Tensor:
    """``relu(bn(conv(x)))`` for inference.

    Every call checks the modules. If one was replaced, hooked or set to training, the modules
    themselves are called.

    Args:
        x: (N, C, H, W), or another input of the modules.
        conv, bn: an ``nn.Conv2d`` and one of ``NORMS``, or None for no normalisation.
        relu: an ``nn.ReLU``, or whether a ReLU follows.
    """
    hooked = not torch.compiler.is_compiling() and _has_any_global_hook()
    if x.dim() == 4 and not hooked and not is_exported():
        found = plain_conv_norm(conv, bn, relu)
        if found is not None:
            return conv_bn_act(x, found, act="none" if relu is False else "relu")
    y = conv(x) if bn is None else bn(conv(x))
    if isinstance(relu, nn.Module):
        return relu(y)
    return F.relu(y) if relu else y


def prepared_conv(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, relu: nn.Module | bool
) -> tuple[Callable[[Tensor], Tensor], list[Tensor], tuple] | None:
    """A function that runs ``conv_norm_relu`` for inputs of this size, the tensors that it was made
    from, and their fingerprint; None where it cannot be prepared. It is valid while the tensors
    have this fingerprint."""
    found = plain_conv_norm(conv, bn, relu) if x.dim() == 4 else None
    tensors = None if found is None else tensors_of(conv, bn)
    if tensors is None:
        return None
    now = fingerprint(tensors)
    run = prepared(Call(x, found, act="none" if relu is False else "relu"), None)
    return None if run is None else (lambda x: run(x, None), tensors, now)
