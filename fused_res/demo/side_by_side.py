"""Runs the demo: each net beside its fused twin, then a page with a plot."""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from ..cli import doctor, table, threads
from ..dispatch import backends
from ..fuse.swap import fuse_
from ..models import create
from . import compare, data, page, train

AGREEMENT_IMAGES = 20


class _Net(NamedTuple):
    """A net to train. ``limit``: the largest number of steps; None: ``epochs`` decides."""

    name: str
    about: str
    make: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    batch: int
    epochs: int
    limit: int | None


def _nets(args: argparse.Namespace) -> list[_Net]:
    return [
        _Net(
            f"ResNet-18, width {args.width}",
            "CIFAR stem, four stages of two basic blocks.",
            lambda: create("resnet18_cifar", fused=False, width=args.width, init="default"),
            lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
            args.batch,
            args.epochs,
            None,
        ),
        _Net(
            f"NetResDeep, {args.blocks} blocks",
            f"{args.blocks} separate single-convolution blocks, 32 channels on 16x16 maps.",
            lambda: create("net_res_deep", fused=False, n_blocks=args.blocks),
            lambda parameters: torch.optim.Adam(parameters, lr=4e-5),
            max(args.batch // 2, 2),
            args.deep_steps,
            args.deep_steps,
        ),
    ]


def _compared(net: _Net, digits: data.Data, seed: int, seconds: float) -> page.Report:
    """The report of a net and its fused twin: agreement, saved memory and training."""
    torch.manual_seed(seed)
    plain = net.make().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    swapped = fuse_(fused)
    some = digits.train_images[:AGREEMENT_IMAGES], digits.train_labels[:AGREEMENT_IMAGES]
    agreement = compare.agreement(plain, fused, *some)
    images = digits.train_images[: net.batch]
    saved = compare.saved_bytes(plain, images), compare.saved_bytes(fused, images)
    how = net.batch, net.epochs, net.limit, seed, seconds
    curves = train.train(net.name, (plain, fused), net.optimizer, digits, *how)
    blocks = swapped.fused, swapped.skipped
    return page.Report(net.name, net.about, *blocks, agreement, curves, saved, net.batch)


def _print(report: page.Report) -> None:
    print(f"\n{report.name}: {page.fused_line(report)}")
    for block, reason in report.skipped:
        print(f"  skipped {block}: {reason}")
    print(table(page.AGREEMENT_HEADER, page.agreement_rows(report), " rrr"), end="\n\n")
    print(table(page.RESULT_HEADER, page.result_rows(report), " rrr"), flush=True)


def _facts(digits: data.Data) -> list[tuple[str, object]]:
    """The versions and the machine of this run."""
    found = doctor.report()
    machine = found["machine"]
    return [
        *((k, v) for k, v in found["versions"].items() if v),
        ("platform", platform.platform()),
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("threads", machine["threads"]),
        ("fused blocks ran on", f"backend {backends.choose('bn_act', None, digits.train_images)}"),
        ("instruction set", machine["instruction_set"] or "-"),
        ("layout, dtype", "channels_last, float32"),
    ]


def demo(args: argparse.Namespace) -> None:
    """Trains the nets, prints the results, and writes the plot and the page into ``args.out``."""
    start = time.perf_counter()
    with threads(args.threads):
        digits = data.load(args.images, args.seed)
        print(
            f"scikit-learn's digits as 32x32 colour images: "
            f"{len(digits.train_labels)} to train on, {len(digits.val_labels)} to validate"
        )
        reports = []
        for net in _nets(args):
            reports.append(_compared(net, digits, args.seed, args.seconds))
            _print(reports[-1])
        facts = _facts(digits)
    figure = page.plot(reports)
    text = page.page(reports, figure, digits.val_pictures[:16], facts)
    print(f"\n{page.RESULT_NOTE}\n{page.AGREEMENT_NOTE}\n")
    for name, content in (("demo.png", figure), ("demo.html", text.encode())):
        (args.out / name).write_bytes(content)
        print(f"wrote {args.out / name}")
    print(f"finished in {time.perf_counter() - start:.0f} s")
