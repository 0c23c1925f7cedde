"""Whole nets: an optimizer's step and an evaluation under bfloat16 autocast, and their values.

Images repeat: a batch is copies of at most 16. BatchNorm's statistics and the mean loss of the
copies are those of the few, so that the very step that is timed can be held against float64 at the
cost of 16 images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from harness.program import FORMATS, Program, double, same
from harness.suite import CL, FUSED, Build, Candidate, Options, Plot, Suite, TrainingWorkload
from report.tables import AGAINST, Table, arrow, over
from torch import Tensor, nn

from fused_res.models import NetResDeep, ResNet
from fused_res.reference import ResBlock

from . import blocks
from .blocks import folded, fused

DISTINCT = 16  # images


def resnet(kind: str, counts: tuple[int, ...], **options) -> ResNet:
    """With small branches, after Goyal et al., 2017, who start at 0: else what bfloat16 rounds
    grows from block to block until the logits of 50 layers are off by a third."""
    net = ResNet(kind, counts, init="default", **options)
    for block in net.modules():
        if isinstance(block, ResBlock):
            nn.init.constant_(getattr(block, f"bn{block.depth}").weight, 0.2)
    return net


def cifar_resnet18(width: int, classes: int = 10) -> ResNet:
    """``width``: channels of the first stage."""
    return ResNet(width=width, stem="cifar", init="default", num_classes=classes)


def chain(channels: int, count: int) -> nn.Sequential:
    """The blocks of ``100 blocks`` alone, one convolution each: (N, channels, H, W) -> the same."""
    return nn.Sequential(
        *[ResBlock(channels, channels, kind="single", relu="before") for _ in range(count)]
    )


@cache
def torchvision_models() -> ModuleType:
    """``torchvision.models``, beside a PyTorch without CUDA too.

    There torchvision's own library may not load, and its import asks for two operators of it, which
    no ResNet calls: they are declared instead.
    """
    try:
        from torchvision import models
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import models

        models.operators = operators  # they live as long as this object
    return models


@dataclass(frozen=True)
class Net:
    """``compile_s``: what torch.compile of a training step may take; it is not begun with less."""

    make: Callable[[], nn.Module]
    compile_s: float = 10.0


NETS = {
    "ResNet-50": Net(partial(resnet, "bottleneck", (3, 4, 6, 3), num_classes=1000), 75.0),
    "ResNet-18": Net(partial(resnet, "basic", (2, 2, 2, 2), num_classes=1000), 40.0),
    "torchvision ResNet-18": Net(lambda: torchvision_models().resnet18(), 40.0),
    "torchvision ResNet-50": Net(lambda: torchvision_models().resnet50(), 75.0),
    "ResNet-18 CIFAR": Net(partial(cifar_resnet18, 64), 40.0),
    "ResNet-20 CIFAR": Net(partial(resnet, "basic", (3, 3, 3), width=16, stem="cifar"), 40.0),
    "100 blocks": Net(partial(NetResDeep, 32, 100), 75.0),
    **{
        f"chain of {count}, {channels}ch": Net(partial(chain, channels, count), 5.0 + count / 2)
        for count in (1, 3, 9, 100)
        for channels in (16, 32, 64)
    },
    # to see that everything runs
    "small ResNet": Net(partial(resnet, "bottleneck", (1, 1), width=8, num_classes=100)),
    "narrow ResNet-18": Net(partial(cifar_resnet18, 8, 100)),
    "3 blocks": Net(partial(NetResDeep, 16, 3, num_classes=100)),
}


@dataclass
class Values:
    """``copies`` of the same few images and labels, and the net's parameters and buffers."""

    x: Tensor
    labels: Tensor | None
    copies: int
    state: dict[str, Tensor]

    def one(self) -> Values:
        """A copy in float64."""
        few = len(self.x) // self.copies
        labels = None if self.labels is None else self.labels[:few]
        return Values(self.x[:few].double(), labels, 1, double(self.state))

    def repeated(self, y: Tensor) -> Tensor:
        return y.repeat(self.copies, *[1] * (y.dim() - 1))


