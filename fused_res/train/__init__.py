"""``fused-res train``: trains a model, fused or plain or both, from a command line."""

from __future__ import annotations

import argparse
import contextlib
import platform
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..cli import CommandError, UsageError, table, threads
from ..dispatch.user_timings import processor
from ..version import __version__
from . import checkpoint, data, graphed, nets, report, trust
from . import settings as flags
from .engine import Interrupted, Trainer
from .lock import locked
from .log import Log, now
from .place import Place, at, launched, rank
from .settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("train-out"), metavar="DIR",
                        help="where everything is written (default: train-out)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="continue from DIR/last.pt, if it is there")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
                        help="begin anew where DIR holds a run")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite must not be given together")
    with contextlib.nullcontext() if rank() else locked(args.out):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    last, state = args.out / "last.pt", None
    if args.resume and last.exists():
        state = checkpoint.load(last)
    elif last.exists() and not args.overwrite:
        raise UsageError(
            f"{last} is there: --resume continues from it, --overwrite begins anew, --out names "
            f"another folder"
        )
    settings = flags.of(args, None if state is None else state["settings"], str(last))
    if state is not None:
        trust.check(settings, vars(args), str(last), _resuming(settings, args.out))
    with threads(settings.threads), at(settings.device) as place:
        graphed.check(settings, place)
        return _train(settings, args.out, state, place)


def _resuming(settings: Settings, out: Path) -> str:
    """The command that continues a run."""
    command = "torchrun ... -m fused_res" if launched() else "fused-res"
    words = trust.words(settings)
    return f"{command} train {words + ' ' if words else ''}--out {shlex.quote(str(out))} --resume"


def _train(settings: Settings, out: Path, state: dict[str, Any] | None, place: Place) -> int:
    last = out / "last.pt"
    pictures = data.load_named(settings)
    if state is not None:
        _check_resumed(state, last, pictures, place)
    statistics = data.statistics(pictures.train_images)
    arguments = nets.arguments(settings, len(pictures.classes))
    kinds = settings.nets()
    models, about = {}, {}
    for kind in kinds:
        weights = None if state is None else state["nets"][kind]["model"]
        with nets.within(settings.model, weights, str(last)):
            models[kind], about[kind] = nets.make(
                settings.model, arguments, kind == "fused", settings.seed
            )
    first = models[kinds[0]]
    nets.check(first, settings.model, pictures.train_images, statistics, len(pictures.classes))
    if settings.compare:  # a user's model may draw its weights without the seed
        models["plain"].load_state_dict(models["fused"].state_dict())
    kept = {
        "arguments": arguments,
        "classes": list(pictures.classes),
        "mean": statistics[0],
        "std": statistics[1],
        "data": pictures.fingerprint,
    }
    trainer = Trainer(models, pictures, settings, place, out, kept)
    if state is not None:
        trainer.load(state, str(last))
    try:
        with contextlib.nullcontext() if place.rank else _log(out, state) as log:
            if log is not None and log.size == 0:
                log.write(_start(settings, arguments, pictures, place, about))
            if log is not None and state is not None:
                log.write({"event": "resume", "time": now(), "epoch": state["epoch"]})
            results = trainer.run(log)
    except Interrupted:
        if place.rank == 0:
            message = f"saved in {last}; to go on: {_resuming(settings, out)}"
            print(message, file=sys.stderr)
        return 130
    if place.rank == 0:
        _finish(out, results, about)
    return 0


def _check_resumed(state: dict[str, Any], last: Path, pictures: data.Data, place: Place) -> None:
    if state["data"] != pictures.fingerprint:
        raise CommandError(
            f"{last} was trained on other data: its fingerprint is {state['data']:.12}, that of "
            f"--data now {pictures.fingerprint:.12}"
        )
    if state["classes"] != list(pictures.classes):
        raise CommandError(
            f"{last}: classes are not those of --data: {', '.join(pictures.classes)}"
        )
    _check_log(last, state["log"])
    if state["processes"] != place.world:
        raise UsageError(
            f"{last} was trained by {state['processes']} processes, now there are {place.world}"
        )


def _check_log(last: Path, size: int) -> None:
    """Checks that a line of the log ends at byte ``size``, where resuming cuts the log off."""
    with contextlib.suppress(FileNotFoundError), open(last.with_name("log.jsonl"), "rb") as file:
        file.seek(size - 1)
        if file.read(1) not in (b"\n", b""):
            raise checkpoint.CheckpointError(
                f"{last}: log is {size}: no line of the log ends there"
            )


def _log(out: Path, state: dict[str, Any] | None) -> contextlib.closing[Log]:
    """The log, cut off where ``state`` was saved."""
    out.mkdir(parents=True, exist_ok=True)
    if state is None:
        for name in ("last.pt", "best.pt", "report.html"):
            (out / name).unlink(missing_ok=True)
    size, epoch = (0, 0) if state is None else (state["log"], state["epoch"])
    return contextlib.closing(Log(out, size, epoch))


def _start(
    settings: Settings,
    arguments: dict[str, Any],
    pictures: data.Data,
    place: Place,
    about: dict[str, Any],
) -> dict[str, Any]:
    """The first record of a log."""
    if place.device.type == "cuda":
        device = torch.cuda.get_device_name(place.device)
    else:
        device = f"{processor()}, {torch.get_num_threads()} threads"
    return {
        "event": "start",
        "time": now(),
        "model": settings.model,
        "arguments": arguments,
        "data": {
            "name": pictures.name,
            "classes": list(pictures.classes),
            "train": len(pictures.train_labels),
            "val": len(pictures.val_labels),
            "size": pictures.train_images.shape[-1],
        },
        "settings": settings.flags(),
        "versions": {
            "fused_res": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": device if place.world == 1 else f"{place.world} x {device}",
        "nets": about,
    }


def _finish(out: Path, results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """The summary, on stdout and as a page."""
    records = report.read_log(out / "log.jsonl")
    rows = []
    for end in results:
        net = end["net"]
        speeds = [r["images_per_second"] for r in records
                  if r["event"] == "epoch" and r["net"] == net]  # fmt: skip
        rows.append(
            [
                net,
                f"{about[net]['parameters']:,}",
                len(about[net]["fused"]),
                f"{end['val_loss']:.4f}",
                f"{end['train_accuracy']:.2%}",
                f"{end['val_accuracy']:.2%}",
                f"{median(speeds):.0f}" if speeds else "-",
            ]
        )
        if "val_accuracy_ema" in end:
            rows.append([f"{net}, averaged", "", "", "", "", f"{end['val_accuracy_ema']:.2%}", ""])
    header = ["net", "parameters", "fused blocks", "loss", "training", "validation", "images/s"]
    print(table(header, rows, "lrrrrrr"))
    written = ["last.pt", "best.pt", "log.jsonl"]
    try:
        page = report.page(records)
    except ImportError as error:
        print(f"no report.html: {error}", file=sys.stderr)
    else:
        with checkpoint.replacing(out / "report.html") as file:
            file.write(page.encode())
        written.append("report.html")
    print(f"wrote {', '.join(str(out / name) for name in written)}")
