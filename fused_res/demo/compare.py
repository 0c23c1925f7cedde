"""Do a plain net and its fused twin compute the same? Errors against float64, and saved memory."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Agreement(NamedTuple):
    """Errors relative to float64: norm of the difference over norm, of all tensors of a kind."""

    kind: str
    plain: float
    fused: float


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, list[Tensor]]:
    outputs = model.train()(images)
    F.cross_entropy(outputs, labels).backward()
    with torch.no_grad():
        evaluated = model.eval()(images)
    return {
        "outputs, train": [outputs.detach()],
        "outputs, eval": [evaluated],
        "gradients": [p.grad for p in model.parameters()],
        "running statistics": [b for b in model.buffers() if b.is_floating_point()],
    }


def agreement(
    plain: nn.Module, fused: nn.Module, images: Tensor, labels: Tensor
) -> list[Agreement]:
    """Compares one training step of copies of both with that of a float64 copy of ``plain``.

    The eval outputs are those after the step's update of the running statistics, before any update
    of the weights.
    """
    exact = _training_step(copy.deepcopy(plain).double(), images.double(), labels)
    ours = [_training_step(copy.deepcopy(model), images, labels) for model in (plain, fused)]

    def error(found: list[Tensor], wanted: list[Tensor]) -> float:
        pairs = list(zip(found, wanted, strict=True))
        difference = sum((a.double() - b).square().sum().item() for a, b in pairs)
        return (difference / sum(b.square().sum().item() for _, b in pairs)) ** 0.5

    return [
        Agreement(kind, *(error(found[kind], wanted) for found in ours))
        for kind, wanted in exact.items()
    ]


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of activations a training step of ``model`` keeps for its backward pass.

    Every storage counts once, whoever saves it; parameters and buffers do not count.
    """
    model = copy.deepcopy(model).train()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model(images)
    # the graph, and with it every storage, is alive until here, so no address was used twice
    del outputs
    return sum(sizes.values())
