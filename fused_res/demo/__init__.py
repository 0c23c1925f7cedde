"""``fused-res demo``: swap the blocks of two plain PyTorch nets, train both kinds side by side."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..cli import CommandError
from ..train.settings import parsed

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, default: int | None, text: str) -> None:
        parser.add_argument(flag, type=parsed(int, 1), default=default, metavar="N", help=text)

    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR",
                        help="where the plot and the page go (default: demo-out)")  # fmt: skip
    number("--epochs", 3, "epochs of the ResNet-18 (default: 3)")
    number("--deep-steps", 50, "steps of the deep net (default: 50)")
    number("--images", None, "use only this many images (default: all 1797)")
    number("--batch", 32, "batch of the ResNet-18; the deep net takes half (default: 32)")
    number("--width", 16, "channels of the ResNet-18's first stage (default: 16)")
    number("--blocks", 100, "blocks of the deep net (default: 100)")
    number("--seconds", 25, "end the training of a pair of nets after this long (default: 25)")
    number("--threads", None, "threads PyTorch may use (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")


def run(args: argparse.Namespace) -> int:
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise CommandError(f'the demo needs {", ".join(missing)}: pip install "fused_res[demo]"')
    if args.images is not None and args.images < 3 * args.batch:
        raise CommandError(
            f"--images {args.images} must be at least 3 times --batch, {args.batch}, "
            "so that there is a batch to train on"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    from .side_by_side import demo

    demo(args)
    return 0
