"""Measures what steps of training run, before they are taken (``dispatch.first_use``).

Where several processes train together nothing is measured in a forward: the others would wait in
the middle of a step. So the first process measures before, and the others read its table.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..dispatch import first_use, inference_conv, user_timings
from ..nn.blocks import FusedForward
from . import checkpoint
from .place import Place

# A call is measured when it is seen for the second time.
STEPS = 2


def measure(
    models: Iterable[nn.Module],
    images: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    place: Place,
) -> None:
    """Measures the calls of training steps on the place's device, if ``auto`` follows measurements
    there. Every process must call it, with models that are not wrapped. The models and the random
    number generators stay as they are.

    Args:
        models: from images to (N, ``classes``). Those without fused blocks have no such calls.
        images: size of a batch of all processes together, (N, 3, H, W).
        dtype: of autocast; float32: none.
        layout: memory format of weights and images.
    """
    if not first_use.covers(place.device):
        return
    if place.rank == 0 and first_use.settings.autotune != "0":
        sizes = {len(place._replace(rank=r).share(torch.arange(images[0])))
                 for r in range(place.world)}  # fmt: skip
        before = checkpoint.rng_state()
        try:
            with first_use.alone():
                for model in models:
                    if any(isinstance(m, FusedForward) for m in model.modules()):
                        one = copy.deepcopy(model).to(place.device, memory_format=layout).train()
                        for n in sorted(sizes):
                            _train(one, (n, *images[1:]), classes, dtype, layout, place.device)
        finally:
            checkpoint.set_rng_state(before)
    if place.world > 1:
        place.gather(None)  # the others wait here for the first
        user_timings.forget()
        inference_conv.forget()


def _train(
    model: nn.Module,
    shape: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    """Forward and backward of some steps, on random images. Weights stay as they are."""
    x = torch.randn(shape, device=device).to(memory_format=layout)
    y = torch.randint(classes, shape[:1], device=device)
    for _ in range(STEPS):
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        model.zero_grad()
