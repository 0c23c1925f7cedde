"""``fused-res tune``: times the kernels that can run a model's convolutions here."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re

import torch

from ..dispatch import backends, inference_conv, tuning, user_timings
from ..env import settings
from ..serve.optimize import optimize_for_inference
from . import UsageError, table
from .model import named_model

_log = logging.getLogger("fused_res")


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be sizes as in 1x3x224x224")
    return tuple(map(int, text.split("x")))


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in backends.DTYPES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="torchvision:resnet18, timm:resnet50, package.module:NAME or file.py:NAME, a module "
        "or what makes one when it is called without arguments",
    )
    parser.add_argument("--shape", type=_shape, help="of the input: 1x3x224x224")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU"
    )
    parser.add_argument(
        "--train", action="store_true", help="for training: convolutions in blocks, both ways"
    )
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--list", action="store_true", help="list the tables that were written")
    parser.add_argument("--clear", action="store_true", help="remove them")


def _list() -> str:
    rows = []
    here = {user_timings.path_of(user_timings.made_by(device)) for device in user_timings.devices()}
    for path in user_timings.files():
        try:
            made, found, _ = user_timings.load(path)
            about = [made["device"], f"torch {made['torch']}", len(found)]
        except (OSError, ValueError, KeyError) as error:
            about = [f"cannot be used: {error}", "", ""]
        rows.append([path, *about, "yes" if path in here else "no"])
    return table(["table", "device", "versions", "calls", "used here"], rows)


@contextlib.contextmanager
def _progress():
    """Shows the log on stderr."""
    handler = logging.StreamHandler()
    level = _log.level
    if settings.log == "off":  # otherwise the package shows it
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


def run(args: argparse.Namespace) -> int:
    if args.list or args.clear:
        if args.list:
            print(_list())
        for path in user_timings.files() if args.clear else []:
            path.unlink()
            print(f"removed {path}")
        user_timings.forget()
        inference_conv.forget()
        return 0
    if args.model is None or args.shape is None:
        raise UsageError("MODEL and --shape must be given, or --list or --clear")
    model = named_model(args.model)
    reason = f"{args.dtype} runs in one way here"
    try:
        model = model.to(args.device, DTYPES[args.dtype])
        x = torch.randn(args.shape, dtype=DTYPES[args.dtype], device=args.device)
        if args.train:
            reason = tuning.why_not_training(x) or "no convolution of its blocks has a fused kernel"
        else:
            # covers the convolutions outside residual blocks too
            model = optimize_for_inference(model, x, tune=False, channels_last=args.channels_last)
        if args.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with _progress():
            report = tuning.tune(model, x, train=args.train)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    print(report if report.rows else f"nothing to choose: {reason}")
    for path in report.paths:
        print(f"wrote {path}")
    return 0
