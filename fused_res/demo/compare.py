"""Do a plain net and its fused twin compute the same? Errors against float64, and saved memory."""

from __future__ import annotations

import copy
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Agreement(NamedTuple):
    """Errors against float64: norm of the difference over norm, of all tensors of a kind."""

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
    """Keeps the smallest absolute value that any ReLU gets."""

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
    """Compares training steps of copies of both with those of a float64 copy of ``plain``.

    A step is of one image, always from the same weights. Of all images the ``keep`` count whose
    ReLUs, in float64, stay furthest from 0: where one is within rounding of 0, float32 may flip
    it, in PyTorch's ops as in ours, and the gradients' error then tells of that chance alone. The
    median error is taken. The eval outputs are those after the running statistics' update.
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
