"""``fused-res demo``: swap the blocks of two plain PyTorch nets, train both kinds side by side."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import platform
import time
from pathlib import Path

import torch

from ..cli import CommandError, table

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
AGREEMENT_IMAGES = 20


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, default: int | None, text: str) -> None:
        parser.add_argument(flag, type=_positive, default=default, metavar="N", help=text)

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

    from .. import fuse_
    from ..cli import doctor
    from ..dispatch import backends
    from ..models import create
    from . import compare, data, page, train

    start = time.perf_counter()
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        digits = data.load(args.images, args.seed)
        print(
            f"scikit-learn's digits as 32x32 colour images: "
            f"{len(digits.train_labels)} to train on, {len(digits.val_labels)} to validate"
        )
        plans = [
            (
                f"ResNet-18, width {args.width}",
                "CIFAR stem, four stages of two basic blocks.",
                lambda: create("resnet18_cifar", fused=False, width=args.width, init="default"),
                lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
                args.batch,
                args.epochs,
                None,
            ),
            (
                f"NetResDeep, {args.blocks} blocks",
                f"{args.blocks} separate single-convolution blocks, 32 channels on 16x16 maps.",
                lambda: create("net_res_deep", fused=False, n_blocks=args.blocks),
                lambda parameters: torch.optim.Adam(parameters, lr=4e-5),
                max(args.batch // 2, 2),
                args.deep_steps,
                args.deep_steps,
            ),
        ]
        reports = []
        for name, what, make, make_optimizer, batch, epochs, limit in plans:
            torch.manual_seed(args.seed)
            plain = make().to(memory_format=torch.channels_last)
            fused = copy.deepcopy(plain)
            swapped = fuse_(fused)
            some = digits.train_images[:AGREEMENT_IMAGES], digits.train_labels[:AGREEMENT_IMAGES]
            agreement = compare.agreement(plain, fused, *some)
            images = digits.train_images[:batch]
            saved = compare.saved_bytes(plain, images), compare.saved_bytes(fused, images)
            curves = train.train(
                name,
                (plain, fused),
                make_optimizer,
                digits,
                batch,
                epochs,
                limit,
                args.seed,
                args.seconds,
            )
            report = page.Report(
                name, what, swapped.fused, swapped.skipped, agreement, curves, saved, batch
            )
            reports.append(report)
            print(f"\n{name}: {page.fused_line(report)}")
            for block, reason in swapped.skipped:
                print(f"  skipped {block}: {reason}")
            print(table(page.AGREEMENT_HEADER, page.agreement_rows(report), " rrr"), end="\n\n")
            print(table(page.RESULT_HEADER, page.result_rows(report), " rrr"), flush=True)
        facts = doctor.report()
    finally:
        torch.set_num_threads(threads)
    used = {backends.choose("bn_act", None, digits.train_images)}
    figure = page.plot(reports)
    rows = [
        *((k, v) for k, v in facts["versions"].items() if v),
        ("platform", platform.platform()),
        ("processor", f"{facts['machine']['processor']}, {facts['machine']['cores']} cores"),
        ("threads", facts["machine"]["threads"]),
        ("fused blocks ran on", f"backend {', '.join(used)}"),
        ("instruction set", facts["machine"]["instruction_set"] or "-"),
        ("layout, dtype", "channels_last, float32"),
    ]
    files = {
        args.out / "demo.png": figure,
        args.out / "demo.html": page.page(reports, figure, digits.val_pictures[:16], rows).encode(),
    }
    print(f"\n{page.RESULT_NOTE}\n{page.AGREEMENT_NOTE}\n")
    for path, content in files.items():
        path.write_bytes(content)
        print(f"wrote {path}")
    print(f"finished in {time.perf_counter() - start:.0f} s")
    return 0
