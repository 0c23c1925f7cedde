"""The model that a command line names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from functools import partial
from pathlib import Path

from torch import nn

from . import UsageError


def named_model(name: str, /, num_classes: int | None = None, **arguments: object) -> nn.Module:
    """The model that a command line names.

    Args:
        name: torchvision:NAME, timm:NAME, package.module:NAME or file.py:NAME.
        num_classes: passed to the function that makes the model, if it has this parameter.
        **arguments: passed to the function that makes the model.

    Raises:
        UsageError: there is no such model, or these arguments do not make it.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise UsageError(
            f"MODEL {name!r} must be torchvision:NAME, timm:NAME, package.module:NAME or "
            f"file.py:NAME"
        )
    zoo = source in ("torchvision", "timm")
    try:
        if source == "torchvision":
            make = partial(importlib.import_module("torchvision.models").get_model, attribute)
        elif source == "timm":
            make = partial(importlib.import_module("timm").create_model, attribute)
        elif source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            make = getattr(module, attribute)
        else:
            make = getattr(importlib.import_module(source), attribute)
        if isinstance(make, nn.Module):
            if arguments:
                raise TypeError(f"it is made already, and takes no {', '.join(arguments)}")
            model = make
        else:
            if num_classes and (zoo or "num_classes" in inspect.signature(make).parameters):
                arguments["num_classes"] = num_classes
            model = make(**arguments)
    except Exception as error:
        raise UsageError(f"MODEL {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL {name!r} must be or make a module, got {type(model).__name__}")
    return model
