"""Compares a plain net with its fused twin: errors against float64, and saved memory."""

from __future__ import annotations

import copy
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Agreement(NamedTuple):
    """Errors against float64: norm of the difference over norm, for all tensors of a kind."""

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


class _NearestToZero(TorchFunctionMode):
    """Records the smallest absolute input of any ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.value = float("inf")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.relu, torch.relu):
            self.value = min(self.value, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


def agreement(
    plain: nn.Module, fused: nn.Module, images: Tensor, labels: Tensor, keep: int = 3
) -> list[Agreement]:
    """Compares training steps of copies of both nets with steps of a float64 copy of ``plain``.

    Each step takes one image and starts from the same weights. The result is the median error over
    the ``keep`` images with the ReLU inputs furthest from 0, in float64. Where an input is within
    rounding of 0, float32 may flip the ReLU, in PyTorch's ops as in the fused ones, and the error
    of the gradients is then a matter of chance. The eval outputs are computed after the update of
    the running statistics.
    """

    double = copy.deepcopy(plain).double().train()  # batch statistics: no image changes the next

    def distance(image: Tensor) -> float:
        with torch.no_grad(), _NearestToZero() as nearest:
            double(image.double())
        return nearest.value

    def error(found: list[Tensor], wanted: list[Tensor]) -> float:
        pairs = list(zip(found, wanted, strict=True))
        difference = sum((a.double() - b).square().sum().item() for a, b in pairs)
        return (difference / sum(b.square().sum().item() for _, b in pairs)) ** 0.5

    steps = list(zip(images.split(1), labels.split(1), strict=True))
    steps.sort(key=lambda step: distance(step[0]), reverse=True)
    errors: dict[str, tuple[list[float], list[float]]] = {}
    for x, y in steps[:keep]:
        exact = _training_step(copy.deepcopy(plain).double(), x.double(), y)
        for j, model in enumerate((plain, fused)):
            found = _training_step(copy.deepcopy(model), x, y)
            for kind, wanted in exact.items():
                errors.setdefault(kind, ([], []))[j].append(error(found[kind], wanted))
    return [Agreement(kind, *map(statistics.median, pair)) for kind, pair in errors.items()]


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of activations that a training step of ``model`` keeps for its backward pass.

    Every storage counts once. Parameters and buffers do not count.
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
    # the graph keeps every storage alive until here, so no address was used twice
    del outputs
    return sum(sizes.values())
