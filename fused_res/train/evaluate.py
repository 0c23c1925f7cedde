"""``fused-res evaluate``: the accuracy of the net in a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..cli import UsageError, table
from . import checkpoint, data, nets, trust
from .engine import accuracy, evaluate
from .place import at
from .settings import Settings, argument, parsed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="of fused-res train")
    parser.add_argument("--model", dest="named", metavar="MODEL",
                        help="what was trained, where a checkpoint alone may not name it: the "
                        "code of others")  # fmt: skip
    parser.add_argument("--model-arg", action="append", type=argument, metavar="KEY=VALUE",
                        help="its arguments, as in training; repeatable")  # fmt: skip
    parser.add_argument("--data", help="default: digits, if it was trained on them")
    parser.add_argument("--plain", action="store_true",
                        help="in plain PyTorch, the plain net if both were trained")  # fmt: skip
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction,
                        help="the average of the weights; default: if it is there")  # fmt: skip
    parser.add_argument("--batch-size", type=parsed(int, 1, 2**31 - 1), metavar="N",
                        help="default: that of the training")  # fmt: skip
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="auto: a GPU")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    state = checkpoint.load(args.checkpoint)
    settings = _settings(args, state["settings"])
    images = settings.images if args.data is None else None
    pictures = data.load_named(settings, classes=state["classes"], images=images)
    model, name = _model(args, settings, state)
    statistics, classes = (state["mean"], state["std"]), state["classes"]
    nets.check(model, settings.model, pictures.val_images, statistics, len(classes))
    splits = {
        "validation": (pictures.val_images, pictures.val_labels),
        "training": (pictures.train_images, pictures.train_labels),
    }
    found: dict[str, Any] = {"checkpoint": str(args.checkpoint), "net": name}
    with at(args.device) as place:
        model.to(place.device, memory_format=settings.layout)
        for part, (images, labels) in splits.items():
            images, labels = images.to(place.device), labels.to(place.device)
            loss, confusion = evaluate(
                model, images, labels, statistics, len(classes), settings, place
            )
            counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
            each = [right / images if images else None for right, images in counts]
            found[part] = {
                "images": len(labels),
                "loss": loss,
                "accuracy": accuracy(confusion),
                "classes": dict(zip(classes, each, strict=True)),
                "confusion": confusion.tolist(),
            }
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0


def _settings(args: argparse.Namespace, saved: Settings) -> Settings:
    """The checkpoint's settings; those that the command line names replace them.

    Raises:
        UsageError: the command line must name more.
    """
    given = {
        "model": args.named,
        "model_arg": None if args.model_arg is None else tuple(args.model_arg),
        "data": args.data,
        "batch_size": args.batch_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(saved, **given)
    words = trust.words(settings, "--model ")
    command = f"fused-res evaluate {shlex.quote(str(args.checkpoint))} {words}"
    trust.check(settings, given, str(args.checkpoint), command)
    return settings


def _model(
    args: argparse.Namespace, settings: Settings, state: dict[str, Any]
) -> tuple[nn.Module, str]:
    """The model with the weights that the command line asks for, and their name."""
    wanted = "plain" if args.plain else "fused"
    name = wanted if wanted in state["nets"] else next(iter(state["nets"]))
    where = f"{args.checkpoint}: nets.{name}"
    net = state["nets"][name]
    arguments = nets.arguments(settings, len(state["classes"]))
    with nets.within(settings.model, net["model"], str(args.checkpoint)):
        model, _ = nets.make(settings.model, arguments, not args.plain, settings.seed)
    average = net.get("average")
    if args.ema and average is None:
        raise UsageError(f"--ema: {args.checkpoint} was trained without")
    if average is None or args.ema is False:
        checkpoint.load_weights(model, net["model"], f"{where}.model")
        return model, name
    averaged = AveragedModel(model, use_buffers=True)
    checkpoint.load_weights(averaged, average, f"{where}.average")
    return averaged.module, f"{name}, averaged"


def _text(found: dict[str, Any]) -> str:
    splits = [key for key, value in found.items() if isinstance(value, dict)]
    rows = [["all", *(f"{found[part]['accuracy']:.2%}" for part in splits)]]
    for name in found[splits[0]]["classes"]:
        each = (found[part]["classes"][name] for part in splits)
        rows.append([name, *("-" if right is None else f"{right:.2%}" for right in each)])
    counts = ", ".join(f"{found[part]['images']} images of {part}" for part in splits)
    accuracies = table(["class", *splits], rows, "lrr")
    return f"{found['checkpoint']}, {found['net']}: accuracy on {counts}\n{accuracies}"
