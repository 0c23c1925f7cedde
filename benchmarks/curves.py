"""Trains nets on real images, with fused blocks and without: ``python benchmarks/curves.py``.

Both train each net from three seeds, which give the weights and the order of the images; PyTorch in
NCHW and in channels_last, which differ by rounding alone. In the mean fused nets may end no further
from PyTorch's nets than those are apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness.measure import reason
from harness.program import FORMATS
from harness.rows import NOTHING, RESULTS, environment, write_rows
from harness.suite import CL, DTYPES, FUSED, fused_backends
from report import plot
from suites import SUITES
from suites import curves as suite
from suites.curves import LAST, SEEDS
from suites.nets import cifar_resnet18, fused
from torch import nn

from fused_res.demo.data import Data, load
from fused_res.demo.train import batches
from fused_res.models import NetResDeep

STEPS = 200


@dataclass(frozen=True)
class Training:
    """``options``: of the optimizer; ``images``: how many to take, or None for all."""

    make: Callable[[], nn.Module]
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, float] = field(default_factory=lambda: {"lr": 5e-3, "momentum": 0.9})
    batch: int = 32
    images: int | None = None


TRAININGS = {
    "ResNet-18, width 16": Training(partial(cifar_resnet18, 16)),
    # SGD has reached a loss of 2.1 after 200 steps at a rate of 3e-5, and 1e-4 kills every ReLU of
    # the head; Adam has reached 0.6
    "100 blocks": Training(partial(NetResDeep, 32, 100), torch.optim.Adam, {"lr": 1e-4}),
}
# to see that everything runs
QUICK = {
    "ResNet-18, width 4": Training(partial(cifar_resnet18, 4), batch=8, images=60),
    "3 blocks": Training(partial(NetResDeep, 8, 3), torch.optim.Adam, {"lr": 1e-4}, 8, 60),
}


def train(
    training: Training,
    data: Data,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    layout: str = CL,
    backend: str | None = None,
) -> dict:
    """The fields of a row: every step's loss, and what the net is worth in the end.

    Args:
        data: on the device to train on.
        dtype: of the convolutions: autocast, where it is not float32.
        backend: of the fused blocks; default: PyTorch's own.

    Raises:
        FloatingPointError: a loss is infinite or NaN.
    """
    device = data.train_images.device
    torch.manual_seed(seed)
    net = training.make().to(device, memory_format=FORMATS[layout])
    if backend is not None:
        fused(net, backend)
    optimizer = training.optimizer(net.parameters(), **training.options)

    def logits(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return net(images.to(memory_format=FORMATS[layout])).float()

    net.train()
    losses = []
    for images, labels in batches(data, training.batch, steps, steps, seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    net.eval()
    with torch.no_grad():
        found = torch.cat([logits(part) for part in data.val_images.split(128)])
    losses = torch.stack(losses).tolist()
    val_loss = F.cross_entropy(found, data.val_labels).item()
    for step, loss in enumerate([*losses, val_loss]):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss after {step} steps is {loss}")
    last = losses[-LAST:]
    return {
        "losses": [round(loss, 6) for loss in losses],
        "train_loss": sum(last) / len(last),
        "val_loss": val_loss,
        "val_accuracy": (found.argmax(1) == data.val_labels).double().mean().item(),
    }


def runs(device: str, dtype: torch.dtype) -> list[tuple[str, dict]]:
    """(candidate, arguments of ``train``) of every curve of a net."""
    kinds = [("eager", {"layout": layout}) for layout in (CL, "NCHW")]
    kinds += [(FUSED + name, {"backend": name}) for name in fused_backends(device, dtype)]
    return [(name, {**how, "seed": seed}) for name, how in kinds for seed in SEEDS]


def rows_of(
    name: str, training: Training, data: Data, steps: int, dtype: torch.dtype, where: dict
) -> list[dict]:
    """A row for every curve of a net. One that cannot be trained says why in ``refused``."""
    out = []
    for candidate, arguments in runs(data.train_images.device.type, dtype):
        try:
            found = {**train(training, data, steps, dtype=dtype, **arguments), "refused": None}
        except Exception as error:  # one that breaks must not take the others' rows with it
            found = {"losses": [], "refused": reason(error)}
        row = {
            **NOTHING, "suite": "curves", "workload": name, "layout": arguments.get("layout", CL),
            "shape": [training.batch, *data.train_images.shape[1:]],
            "dtype": str(dtype).removeprefix("torch."), "rival": candidate, "direction": "curve",
            "allocator": "cuda" if data.train_images.is_cuda else "default", "rounds": 1,
            "config": {"optimizer": training.optimizer.__name__, **training.options},
            "speedup_over": {}, "seed": arguments["seed"], **found, **where,
        }  # fmt: skip
        out.append(row)
        print(suite.line(row), flush=True)
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--net", default="", metavar="SUBSTR", help="nets named so only")
    add("--dtype", choices=("fp32", "bf16"), help="default: both")
    add("--steps", type=int, help=f"default {STEPS}; quick 2")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--quick", action="store_true", help="tiny nets: shows that all runs")
    words = "folder of <device>/curves.json and curves.png; default benchmarks/results"
    add("--out", type=Path, help=f"{words}, and nothing with --quick, --net, --dtype or --steps")
    args = parser.parse_args(argv)
    if args.out is None and not (args.quick or args.net or args.dtype or args.steps):
        args.out = RESULTS
    args.steps = args.steps if args.steps is not None else 2 if args.quick else STEPS
    if args.steps < 1 or args.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    if not importlib.util.find_spec("sklearn"):
        parser.error('the images are of scikit-learn: pip install "fused_res[demo]"')
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    known = QUICK if args.quick else TRAININGS
    trainings = {name: t for name, t in known.items() if args.net in name}
    if not trainings:
        print(f"no net's name contains {args.net!r}: {', '.join(known)}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    where = environment(args.device)
    rows: list[dict] = []
    for name, training in trainings.items():
        data = Data(*(t.to(args.device) for t in load(training.images)))
        for dtype in [args.dtype] if args.dtype else ["fp32", "bf16"]:
            rows += rows_of(name, training, data, args.steps, DTYPES[dtype], where)
            if args.out is not None:
                write_rows(args.out / where["device"]["slug"] / "curves.json", rows)
    verdicts = suite.targets(rows)
    for met, what in verdicts:
        print(f"{'pass' if met else 'FAIL'}  {what}")
    if args.out is None:
        print("nothing written (see --out)")
    else:
        plot.write(args.out / where["device"]["slug"], SUITES)
    # of tiny nets that have taken two steps the figures mean nothing
    failed = any(row["refused"] for row in rows) if args.quick else not all(m for m, _ in verdicts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
