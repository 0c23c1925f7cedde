"""Decides which settings of a checkpoint are trusted. The file may come from a stranger, so only
the command line may name things that run code, open another file or use the network."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Container
from typing import Any

from torch import nn

from ..cli import UsageError
from .checks import shown
from .settings import Settings

# Arguments of other libraries' models that only shape a net. Left out on purpose: pretrained,
# weights, checkpoint_path, pretrained_cfg, cache_dir, file, trust_remote_code, ...
ARGUMENTS = frozenset({
    "act_layer", "aux_logits", "avg_down", "base_width", "block_reduce_first", "cardinality",
    "channels", "drop_block_rate", "drop_path_rate", "drop_rate", "dropout", "global_pool",
    "groups", "growth_rate", "in_chans", "init_weights", "layers", "memory_efficient", "norm_layer",
    "num_classes", "output_stride", "progress", "replace_stride_with_dilation", "stem_type",
    "stem_width", "stochastic_depth_prob", "transform_input", "width_mult", "width_per_group",
    "zero_init_last", "zero_init_residual",
})  # fmt: skip
LARGEST = 2**20


def untrusted(settings: Settings) -> list[str]:
    """The fields of a checkpoint's ``settings`` that the command line must name again."""
    found = [] if is_known(settings.model) else ["model"]
    of_package = ":" not in settings.model  # fused_res.models take no argument that opens something
    if any(not (_shapes(value) and (of_package or key in ARGUMENTS) and not found)
           for key, value in settings.model_arg):  # fmt: skip
        found.append("model_arg")
    if settings.data not in (None, "digits"):
        found.append("data")
    return found


def is_known(model: str) -> bool:
    """Whether a library makes the model by name, reads no file, and runs no code but its own."""
    library, colon, name = model.partition(":")
    if not colon:
        return True  # fused_res.models looks it up in a list
    if not re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII):  # it may be of a hub, folder or file
        return False
    if library in ("torchvision", "timm"):
        return True
    if library == "transformers":  # its functions may download
        try:
            made = getattr(importlib.import_module(library), name, None)
        except Exception:
            return False
        return isinstance(made, type) and issubclass(made, nn.Module)
    return False


def _shapes(value: Any) -> bool:
    """Whether ``value`` is made of numbers that are not huge, switches, and names without paths."""
    if type(value) in (tuple, list):
        return len(value) <= 100 and all(map(_shapes, value))
    if type(value) is str:
        return re.fullmatch(r"\w{,40}", value, re.ASCII) is not None
    return value is None or (type(value) in (bool, int, float) and abs(value) <= LARGEST)


def words(settings: Settings, model: str = "") -> str:
    """The ``untrusted`` fields as words of a command line.

    Texts other than names are left out, so that nobody copies a stranger's code from a message and
    runs it.

    Args:
        model: the flag that names the model, and a space; default: it is positional.
    """
    found = []
    for field in untrusted(settings):
        if field == "model":
            found.append(model + _quoted(settings.model))
        elif field == "data":
            found.append(f"--data {_quoted(settings.data)}")
        else:
            for key, value in settings.model_arg:
                text = str(value) if _shapes(value) else "..."
                found.append(f"--model-arg {shlex.quote(f'{key}={text}'.replace(' ', ''))}")
    return " ".join(found)


def _quoted(text: str) -> str:
    return shlex.quote(text) if text.isprintable() else "..."


def check(settings: Settings, given: Container[str], where: str, command: str) -> None:
    """Checks that the command line names everything that a checkpoint must not name alone.

    Args:
        given: the fields that the command line names.
        where: the checkpoint's file.
        command: the command that accepts it, with the ``words``.

    Raises:
        UsageError: it does not; the message has the command.
    """
    missing = [field for field in untrusted(settings) if field not in given]
    if not missing:
        return
    values = {"model": settings.model, "model_arg": dict(settings.model_arg), "data": settings.data}
    named = " and ".join(
        f"{'MODEL' if f == 'model' else '--' + f.replace('_', '-')} "
        + (", ".join(values[f]) if f == "model_arg" else shown(values[f]))
        for f in missing
    )
    raise UsageError(
        f"{where} names {named}: a checkpoint alone runs no code and opens no other file; if that "
        f"is yours, name it again: {command}"
    )
