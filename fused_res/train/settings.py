"""Every flag of ``fused-res train`` with its default, and the settings that a run makes of them."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from ..cli import UsageError
from . import checks
from .checks import CheckpointError, Rule


def parsed(kind: type, least: float, most: float = float("inf"), above: bool = False) -> Callable:
    """A parser of numbers that are at least (or above) ``least`` and at most ``most``."""
    rule = checks.number(kind, least, most, above)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if not rule.accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule.words}")
        return value

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _flag(default: Any, help: str, rule: Rule, free: bool = False, **keywords: Any) -> Any:
    """``rule``: for the value, on the command line and in a checkpoint."""
    if default is None:
        rule = checks.maybe(rule)
    metadata = {"help": help, "rule": rule, "free": free, "keywords": keywords}
    return field(default=default, metadata=metadata)


def _count(
    default: int | None, help: str, least: int = 1, most: int = 2**31 - 1, free: bool = False
) -> Any:
    limits = int, least, most
    return _flag(default, help, checks.number(*limits), free, type=parsed(*limits), metavar="N")


def _real(default: float | None, help: str, *limits: float, **keywords: Any) -> Any:
    rule, parse = (make(float, *limits, **keywords) for make in (checks.number, parsed))
    return _flag(default, help, rule, type=parse, metavar="X")


def _choice(default: str, help: str, *values: str, **keywords: Any) -> Any:
    return _flag(default, help, checks.one_of(values), choices=values, **keywords)


def _switch(default: bool, help: str) -> Any:
    return _flag(default, help, checks.FLAG, action=argparse.BooleanOptionalAction)


def _on(help: str) -> Any:
    return _flag(False, help, checks.FLAG, action="store_true")


def _is_argument(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) == 2
        and checks.IDENTIFIER.accepts(value[0])
        and checks.is_plain(value[1])
    )


_ARGUMENTS = Rule(
    "a tuple of (name, value), at most 100, of Python's literals",
    lambda value: type(value) is tuple and len(value) <= 100 and all(map(_is_argument, value)),
)
CLASSES = checks.text(1000)  # the name of a class
_NAME = checks.text(4096)  # of a model or of data


@dataclass(frozen=True)
class Settings:
    """The settings of a run. Each field is a flag; ``model`` is the positional argument.

    A resumed run may change only the ``free`` fields, which say where it runs and where the data
    is.
    """

    model: str = _flag(
        "resnet20",
        "a name of fused_res.models, or torchvision:NAME, timm:NAME, package.module:NAME or "
        "file.py:NAME",
        _NAME,
    )
    model_arg: tuple[tuple[str, Any], ...] = _flag(
        (), "an argument of the model; repeatable", _ARGUMENTS, action="append", type=argument,
        metavar="KEY=VALUE",
    )  # fmt: skip
    data: str | None = _flag(
        None, "what to train on; default: digits, which needs no download", _NAME, free=True
    )
    classes: tuple[str, ...] | None = _flag(
        None, "train on these classes alone", checks.each(tuple, CLASSES, 2, 100_000), type=_names,
        metavar="A,B",
    )  # fmt: skip
    size: int | None = _count(None, "pixels of an image's sides", most=2**14)
    images: int | None = _count(None, "use only this many images")
    epochs: int = _count(10, "passes over the training images")
    batch_size: int = _count(64, "images of a batch, of all processes together")
    optimizer: str = _choice("sgd", "torch.optim.SGD or AdamW", "sgd", "adamw")
    lr: float = _real(1e-2, "learning rate", 0)
    momentum: float = _real(0.9, "of sgd", 0, 1)
    weight_decay: float = _real(0.0, "of the optimizer", 0)
    l2: float = _real(0.0, "times the sum of squares of all parameters, added to the loss", 0)
    schedule: str = _choice("none", "of the learning rate", "none", "cosine", "step", "onecycle")
    warmup: int = _count(0, "epochs of a learning rate that rises linearly", 0)
    dropout: float | None = _real(None, "the model's argument of that name", 0, 1)
    label_smoothing: float = _real(0.0, "of the cross entropy", 0, 1)
    ema: float | None = _real(None, "decay of an exponential moving average of the weights", 0, 1)
    amp: str = _choice("fp32", "autocast to this dtype", "fp32", "bf16", "fp16")
    grad_accumulation: int = _count(1, "batches of each step of the optimizer")
    clip_grad: float | None = _real(None, "largest norm of the gradients", 0, above=True)
    augment: bool = _switch(False, "shift, flip and cut out at random")
    crop: int = _count(4, "pixels of padding a random crop is taken from", 0)
    flip: bool = _switch(True, "mirror every other image")
    cutout: int = _count(0, "pixels of the sides of a square that is blanked", 0)
    compare: bool = _on("train the plain twin too: same weights, same batches")
    plain: bool = _on("train the plain net instead of the fused")
    compile: bool = _on("torch.compile")
    cuda_graph: bool = _on("on a GPU: capture a step of training once, then replay it")
    channels_last: bool = _switch(True, "memory format of weights and images")
    sync_bn: bool = _on("BatchNorm by the statistics of all processes")
    device: str = _choice("auto", "auto: a GPU", "auto", "cpu", "cuda", free=True)
    threads: int | None = _count(
        None, "PyTorch may use; default: its own choice", most=1024, free=True
    )
    seed: int = _count(0, "of weights, order, augmentation and dropout", 0, 2**63 - 1)
    save_every: int | None = _count(
        None, "save after so many steps too, not only after epochs", free=True
    )

    def flags(self) -> dict[str, Any]:
        """The value of every flag, by its name without the leading dashes."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def nets(self) -> list[str]:
        """The names of the nets that are trained, in order."""
        return ["plain"] if self.plain else ["fused", "plain"][: 1 + self.compare]


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``Settings``. Flags that are not given stay out of the
    namespace, so that a resumed run takes them from its checkpoint."""
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
        args: from the parser.
        saved: the settings of the resumed run, from file ``where``.

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
                f"{flag} is {value!r}, but {where} was trained with {checks.shown(before)}: a "
                f"resumed run keeps its settings"
            )
    settings = replace(saved or Settings(), **given)
    problem = _contradiction(settings)
    if problem:
        raise UsageError(problem)
    return settings


def restored(values: dict[str, Any], where: str) -> Settings:
    """The settings in a checkpoint.

    Raises:
        CheckpointError: a setting is missing, unknown, or breaks its rule; or two contradict each
            other.
    """
    values = {"cuda_graph": False, **values}  # checkpoints of before have none
    for f in fields(Settings):
        if f.name not in values:
            raise CheckpointError(f"{where} does not fit: {f.name} is missing or unknown")
        f.metadata["rule"].check(values[f.name], f"{where}: {f.name}")
    for name in values.keys() - {f.name for f in fields(Settings)}:
        raise CheckpointError(f"{where} does not fit: {checks.shown(name)} is missing or unknown")
    settings = Settings(**values)
    problem = _contradiction(settings)
    if problem:
        raise CheckpointError(f"{where}: {problem}")
    return settings


def _contradiction(settings: Settings) -> str | None:
    if settings.compare and settings.plain:
        return "--compare and --plain must not be given together"
    if settings.cuda_graph and settings.amp == "fp16":
        return "--cuda-graph and --amp fp16 must not be given together: a GradScaler may skip steps"
    if settings.cuda_graph and settings.compile:
        return "--cuda-graph and --compile must not be given together"
    if settings.warmup and settings.warmup >= settings.epochs:
        return f"--warmup {settings.warmup} must be less than --epochs {settings.epochs}"
    return None
