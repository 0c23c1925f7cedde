"""What ``fuse_`` makes of the ResNet-like models of torchvision, timm and transformers, and whether
they still compute the same: python benchmarks/coverage_table.py --write benchmarks/coverage.md

Random weights, small images. Each model is compared with its fused copy in float64 (a training step
and an eval step on the CPU kernels: outputs, gradients, statistics) and in float32 (eval mode,
channels_last, with the kernels that run here, of those that keep to the 1.5 times rule: the error
beside PyTorch's own), and its state_dict before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import json
import platform
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from suites.nets import torchvision_models
from torch import Tensor, nn

import fused_res
from fused_res import env
from fused_res.dispatch import backends
from fused_res.fuse.modules import is_norm
from fused_res.fuse.plan import PartialPlan

# timm's modules of nets that add a shortcut to convolutions with BatchNorm
TIMM = (
    "byoanet", "byobnet", "cspnet", "dla", "dpn", "hgnet", "hrnet", "inception_resnet_v2", "regnet",
    "res2net", "resnest", "resnet", "resnetv2", "senet", "sknet", "tresnet", "vovnet",
    "xception_aligned",
)  # fmt: skip
TOO_LARGE = ("regnety_2560",)  # 1.3 billion parameters: two copies fill this machine
TORCHVISION = ("resnet", "resnext", "wide_resnet", "regnet")
WIRING = 1e-9  # of float64, relatively
# else: so many times what PyTorch's own results differ by in another memory layout, whose norms
# have the same error: in float64 4 to 14 times that of the fused ones
CHAOS = 100
FACTOR = 1.5  # of PyTorch's own error
SIZES = 64, 128, 256, 224
DRAWS = 3, 15  # images in pairs; the more where the few, of ten numbers each, say too much
T = TypeVar("T")
LARGE = 250e6  # parameters: with more, no gradients


def _timm(name: str) -> Callable[[int], nn.Module]:
    import timm

    def make(size: int) -> nn.Module:
        try:  # attention with positions is made for one size
            return timm.create_model(name, num_classes=10, img_size=size)
        except TypeError:
            return timm.create_model(name, num_classes=10)

    return make


def _transformers(layer_type: str) -> Callable[[int], nn.Module]:
    import transformers

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.ResNetConfig(layer_type=layer_type, num_labels=10)
            self.model = transformers.ResNetForImageClassification(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    return lambda size: Output()


def models() -> Iterator[tuple[str, str, Callable[[int], nn.Module]]]:
    """(library, name, size -> model), of random weights."""
    vision = torchvision_models()
    for name in vision.list_models(module=vision):
        if name.startswith(TORCHVISION):
            yield "torchvision", name, lambda size, n=name: vision.get_model(n, num_classes=10)
    import timm
    from timm.models import _registry

    for name in timm.list_models():
        if _registry._model_to_module[name] in TIMM and name not in TOO_LARGE:
            yield "timm", name, _timm(name)
    for layer_type in ("basic", "bottleneck"):
        yield "transformers", f"ResNet, {layer_type}", _transformers(layer_type)


def _randomise(model: nn.Module) -> None:
    """Norms as after training: no branch starts as zero or one."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)