def values(name: str, shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> Values:
    generator = torch.Generator(device).manual_seed(seed)
    batch = shape[0]
    few = max(1, min(DISTINCT, batch // 2))
    x = torch.randn((few, *shape[1:]), generator=generator, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[name].make()
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    net.to(device)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():  # running statistics as of a trained net: those of the images
        classes = net(x).size(1)
    labels = torch.randint(classes, (few,), generator=generator, device=device)
    copies = batch // few
    state = {name: t.clone() for name, t in net.state_dict().items()}
    return Values(x.repeat(copies, 1, 1, 1), labels.repeat(copies), copies, state)


class NetProgram(Program):
    """``autocast``: the dtype of the convolutions, or None for a net that has its own."""

    def __init__(
        self,
        workload: NetWorkload,
        v: Values,
        layout: str = CL,
        swap: Callable[[nn.Module], nn.Module] = same,
        wrap: Callable = same,
        autocast: torch.dtype | None = torch.bfloat16,
    ) -> None:
        net = NETS[workload.net].make().to(v.x.device, v.x.dtype)
        net.load_state_dict(v.state)
        net = net.to(memory_format=FORMATS[layout]).train(workload.training)
        self.module = swap(net)
        self.call = wrap(self.module)
        self.x, self.labels = v.x.to(memory_format=FORMATS[layout]), v.labels
        calls = {"train": self.step} if workload.training else {"eval": self.evaluate}
        super().__init__(calls, (self.x,))
        self.initial = v.state
        self.autocast = autocast
        self.optimizer = None
        if workload.training:
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)

    def _autocast(self) -> torch.autocast:
        # Every weight is cast once a step, so the cache of casts spares nothing, and a CUDA graph
        # must not be given a cast from before its capture.
        on = self.autocast is not None
        return torch.autocast(self.x.device.type, self.autocast, enabled=on, cache_enabled=False)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.call(self.x)
            loss = F.cross_entropy(logits, self.labels)
        loss.backward()
        self.optimizer.step()
        return logits.detach()

    def evaluate(self) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self.call(self.x)

    def release(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def result(self) -> dict[str, Tensor]:
        """Logits, and in training the gradient of every parameter."""
        if self.optimizer is None:
            return super().result()
        with torch.no_grad():
            for name, t in self.module.state_dict().items():
                t.copy_(self.initial[name])
            for state in self.optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].zero_()
        y = self.run()[0].clone()
        grads = {f"d{name}": p.grad.clone() for name, p in self.module.named_parameters()}
        return {"y": y, **grads}


@dataclass(frozen=True)
class NetWorkload(TrainingWorkload):
    net: str = ""

    whole_net = True

    @property
    def compile_s(self) -> float:
        return NETS[self.net].compile_s * (1.0 if self.training else 0.6)

    def values(self, device: str = "cpu", seed: int = 0) -> Values:
        return values(self.net, self.shape, device, seed)

    def exact(self, v: Values) -> dict[str, Tensor]:
        """On one copy of the images."""
        result = NetProgram(self, v.one(), "NCHW", autocast=None).result()
        return {**result, "y": v.repeated(result["y"])}

    def eager(self, layout: str) -> Build:
        return partial(NetProgram, self, layout=layout)

    def compiled(self, options: dict, backend: str | None = None) -> Build:
        swap = partial(fused, backend=backend) if backend else same
        return partial(NetProgram, self, swap=swap, wrap=partial(torch.compile, **options))

    def fused(self, backend: str) -> Build:
        return partial(NetProgram, self, swap=partial(fused, backend=backend))

    def folded(self) -> Build | None:
        return partial(NetProgram, self, swap=partial(folded, dtype=self.dtype), autocast=None)

    def candidates(self, device: str, options: Options) -> list[Candidate]:
        """Last torch.compile of the net with the first fused backend in it."""
        found = super().candidates(device, options)
        modes = self.compile_modes(options)
        able = [name for name, why in self.backends(device, options).items() if why is None]
        if self.modes or "compile" not in modes or not able:
            return found
        slack, build = self.slack(able[0]), self.compiled(modes["compile"], able[0])
        name = f"{FUSED}{able[0]}-compile"
        return [*found, Candidate(name, CL, slack, build, seconds=self.compile_s)]


def net(name: str, batch: int, direction: str, pixels: int = 32) -> NetWorkload:
    shape = batch, 3, pixels, pixels
    fields = {"dtype": torch.bfloat16, "directions": (direction,), "alone": True}
    return NetWorkload("nets", f"{name} batch {batch}", shape, net=name, **fields)


GPU_NETS = (
    ("ResNet-50", 256, "train", 224), ("ResNet-20 CIFAR", 128, "train"),
    ("100 blocks", 64, "train"), ("ResNet-50", 256, "eval", 224),
    ("ResNet-18 CIFAR", 512, "train"), ("ResNet-20 CIFAR", 128, "eval"),
    ("100 blocks", 64, "eval"), ("ResNet-20 CIFAR", 1024, "train"),
    ("100 blocks", 256, "train"), ("ResNet-18 CIFAR", 512, "eval"),
    ("ResNet-20 CIFAR", 1024, "eval"), ("100 blocks", 256, "eval"),
)  # fmt: skip
GPU_QUICK = (
    ("3 blocks", 8, "train"), ("3 blocks", 8, "eval"), ("small ResNet", 8, "train"),
    ("small ResNet", 8, "eval"), ("narrow ResNet-18", 8, "eval"),
)  # fmt: skip


def workloads(gpu: bool, quick: bool) -> list[NetWorkload]:
    return [net(*args) for args in (GPU_QUICK if quick else GPU_NETS)] if gpu else []


def autotuned(gpu: bool, quick: bool) -> list[TrainingWorkload]:
    """A few of these and of the blocks, against torch.compile's max-autotune."""
    if not gpu:
        return []
    found = blocks.workloads(gpu, quick)[: 1 if quick else 6]
    if not quick:
        found += [net("ResNet-20 CIFAR", 128, direction) for direction in ("train", "eval")]
    return [replace(workload, modes=("max-autotune",)) for workload in found]


GPU_REPORT = Table(
    "Whole nets on a GPU",
    "Whole nets under bfloat16 autocast ({candidate}, channels_last), training with the "
    "optimizer's step: speed-up, and images a second and peak memory above the parameters, eager "
    "channels_last → fused.",
    "net",
    [arrow("images/s", "images_per_s"), *AGAINST, arrow("peak memory, MiB", "peak_mib")],
    by_direction=True,
)
AUTOTUNE_REPORT = Table(
    "Against max-autotune on a GPU",
    "Against torch.compile's max-autotune ({candidate}): speed-up.",
    "net or block",
    [
        over("speed-up", "compile-max-autotune"),
        over("in a CUDA graph", "compile-max-autotune", graphed=True),
    ],
    by_direction=True,
)

SUITES = (
    Suite("nets", 40, workloads, gpu_report=GPU_REPORT, plot=Plot("nets", ("train", "eval"))),
    Suite("autotune", 80, autotuned, named=True, gpu_report=AUTOTUNE_REPORT),
)
