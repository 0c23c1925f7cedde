"""Every flag of ``fused-res train`` with its default, and how a run's settings come from them."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..cli import UsageError


def number(kind: type, least: float, most: float = float("inf"), above: bool = False) -> Callable:
    """What parses a number that is at least (or above) ``least`` and at most ``most``."""
    words = f"{'above' if above else 'at least'} {least}" + (
        f" and at most {most}" if most < float("inf") else ""
    )

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or (above and value == least):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {noun} {words}")
        return value

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _flag(default: Any, help: str, free: bool = False, **keywords: Any) -> Any:
    metadata = {"help": help, "free": free, "keywords": keywords}
    return field(default=default, metadata=metadata)


def _count(default: int | None, help: str, least: int = 1, **keywords: Any) -> Any:
    return _flag(default, help, type=number(int, least), metavar="N", **keywords)


def _real(default: float | None, help: str, *limits: float, **keywords: Any) -> Any:
    return _flag(default, help, type=number(float, *limits, **keywords), metavar="X")


def _switch(default: bool, help: str) -> Any:
    return _flag(default, help, action=argparse.BooleanOptionalAction)


@dataclass(frozen=True)
class Settings:
    """What a run is made of. A field is a flag, ``model`` the positional argument.

    All but the ``free`` ones, which say where it runs, stay as they are when it is resumed.
    """

    model: str = _flag(
        "resnet20",
        "a name of fused_res.models, or torchvision:NAME, timm:NAME, package.module:NAME or "
        "file.py:NAME",
    )
    model_arg: tuple[tuple[str, Any], ...] = _flag(
        (), "an argument of the model; repeatable", action="append", type=_argument,
        metavar="KEY=VALUE",
    )  # fmt: skip
    data: str | None = _flag(None, "what to train on; default: digits, which needs no download")
    classes: tuple[str, ...] | None = _flag(
        None, "train on these classes alone", type=_names, metavar="A,B"
    )
    size: int | None = _count(None, "pixels of an image's sides")
    images: int | None = _count(None, "use only this many images")
    epochs: int = _count(10, "passes over the training images")
    batch_size: int = _count(64, "images of a batch, of all processes together")
    optimizer: str = _flag("sgd", "torch.optim.SGD or AdamW", choices=("sgd", "adamw"))
    lr: float = _real(1e-2, "learning rate", 0)
    momentum: float = _real(0.9, "of sgd", 0, 1)
    weight_decay: float = _real(0.0, "of the optimizer", 0)
    l2: float = _real(0.0, "times the sum of squares of all parameters, added to the loss", 0)
    schedule: str = _flag(
        "none", "of the learning rate", choices=("none", "cosine", "step", "onecycle")
    )
    warmup: int = _count(0, "epochs of a learning rate that rises linearly", 0)
    dropout: float | None = _real(None, "the model's argument of that name", 0, 1)
    label_smoothing: float = _real(0.0, "of the cross entropy", 0, 1)
    ema: float | None = _real(None, "decay of an exponential moving average of the weights", 0, 1)
    amp: str = _flag("fp32", "autocast to this dtype", choices=("fp32", "bf16", "fp16"))
    grad_accumulation: int = _count(1, "batches of each step of the optimizer")
    clip_grad: float | None = _real(None, "largest norm of the gradients", 0, above=True)
    augment: bool = _switch(False, "shift, flip and cut out at random")
    crop: int = _count(4, "pixels of padding a random crop is taken from", 0)
    flip: bool = _switch(True, "mirror every other image")
    cutout: int = _count(0, "pixels of the sides of a square that is blanked", 0)
    compare: bool = _flag(
        False, "train the plain twin too: same weights, same batches", action="store_true"
    )
    plain: bool = _flag(False, "train the plain net instead of the fused", action="store_true")
    compile: bool = _flag(False, "torch.compile", action="store_true")
    channels_last: bool = _switch(True, "memory format of weights and images")
    sync_bn: bool = _flag(
        False, "BatchNorm by the statistics of all processes", action="store_true"
    )
    device: str = _flag("auto", "auto: a GPU", free=True, choices=("auto", "cpu", "cuda"))
    threads: int | None = _count(None, "PyTorch may use; default: its own choice", free=True)
    seed: int = _flag(
        0, "of weights, order, augmentation and dropout", type=number(int, 0, 2**63 - 1),
        metavar="N",
    )  # fmt: skip
    save_every: int | None = _count(
        None, "save after so many steps too, not only after epochs", free=True
    )

    def flags(self) -> dict[str, Any]:
        """Every flag, by its name on the command line without dashes in front, and its value."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of ``Settings``. What is not given is left out of the namespace, so
    that a resumed run takes it from its checkpoint."""
    for f in fields(Settings):
        keywords = dict(f.metadata["keywords"])
        help = f.metadata["help"]
        if f.default not in (None, ()) and "default:" not in help:
            help += f" (default: {f.default})"
        spelled = [_spelled(f.name)]
        if f.name == "model":
            spelled, keywords = ["model"], {"nargs": "?", "metavar": "MODEL"}
        elif f.name == "amp":
            spelled.append("--dtype")
        parser.add_argument(*spelled, default=argparse.SUPPRESS, help=help, **keywords)


def of(args: argparse.Namespace, saved: Settings | None = None, where: str = "") -> Settings:
    """The settings that a command line asks for.

    Args:
        args: what the parser found.
        saved: those of the run that is resumed, from file ``where``.

    Raises:
        UsageError: flags contradict each other or ``saved``.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if "model_arg" in given:
        given["model_arg"] = tuple(given["model_arg"])
    for f in fields(Settings):
        if saved is None or f.name not in given or f.metadata["free"]:
            continue
        value, before = given[f.name], getattr(saved, f.name)
        if value != before:
            flag = "MODEL" if f.name == "model" else _spelled(f.name)
            raise UsageError(
                f"{flag} is {value!r}, but {where} was trained with {before!r}: a resumed run "
                f"keeps its settings"
            )
    settings = replace(saved or Settings(), **given)
    if settings.compare and settings.plain:
        raise UsageError("--compare and --plain must not be given together")
    if settings.warmup and settings.warmup >= settings.epochs:
        raise UsageError(f"--warmup {settings.warmup} must be less than --epochs {settings.epochs}")
    return settings