def _step(model: nn.Module, x: Tensor, train: bool, gradients: bool) -> dict[str, Tensor]:
    model.train(train)
    torch.manual_seed(1)  # the same masks of dropout
    x = x.clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        out = model(x)
    found = {"output": out.detach()}
    if gradients:
        parameters = {"x": x, **dict(model.named_parameters())}
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        grads = torch.autograd.grad(out, list(parameters.values()), dy, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                found[f"gradient of {name}"] = grad
    return found | {n: b.detach().clone() for n, b in model.named_buffers()}


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest of all tensors' differences, norm over norm; gradients that are zero but for
    rounding count in units of the largest gradient."""
    if a.keys() != b.keys():
        return float("inf")
    norms = {n: t.double().norm().item() for n, t in b.items()}
    largest = max((s for n, s in norms.items() if n.startswith("gradient")), default=0.0)
    worst = 0.0
    for name, t in b.items():
        unit = norms[name]
        if name.startswith("gradient"):
            unit = max(unit, 1e-9 * largest)
        if a[name].shape != t.shape or a[name].dtype != t.dtype:
            return float("inf")
        off = (a[name].double() - t.double()).norm().item()
        worst = max(worst, off / unit if unit else off)
        if off != off:
            return float("inf")
    return worst


def _identity(model: nn.Module) -> list:
    state = model.state_dict(keep_vars=True)
    return [(name, id(t), t.shape, t.dtype) for name, t in state.items()]


def _norms_of(block: nn.Module) -> int:
    """How many norms of a fused block run fused."""
    if isinstance(block.plan, PartialPlan):
        return block.plan.norms
    return sum(map(is_norm, block.modules()))


_ADD = re.compile(r"= [a-z_]\w* \+ (_part_\d+)$|(_part_\d+) \+=? [a-z_]", flags=re.M)


def _adds_left(block: nn.Module) -> int:
    """Adds of parts' outputs, used once, that their part does not do, though nothing is between."""
    if not isinstance(block.plan, PartialPlan):
        return 0
    source = re.sub(r";.*", "", block.plan.usual.source)  # what lets go of tensors
    names = [a or b for a, b in _ADD.findall(source)]
    uses = [len(re.findall(rf"(?<!self\.)\b{name}\b", source)) for name in names]
    return sum(count == 2 for count in uses)  # where it is made, and here


def _fuse(model: nn.Module) -> fused_res.FuseReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those in which nothing is
        return fused_res.fuse_(model)


def _both(model: nn.Module, run: Callable[[nn.Module], T]) -> tuple[T, T]:
    """What comes of the model fused, and as it is."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    made = []
    for fused in (True, False):
        if fused:
            _fuse(model)
        made.append(run(model))
        fused_res.unfuse_(model)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
    return tuple(made)


def _in_channels_last(model: nn.Module) -> nn.Module:
    for part in model.modules():  # not the whole: some have tensors of five dimensions
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)
    return model


def _made(make: Callable[[int], nn.Module]) -> tuple[nn.Module, int]:
    """The model, and a size of images that it takes: attention and pooling may want more."""
    for size in SIZES:
        try:
            model = make(size)
            _randomise(model)
            with torch.no_grad():
                copy.deepcopy(model).eval()(torch.randn(1, 3, size, size))
            return model, size
        except (RuntimeError, AssertionError, ValueError):
            if size == SIZES[-1]:
                raise


def _structure(model: nn.Module) -> dict:
    """What ``fuse_`` fuses, and that it keeps the state as it is."""
    before = _identity(model)
    report = _fuse(model)
    same_state = _identity(model) == before
    blocks = [model.get_submodule(n) for n in (*report.fused, *(n for n, _ in report.partly))]
    skipped = [model.get_submodule(n) for n, _ in report.skipped]
    why = {why.partition("; ")[2] or why for _, why in report.partly + report.skipped}
    row = {
        "blocks": len(blocks) + len(skipped),
        "whole": len(report.fused),
        "partly": len(report.partly),
        "skipped": len(skipped),
        "norms": sum(is_norm(m) for block in (*blocks, *skipped) for m in block.modules()),
        "fused_norms": sum(map(_norms_of, blocks)),
        "adds_left": sum(map(_adds_left, blocks)),
        "same_state": same_state,
        "reasons": sorted(why),
    }
    fused_res.unfuse_(model)
    return row


def _differences(exact: nn.Module, size: int, gradients: bool) -> dict:
    """Of a training and an eval step in float64, fused and not."""
    x = torch.randn(2, 3, size, size).double()
    # what auto takes for float64 are PyTorch's own ops, where nothing could differ
    kernels = "cpu" if backends.STATUS["cpu"] is None else "auto"
    off, own, differs = [], [], False
    for train in (True, False):
        step = partial(_step, x=x, train=train, gradients=gradients)
        with fused_res.backend(kernels):
            fused, plain = _both(exact, step)
        off.append(_difference(fused, plain))
        del fused
        if off[-1] > WIRING:
            own.append(_difference(step(_in_channels_last(copy.deepcopy(exact))), plain))
            differs |= not off[-1] <= CHAOS * own[-1]
        del plain
    found = {"difference": max(off), "of_layouts": max(own, default=None)}
    return found | {"differs": differs, "gradients": gradients}


def _ratio(model: nn.Module, exact: nn.Module, size: int) -> float:
    """The error in float32, in eval mode, over that of the model as it is."""
    errors: list[float] = []

    def outputs(net: nn.Module) -> list[Tensor]:
        return [_step(net, x.to(next(net.parameters())), False, False)["output"] for x in images]

    for draws in DRAWS:
        images = [torch.randn(2, 3, size, size) for _ in range(draws - len(errors))]
        images = [x.contiguous(memory_format=torch.channels_last) for x in images]
        for mine, other, right in zip(*_both(model, outputs), outputs(exact), strict=True):
            least = 6e-8 * right.norm().item()
            mine, other = ((y.double() - right).norm().item() for y in (mine, other))
            errors.append(mine / max(other, least))
        if median(errors) <= FACTOR:
            break
    return median(errors)


def cover(make: Callable[[int], nn.Module]) -> dict:
    """One model's row."""
    torch.manual_seed(0)
    model, size = _made(make)
    gradients = sum(p.numel() for p in model.parameters()) < LARGE
    row = _structure(model)
    exact = copy.deepcopy(model).double()
    row |= _differences(exact, size, gradients)
    return row | {"ratio": _ratio(_in_channels_last(model), exact, size)}


def matches(row: dict) -> bool:
    return row["same_state"] and not row["differs"] and row["ratio"] <= FACTOR


def covered(row: dict) -> bool:
    """Whether all that can be fused of its blocks is."""
    return row["norms"] == row["fused_norms"] and not row["adds_left"]


def _row(library: str, name: str) -> dict:
    torch.set_num_threads(1)
    env.settings = env.settings._replace(winograd=2)
    make = next(m for lib, n, m in models() if (lib, n) == (library, name))
    row = {"library": library, "model": name}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return row | cover(make)
    except Exception as error:
        traceback.print_exc()
        return row | {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"}


def _why(row: dict) -> str:
    # the numbers of blocks and channels say nothing here
    short = dict.fromkeys(re.sub(r"\b\w+\.\d[\w.]*|\b\w*\d\b", "…", r) for r in row["reasons"])
    return "; ".join(list(short)[:3]).replace("|", "\\|")


def table(rows: list[dict]) -> str:
    """Markdown: what came of it for each library, then every model."""
    lines = ["# Coverage", ""]
    versions = ", ".join(
        f"{p} {version(p)}" for p in ("torch", "torchvision", "timm", "transformers")
    )
    lines += [
        "What `fuse_` makes of every ResNet-like model: `make coverage`.",
        f"fused_res {fused_res.__version__}, {versions}, Python {platform.python_version()}; "
        "random weights, float64 and float32 on a CPU.",
        "",
        "- *blocks*: innermost modules with a convolution and an add or concatenation; *whole*: "
        "fused as one, *in part*: the convolutions, norms, ReLUs and adds that follow each other.",
        "- *norms*: BatchNorms in these blocks that run fused, of all. A block without any has "
        "nothing to fuse.",
        "- *difference*: of a training and an eval step in float64 on the CPU kernels, the largest "
        "of all outputs, gradients and statistics, norm over norm; where it is over "
        f"{WIRING:g}, in parentheses that of PyTorch's own results in channels_last (a mismatch: "
        f"over {CHAOS} times that: gradients that are zero but for rounding, chaos in deep nets); "
        f"with {LARGE / 1e6:.0f} million parameters and more (†) without gradients.",
        f"- *error*: of the output in eval mode in float32, fused over plain: the median of "
        f"{DRAWS[0]} pairs of images or, where that is over {FACTOR}, of {DRAWS[1]} (a mismatch: "
        f"over {FACTOR}).",
        "",
        f"Left out for their size: {', '.join(TOO_LARGE)}.",
        "",
        "| library | models | every block's parts fused | mismatches |",
        "| --- | ---: | ---: | ---: |",
    ]
    for library in dict.fromkeys(row["library"] for row in rows):
        of = [r for r in rows if r["library"] == library]
        good = [r for r in of if "error" not in r]
        full = sum(map(covered, good))
        wrong = sum(not matches(r) for r in good) + len(of) - len(good)
        lines.append(f"| {library} | {len(of)} | {full} ({full / len(of):.1%}) | {wrong} |")
    lines += [
        "",
        "| model | blocks | whole | in part | skipped | norms | difference | error | not whole: |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['library']} {r['model']} | | | | | | | | {r['error']} |")
            continue
        mark = "" if r["gradients"] else " †"
        difference = f"{r['difference']:.0e}"
        if r["of_layouts"] is not None:
            difference += f" ({r['of_layouts']:.0e})"
        cells = [
            f"{r['library']} {r['model']}{mark}",
            *(r[key] for key in ("blocks", "whole", "partly", "skipped")),
            f"{r['fused_norms']} of {r['norms']}", difference, f"{r['ratio']:.2f}", _why(r),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", default="*", metavar="PATTERN", help="of names (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth model")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table, as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows; done ones are kept")
    args = parser.parse_args(argv)
    names = [(lib, n) for lib, n, _ in models() if fnmatch.fnmatch(n, args.models)][:: args.every]
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {(r["library"], r["model"]): r for r in rows}
    left = [pair for pair in names if pair not in done]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for row in pool.map(_row, *zip(*left, strict=True)) if left else ():
            done[row["library"], row["model"]] = row
            good = "error" not in row and matches(row)
            print(json.dumps({k: row[k] for k in row if k != "reasons"}), flush=True)
            print(f"{row['model']}: {'the same' if good else 'MISMATCH'}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(list(done.values())))
    rows = [done[pair] for pair in names]
    if args.write:
        args.write.write_text(table(rows))
    else:
        print(table(rows))
    return 0 if all("error" not in r and matches(r) for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
