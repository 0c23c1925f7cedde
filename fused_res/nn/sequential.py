"""Consecutive residual blocks of an ``nn.Sequential``, as one call for inference.

``fuse_`` turns an ``nn.Sequential`` with such blocks into a ``FusedSequential``, which keeps its
children, keys and hooks. A child that has a hook, is in training or is of another kind is called by
itself. The blocks before it are one call, the blocks after it another.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch.backends import named
from ..ops.conv_bn_act import PLAIN, under_modes
from ..ops.res_chain import is_for
from ..run.chain import run_container
from ..run.kept import keep, size_of
from .blocks import plain_twin


def _asks_for_cuda(block: nn.Module) -> bool:
    return (getattr(block, "backend", None) or named()) == "cuda"


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs consecutive residual blocks in one call for inference.

    On a CPU it does so in float32, on a CUDA device if the backend ``cuda`` is named.
    """

    def forward(self, input):
        if type(input) not in PLAIN or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        modes = named() == "eager" or under_modes(input) or _has_any_global_hook()
        if modes or not is_for(input):
            return super().forward(input)
        if input.is_cuda and not any(map(_asks_for_cuda, self)):
            return super().forward(input)
        size, sizes = size_of(input), self.__dict__.setdefault("_kept", {})
        kept = sizes.get(size)
        if kept is None or not kept.passes(self):
            for other, old in tuple(sizes.items()):  # these keep replaced modules alive
                if not old.passes(self):
                    sizes.pop(other, None)
            y, kept = run_container(self, input)
            if kept is not None:
                keep(sizes, size, kept)
            return y
        x = input
        for step in kept.steps:
            x = step(x)
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        return plain_twin(self)

    def _apply(self, fn, recurse=True):
        self.__dict__.pop("_kept", None)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def unchain(container: FusedSequential) -> None:
    """Makes ``container`` a plain ``nn.Sequential`` again."""
    container.__dict__.pop("_kept", None)
    container.__class__ = nn.Sequential
