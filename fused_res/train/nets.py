"""The models of a run, by the name and arguments of its command."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..cli import UsageError
from ..cli.model import named_model
from ..dispatch.backends import BackendUnavailable
from ..fuse.swap import fuse_
from ..nn.blocks import FusedForward
from .augment import prepare
from .checks import CheckpointError, is_like
from .settings import Settings
from .trust import is_known


def arguments(settings: Settings, classes: int) -> dict[str, Any]:
    """The arguments of the model."""
    dropout = {} if settings.dropout is None else {"dropout": settings.dropout}
    return {"num_classes": classes, **dropout, **dict(settings.model_arg)}


def make(
    name: str, arguments: dict[str, Any], fused: bool, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A model, fused or plain, and its facts for the log. The same ``seed`` gives the same weights.

    Raises:
        UsageError: there is no such model, or it does not take the arguments.
    """
    torch.manual_seed(seed)
    if ":" in name:
        model = copy.deepcopy(named_model(name, **arguments))
    else:
        try:
            model = models.create(name, fused=fused, **arguments)
        except BackendUnavailable:
            raise
        except Exception as error:  # arguments of any type and size can raise anything
            raise UsageError(f"MODEL {name}: {error}") from error
    skipped = []
    if fused:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fuse_ found no residual block")
            skipped = [list(pair) for pair in fuse_(model).skipped]
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "fused": [n for n, m in model.named_modules() if isinstance(m, FusedForward)],
        "skipped": skipped,
    }


@contextlib.contextmanager
def within(model: str, weights: dict[str, Any] | None, where: str) -> Iterator[None]:
    """Limits models made in this context to about the size of a checkpoint's ``weights``: the
    checkpoint's arguments could ask for more memory than the machine has.

    Args:
        model: its name; a model that only the command line may name has no limit.
        weights: None, without a checkpoint: no limit.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: a model is far larger, or cannot be made.
    """
    if weights is None or not is_known(model):
        yield
        return
    tensors = [t for t in weights.values() if is_like(t)]
    # factors of 4 and 64: models replace modules that they made, and some modules have no weights
    left = {
        "elements": 2**20 + 4 * sum(min(t.numel(), t.untyped_storage().nbytes()) for t in tensors),
        "modules": 2**12 + 64 * len(tensors),
    }

    def count(what: str, found: int) -> None:
        left[what] -= found
        if left[what] < 0:
            raise ValueError(f"it has more {what} than the checkpoint has weights for")

    def tensor(module: nn.Module, name: str, t: Tensor) -> None:
        count("elements", 0 if nn.parameter.is_lazy(t) else t.numel())

    hooks = [
        nn.modules.module.register_module_parameter_registration_hook(tensor),
        nn.modules.module.register_module_module_registration_hook(lambda *_: count("modules", 1)),
    ]
    try:
        yield
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check(
    model: nn.Module, name: str, pictures: Tensor, statistics: tuple[Tensor, Tensor], classes: int
) -> None:
    """Checks that ``model`` maps pictures (N, 3, H, W), uint8, to (N, ``classes``)."""
    images = prepare(pictures[:2], *statistics, None, None)
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
