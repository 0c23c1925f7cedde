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
from harness import check
from harness.cudnn import FoldedNet
from harness.program import FORMATS, Program
from harness.suite import (
    CL,
    FOLDED_SLACK,
    FUSED,
    FUSED_SLACK,
    Build,
    Candidate,
    Options,
    Plot,
    Suite,
    TrainingWorkload,
)
from report.tables import AGAINST, Table, arrow, over
from torch import Tensor, nn

from fused_res import fuse_
from fused_res.models import NetResDeep, ResNet
from fused_res.nn.blocks import FusedForward
from fused_res.reference import ResBlock

from . import blocks

DISTINCT = 16  # images


def resnet(
    kind: str, channels: tuple[int, ...], depths: tuple[int, ...], classes: int, large: bool
) -> nn.Sequential:
    """A ResNet (He et al., 2016) of ``reference.ResBlock``.

    Args:
        kind: of the blocks.
        channels, depths: of each stage; all but the first start with a stride of 2.
        classes: how many logits.
        large: for images of 224 pixels: a 7x7 convolution and a pooling first.
    """
    width = channels[0] // 4 if kind == "bottleneck" else channels[0]
    stem = nn.Conv2d(3, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
    parts = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    if large:
        parts.append(nn.MaxPool2d(3, 2, 1))
    for stage, (out, depth) in enumerate(zip(channels, depths, strict=True)):
        for i in range(depth):
            block = ResBlock(width, out, 2 if stage and not i else 1, kind=kind)
            # small branches, after Goyal et al., 2017, who start at 0: else what bfloat16 rounds
            # grows from block to block until the logits of 50 layers are off by a third
            nn.init.constant_(getattr(block, f"bn{block.depth}").weight, 0.2)
            parts.append(block)
            width = out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


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


def _torchvision(name: str) -> nn.Module:
    return getattr(torchvision_models(), name)(weights=None)


@dataclass(frozen=True)
class Net:
    """``compile_s``: what torch.compile of a training step may take; it is not begun with less."""

    make: Callable[[], nn.Module]
    compile_s: float = 10.0


NETS = {
    "ResNet-50": Net(
        partial(resnet, "bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3), 1000, True), 75.0
    ),
    "ResNet-18": Net(partial(resnet, "basic", (64, 128, 256, 512), (2, 2, 2, 2), 1000, True), 40.0),
    "torchvision ResNet-18": Net(partial(_torchvision, "resnet18"), 40.0),
    "torchvision ResNet-50": Net(partial(_torchvision, "resnet50"), 75.0),
    "ResNet-18 CIFAR": Net(partial(cifar_resnet18, 64), 40.0),
    "ResNet-20 CIFAR": Net(partial(resnet, "basic", (16, 32, 64), (3, 3, 3), 10, False), 40.0),
    "100 blocks": Net(partial(NetResDeep, 32, 100), 75.0),
    **{
        f"chain of {count}, {channels}ch": Net(partial(chain, channels, count), 5.0 + count / 2)
        for count in (1, 3, 9, 100)
        for channels in (16, 32, 64)
    },
    # to see that everything runs
    "small ResNet": Net(partial(resnet, "bottleneck", (32, 64), (1, 1), 100, True)),
    "narrow ResNet-18": Net(partial(cifar_resnet18, 8, 100)),
    "3 blocks": Net(partial(NetResDeep, 16, 3, num_classes=100)),
}


def sequence(net: nn.Module) -> nn.Sequential:
    """The net as one row of its children, in the order in which its forward calls them."""
    if isinstance(net, ResNet):
        layers = (block for i in range(1, 5) for block in getattr(net, f"layer{i}"))
        stem = net.conv1, net.bn1, nn.ReLU()
        return nn.Sequential(*stem, *layers, nn.AvgPool2d(4), nn.Flatten(), net.fc)
    if isinstance(net, NetResDeep):
        stem = net.conv1, nn.ReLU(), nn.MaxPool2d(2)
        head = nn.MaxPool2d(2), nn.Flatten(), net.fc1, nn.ReLU(), net.fc2
        return nn.Sequential(*stem, *net.resblocks, *head)
    return net


@dataclass
class Values:
    """``copies`` of the same few images and labels, and the net's parameters and buffers."""

    x: Tensor
    labels: Tensor
    copies: int
    state: dict[str, Tensor]


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
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():  # running statistics as of a trained net: those of the images
        classes = net(x).size(1)
    labels = torch.randint(classes, (few,), generator=generator, device=device)
    copies = batch // few
    state = {name: t.clone() for name, t in net.state_dict().items()}
    return Values(x.repeat(copies, 1, 1, 1), labels.repeat(copies), copies, state)


def _same(net: nn.Module) -> nn.Module:
    return net


def fused(net: nn.Module, backend: str) -> nn.Module:
    """``net`` with every residual block fused, run by ``backend`` or not at all."""
    fuse_(net, strict=True)
    for part in net.modules():
        if isinstance(part, FusedForward):
            part.backend = backend
    return net


def folded(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    return FoldedNet(sequence(net), dtype).eval()


class NetProgram(Program):
    """``autocast``: the dtype of the convolutions, or None for a net that has its own."""

    def __init__(
        self,
        workload: NetWorkload,
        v: Values,
        layout: str = CL,
        swap: Callable[[nn.Module], nn.Module] = _same,
        wrap: Callable = _same,
        autocast: torch.dtype | None = torch.bfloat16,
    ) -> None:
        net = NETS[workload.net].make().to(v.x.device, v.x.dtype)
        net.load_state_dict(v.state)
        net = net.to(memory_format=FORMATS[layout]).train(workload.training)
        self.module = swap(net)
        self.call = wrap(self.module)
        self.x, self.labels = v.x.to(memory_format=FORMATS[layout]), v.labels
        self.inputs = (self.x,)
        self.initial = v.state
        self.autocast = autocast
        self.directions = workload.directions
        self.calls = {"train": self.step} if workload.training else {"eval": self.evaluate}
        self.optimizer = None
        if workload.training:
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)

    def _autocast(self) -> torch.autocast:
        # Every weight is cast once a step, so the cache of casts spares nothing, and a CUDA graph
        # must not be given a cast from before its capture.
        enabled = self.autocast is not None
        return torch.autocast(
            self.x.device.type, self.autocast, enabled=enabled, cache_enabled=False
        )

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


def exact_result(workload: NetWorkload, v: Values) -> dict[str, Tensor]:
    """What the step computes in float64: on one copy of the images."""
    few = len(v.labels) // v.copies
    state = {k: t.double() if t.is_floating_point() else t for k, t in v.state.items()}
    one = Values(v.x[:few].double(), v.labels[:few], 1, state)
    result = NetProgram(workload, one, "NCHW", autocast=None).result()
    y = result["y"]
    return {**result, "y": y.repeat(v.copies, *[1] * (y.dim() - 1))}


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
        return exact_result(self, v)

    def compare(self, result: dict[str, Tensor], exact: dict[str, Tensor]):
        return check.compare_net(self.dtype, result, exact)

    def eager(self, layout: str) -> Build:
        return partial(NetProgram, self, layout=layout)

    def compiled(self, options: dict, backend: str | None = None) -> Build:
        swap = partial(fused, backend=backend) if backend else _same
        return partial(NetProgram, self, swap=swap, wrap=partial(torch.compile, **options))

    def fused(self, backend: str) -> Build:
        return partial(NetProgram, self, swap=partial(fused, backend=backend))

    def folded(self) -> Build | None:
        return partial(NetProgram, self, swap=partial(folded, dtype=self.dtype), autocast=None)

    def slack(self, backend: str) -> float:
        return FUSED_SLACK if self.training or backend != "cuda" else FOLDED_SLACK

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
    ("ResNet-50", 256, "train", 224),
    ("ResNet-20 CIFAR", 128, "train"),
    ("100 blocks", 64, "train"),
    ("ResNet-50", 256, "eval", 224),
    ("ResNet-18 CIFAR", 512, "train"),
    ("ResNet-20 CIFAR", 128, "eval"),
    ("100 blocks", 64, "eval"),
    ("ResNet-20 CIFAR", 1024, "train"),
    ("100 blocks", 256, "train"),
    ("ResNet-18 CIFAR", 512, "eval"),
    ("ResNet-20 CIFAR", 1024, "eval"),
    ("100 blocks", 256, "eval"),
)
GPU_QUICK = (
    ("3 blocks", 8, "train"),
    ("3 blocks", 8, "eval"),
    ("small ResNet", 8, "train"),
    ("small ResNet", 8, "eval"),
    ("narrow ResNet-18", 8, "eval"),
)


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
    [
        arrow("images/s", "images_per_s"),
        *AGAINST,
        arrow("peak memory, MiB", "peak_mib"),
    ],
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
