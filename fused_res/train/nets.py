"""The models of a run, by the name and arguments of its command."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..backends import BackendUnavailable
from ..cli import UsageError
from ..nn.blocks import FusedForward
from ..surgery import fuse_
from ..tuning import named_model
from .settings import Settings


def arguments(settings: Settings, classes: int) -> dict[str, Any]:
    """What the model is made with."""
    dropout = {} if settings.dropout is None else {"dropout": settings.dropout}
    return {"num_classes": classes, **dropout, **dict(settings.model_arg)}


def make(
    name: str, arguments: dict[str, Any], fused: bool, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with fresh weights, the same for each ``seed``, fused or plain; and what the log
    says of it.

    Raises:
        UsageError: there is no such model, or it does not take the arguments.
    """
    torch.manual_seed(seed)
    if ":" in name:
        model = copy.deepcopy(named_model(name, **arguments))
    else:
        try:
            model = models.create(name, fused=fused, **arguments)
        except (TypeError, ValueError) as error:
            raise UsageError(f"MODEL {name}: {error}") from error
    report = None
    if fused:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fuse_ found no residual block")
            report = fuse_(model)
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "fused": [n for n, m in model.named_modules() if isinstance(m, FusedForward)],
        "skipped": [] if report is None else [list(pair) for pair in report.skipped],
    }


@torch.no_grad()
def check(model: nn.Module, name: str, images: Tensor, classes: int) -> None:
    """That ``model`` takes images (N, 3, H, W) and gives (N, ``classes``)."""
    mode = model.training
    try:
        found = model.eval()(images)
    except BackendUnavailable:
        raise
    except Exception as error:
        raise UsageError(
            f"MODEL {name} does not take images of {tuple(images.shape[1:])}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(mode)
    shape = tuple(getattr(found, "shape", ()))
    if shape != (len(images), classes):
        raise UsageError(
            f"MODEL {name} must give {(len(images), classes)} for {len(images)} images, gave "
            f"{shape or type(found).__name__}"
        )
