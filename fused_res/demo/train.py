"""Trains a plain net and its fused twin side by side on the same batches."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data


class Curve(NamedTuple):
    """The training of one net: loss and seconds of each step, and the accuracy at the end.

    planned: the number of steps without a limit of time.
    """

    losses: list[float]
    seconds: list[float]
    train_accuracy: float
    val_accuracy: float
    planned: int

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    start = time.perf_counter()
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - start


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 128) -> float:
    """The share of images that ``model`` in eval mode gets right."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(batch)])
    return (found == labels).float().mean().item()


def batches(
    data: Data, batch: int, epochs: int, limit: int | None, seed: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Whole batches in a new order every epoch, at most ``limit`` of them in all."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        for part in order.split(batch):
            if len(part) < batch or done == limit:
                break
            done += 1
            yield data.train_images[part], data.train_labels[part]


def train(
    name: str,
    models: tuple[nn.Module, nn.Module],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    data: Data,
    batch: int,
    epochs: int,
    limit: int | None,
    seed: int,
    budget: float,
) -> tuple[Curve, Curve]:
    """Trains both models in place on the same batches, taking turns at every step.

    With turns, noise of the machine affects both; the first one alternates. Training stops early
    once both together have taken ``budget`` seconds.
    """
    from tqdm import tqdm

    steps = list(batches(data, batch, epochs, limit, seed))
    optimizers = [make_optimizer(model.parameters()) for model in models]
    losses: tuple[list[float], list[float]] = ([], [])
    seconds: tuple[list[float], list[float]] = ([], [])
    for model in models:
        model.train()
    interactive = sys.stderr.isatty()
    bar = tqdm(steps, desc=name, unit="step", disable=not interactive)
    for i, (images, labels) in enumerate(bar):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            loss, elapsed = _step(models[j], optimizers[j], images, labels)
            losses[j].append(loss)
            seconds[j].append(elapsed)
        latest = f"loss {losses[0][-1]:.3f} plain, {losses[1][-1]:.3f} fused"
        bar.set_postfix_str(latest, refresh=False)
        if not interactive and (i + 1) % max(len(steps) // 4, 1) == 0:
            print(f"{name}: step {i + 1} of {len(steps)}, {latest}", file=sys.stderr, flush=True)
        if sum(map(sum, seconds)) > budget:
            break
    bar.close()
    return tuple(
        Curve(
            losses[j],
            seconds[j],
            accuracy(model, data.train_images[:500], data.train_labels[:500]),
            accuracy(model, data.val_images, data.val_labels),
            len(steps),
        )
        for j, model in enumerate(models)
    )
