"""Single convolutions: calls of ``conv_bn_act``, and those of blocks in training with the passes
over memory that come with them; every implementation, Triton's in each configuration.

Triton's kernels are imported where they are called: without Triton the other suites still run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness.program import Program, double
from harness.suite import (
    CL,
    DTYPES,
    FUSED,
    FUSED_SLACK,
    Candidate,
    Kernel,
    Options,
    Suite,
    Workload,
)
from report.tables import Lookup, caption, number, on_device, to_markdown, unique
from torch import Tensor

from fused_res import reference
from fused_res.dispatch import inference_conv, training_conv
from fused_res.dispatch.backends import why_not
from fused_res.dispatch.inference_conv import IMPLEMENTATIONS
from fused_res.ops.conv_bn_act import Call, out_shape, run_as
from fused_res.reference import ConvNorm, Norm, ResBlock


def candidate(name: str, config, build: Callable, **fields) -> Candidate:
    """Of an implementation, ``eager`` or a fused one with Triton's configuration."""
    if name == "eager":
        return Candidate(name, CL, 1.0, build, core=True)
    full = "-".join(map(str, (FUSED + name, *(config or ()))))
    return Candidate(full, CL, FUSED_SLACK, build, config=config, **fields)


def described(row, candidate: Candidate, *names: str) -> dict[str, object]:
    """A call as a timing row tells it from others, in the fields ``names``."""
    call = {name: getattr(row, name) for name in names}
    call["shape"] = list(call["shape"])
    return {"call": call, "config": candidate.config and candidate.config._asdict()}


# --- calls of conv_bn_act


@dataclass(frozen=True)
class Conv:
    """A square kernel, padded so that a stride of 1 keeps the size.

    residual: ``none``, ``add``, or ``shortcut``: a 1x1 of another tensor, which has
    ``shortcut_channels`` and ``shortcut_stride`` times the output's size.
    """

    out_channels: int
    size: int
    stride: int = 1
    residual: str = "none"
    shortcut_channels: int = 0
    shortcut_stride: int = 1


def _conv_norm(v: dict[str, Tensor], prefix: str, stride: int) -> ConvNorm:
    weight = v[f"{prefix}.weight"]
    norm = Norm(*(v[f"{prefix}.{name}"] for name in ("mean", "var", "gamma", "beta")))
    return ConvNorm(weight, None, (stride,) * 2, (weight.size(2) // 2,) * 2, (1, 1), 1, norm)


def program(run: Callable[[Call], Tensor], workload: ConvWorkload, v: dict) -> Program:
    call = workload.call_of(v)
    return Program({"eval": torch.no_grad()(partial(run, call))}, (call.x,))


def eager(call: Call) -> Tensor:
    return reference.conv_bn_act(*call)


@dataclass(frozen=True)
class ConvWorkload(Workload):
    directions: tuple[str, ...] = ("eval",)
    conv: Conv | None = None

    settles = True

    def values(self, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """What has four dimensions is of the workload's dtype, BatchNorm of float32."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        conv, (n, c, h, w) = self.conv, self.shape
        k, p, q = conv.out_channels, -(-h // conv.stride), -(-w // conv.stride)
        out = {"x": normal(n, c, h, w)}
        filters = {"conv": (c, conv.size)}
        if conv.residual == "add":
            out["residual"] = normal(n, k, p, q)
        elif conv.residual == "shortcut":
            filters["shortcut"] = conv.shortcut_channels, 1
            step = conv.shortcut_stride
            out["residual"] = normal(n, conv.shortcut_channels, step * p, step * q)
        for name, (channels, size) in filters.items():
            scale = (2 / (channels * size * size)) ** 0.5  # He et al., 2015
            out[f"{name}.weight"] = scale * normal(k, channels, size, size)
            out |= {f"{name}.mean": 0.2 * normal(k), f"{name}.var": 2 + 0.2 * normal(k).abs()}
            out |= {f"{name}.gamma": 1 + 0.2 * normal(k), f"{name}.beta": 0.2 * normal(k)}
        return {
            name: t.to(self.dtype, memory_format=torch.channels_last) if t.dim() == 4 else t
            for name, t in out.items()
        }

    def call_of(self, v: dict[str, Tensor]) -> Call:
        conv, shortcut = self.conv, None
        if conv.residual == "shortcut":
            shortcut = _conv_norm(v, "shortcut", conv.shortcut_stride)
        return Call(v["x"], _conv_norm(v, "conv", conv.stride), v.get("residual"), shortcut)

    def exact(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return program(eager, self, double(v)).result()

    def candidates(self, device: str, options: Options) -> list[Candidate]:
        call = self.call_of(self.values(device))
        kind, found = torch.device(device).type, []
        for name, implementation in IMPLEMENTATIONS.items():
            why = why_not("conv_bn_act", implementation.backend, kind, self.dtype)
            why = why or implementation.why_not(call)
            configs = [None] if why or implementation.configs is None else None
            for config in configs or implementation.configs(call):
                run = partial(run_as, choice=inference_conv.Candidate(name, "timed", config))
                found.append(candidate(name, config, partial(program, run, self), why_not=why))
        return [candidate("eager", None, partial(program, eager, self)), *found]

    def kernels(self) -> tuple[Kernel, ...]:
        v, (_, c, _, _) = self.values("meta"), self.shape
        n, k, p, q = out_shape(*self.call_of(v)[:2])
        pixels = n * p * q
        weights = sum(t.numel() for name, t in v.items() if name.endswith(".weight"))
        read = pixels * c if self.conv.size == 1 else v["x"].numel()
        if "residual" in v:  # a shortcut reads only the pixels that it keeps
            read += pixels * v["residual"].size(1)
        moved = self.dtype.itemsize * (read + weights + pixels * k)
        return (Kernel(2 * pixels * weights, moved),)

    def described(self, candidate: Candidate) -> dict[str, object]:
        row = inference_conv.row_of(inference_conv.key_of(self.call_of(self.values("meta"))), {})
        return described(row, candidate, "shape", "like")


def conv(shape: tuple[int, int, int, int], dtype: str, conv: Conv) -> ConvWorkload:
    channels = f"{shape[1]}-{conv.out_channels}ch {shape[2]}x{shape[3]}"
    what = "" if conv.stride == 1 else f" stride {conv.stride}"
    if conv.residual != "none":
        what += f" {conv.residual}"
    if conv.residual == "shortcut":
        what += f" {conv.shortcut_channels}ch stride {conv.shortcut_stride}"
    name = f"conv {conv.size}x{conv.size} {channels}{what} batch {shape[0]} {dtype}"
    return ConvWorkload("convs", name, shape, CL, DTYPES[dtype], conv=conv)


def convs_of(bottleneck: bool, batch: int, dtype: str) -> list[ConvWorkload]:
    """The calls of a ResNet-50 or, of basic blocks, a ResNet-18 on images of 224 pixels."""
    width, size = 64, 56
    out = [conv((batch, 3, 224, 224), dtype, Conv(64, 7, 2))]
    for stage in range(4):
        inner = 64 << stage
        last = 4 * inner if bottleneck else inner
        for stride in (2 if stage else 1, 1):  # the first block; all others are alike
            after = size // stride
            residual = ("add",) if width == last else ("shortcut", width, stride)
            if bottleneck:
                out.append(conv((batch, width, size, size), dtype, Conv(inner, 1)))
            read = batch, inner if bottleneck else width, size, size
            out.append(conv(read, dtype, Conv(inner, 3, stride)))
            last_conv = Conv(last, 1 if bottleneck else 3, 1, *residual)
            out.append(conv((batch, inner, after, after), dtype, last_conv))
            width, size = last, after
    return out


def workloads(gpu: bool, quick: bool) -> list[ConvWorkload]:
    if not gpu:
        return []
    if quick:
        return [
            conv((2, 16, 9, 9), "fp16", Conv(24, 3, 2)),
            conv((2, 16, 9, 9), "fp16", Conv(16, 3, 1, "add")),
            conv((2, 16, 9, 9), "bf16", Conv(24, 1, 1, "shortcut", 8, 2)),
        ]
    sizes = [(batch, dtype) for dtype in ("bf16", "fp16") for batch in (256, 1, 32, 8)]
    nets = [(bottleneck, *size) for size in sizes for bottleneck in (True, False)]
    return list(dict.fromkeys(workload for net in nets for workload in convs_of(*net)))


# --- convolutions of blocks in training


class TrainingConvProgram(Program):
    """``choice``: as of ``fused_res.dispatch.training_conv``."""

    def __init__(self, choice: int, workload: TrainingConvWorkload, v: dict[str, Tensor]) -> None:
        from fused_res.dispatch.training_conv_candidates import Steps

        # statistics and sums may be updated in place
        self.initial, self.v = v, {name: t.clone() for name, t in v.items()}
        self.steps, self.choice = Steps(workload.call, self.v), choice
        calls = {workload.directions[0]: lambda: tuple(self.steps.run(choice).values())}
        super().__init__(calls, tuple(self.v.values()))

    def result(self) -> dict[str, Tensor]:
        for name, t in self.v.items():
            t.copy_(self.initial[name])
        return {name: t.clone() for name, t in self.steps.run(self.choice).items()}


@dataclass(frozen=True)
class TrainingConvWorkload(Workload):
    """One way, forward or backward; ``eager`` has the passes over memory of Triton's bn_act that
    the fused kernels spare.

    most: of Triton's configurations, the best guesses; None: all.
    """

    call: training_conv.Call | None = None
    most: int | None = None

    def values(self, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        from fused_res.dispatch.training_conv_candidates import values

        return values(self.call, device, seed)

    def exact(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """By autograd."""
        call, v = self.call, double(v)
        convolve = partial(F.conv2d, weight=v["weight"], stride=call.stride, padding=call.padding)

        def normalized(a: Tensor) -> Tensor:
            running = v["mean"].clone(), v["var"].clone()
            training = training_conv.trains(call)
            return F.relu(F.batch_norm(a, *running, v["gamma"], v["beta"], training))

        if not call.backward:
            return {"y": normalized(convolve(v["x"]))}
        if "a" in v:
            parameters = ["gamma", "beta"] if training_conv.trains(call) else []
            leaves = [v[name].requires_grad_() for name in ("a", *parameters)]
            z = normalized(v["a"])
            grads = torch.autograd.grad(convolve(z), leaves, v["dy"])
            names = ("y", *(f"d{name}" for name in parameters))
            return {"z": z.detach(), **dict(zip(names, grads, strict=True))}
        x = v["x"].requires_grad_()
        (dx,) = torch.autograd.grad(convolve(x), x, v["dy"])
        return {"y": dx + v["masked"] if "masked" in v else dx + v.get("other", 0)}

    def candidates(self, device: str, options: Options) -> list[Candidate]:
        from fused_res.dispatch.training_conv_candidates import Steps

        found = Steps(self.call, self.values(device)).candidates()
        triton = [choice for choice in found if choice > training_conv.TRITON]
        left_out = triton[self.most :] if self.most else []
        return [
            candidate(training_conv.name_of(choice), training_conv.config_of(choice),
                      partial(TrainingConvProgram, choice, self))
            for choice in found if choice not in left_out
        ]  # fmt: skip

    def moved_bytes(self, direction: str) -> int:
        """The convolution's operands and result, and what the passes of the fused kernels beside
        it read and write."""
        call = self.call
        item, x = call.dtype.itemsize, torch.Size(call.shape).numel()
        steps = call.stride[0] * call.stride[1]
        out = x // call.shape[1] * call.weight[0] // steps
        used = x // steps if call.weight[2:] == (1, 1) else x
        size = used + out + torch.Size(call.weight).numel()
        if not call.backward:
            size += 2 * out  # a -> y
        elif training_conv.trains(call) is not None:
            size += 5 * x  # a; g, a -> da, z
        elif call.epilogue:
            size += used
        return item * size + (x // 8 if call.epilogue == training_conv.ADD else 0)

    def described(self, candidate: Candidate) -> dict[str, object]:
        return described(training_conv.row_of(self.call, {}), candidate, "op", "shape", "like")


def _calls(kind: str, x: Tensor, out: int, stride: int) -> list[training_conv.Call]:
    """Of a block in training."""
    block = ResBlock(x.size(1), out, stride, kind=kind, device="meta", dtype=x.dtype)
    convs = [getattr(block, f"conv{i + 1}") for i in range(block.depth)]
    convs += [] if block.downsample is None else [block.downsample[0]]
    norm = Norm(training=True)
    stages = [
        ConvNorm(c.weight, None, c.stride, c.padding, c.dilation, c.groups, norm) for c in convs
    ]
    branch, rest = stages[: block.depth], stages[block.depth :]
    return training_conv.calls(training_conv.block_of(x, branch, *(rest or [None])))


def training_convs_of(
    kind: str, channels: tuple[int, ...], size: int, batch: int, dtype: str = "bf16"
) -> list[TrainingConvWorkload]:
    """The convolutions of a net's blocks, both ways; ``channels`` of each stage."""
    width = channels[0] // 4 if kind == "bottleneck" else channels[0]
    found: dict[training_conv.Call, None] = {}
    for stage, out in enumerate(channels):
        for stride in (2 if stage else 1, 1):  # the first block; all others are alike
            x = torch.empty((batch, width, size, size), dtype=DTYPES[dtype], device="meta",
                            memory_format=torch.channels_last)  # fmt: skip
            found |= dict.fromkeys(_calls(kind, x, out, stride))
            width, size = out, size // stride
    workloads = []
    for call in found:
        (n, c, h, w), (k, _, r, s) = call.shape, call.weight
        strided = "" if call.stride == (1, 1) else f" stride {call.stride[0]}"
        way = "backward" if call.backward else "forward"
        what = f"{r}x{s} {c}-{k}ch {h}x{w}{strided} {way}"
        what += f", {call.epilogue}" * bool(call.epilogue)
        name = f"training conv {what}, batch {n} {dtype}"
        fields = {"layout": CL, "dtype": call.dtype, "directions": (way,), "call": call}
        workloads.append(TrainingConvWorkload("training-convs", name, call.shape, **fields))
    return workloads


NETS = (
    ("bottleneck", (256, 512, 1024, 2048), 56, 256),  # ResNet-50
    ("basic", (64, 128, 256, 512), 56, 256),  # ResNet-18
    ("basic", (64, 128, 256, 512), 32, 512),  # ResNet-18 CIFAR
    ("basic", (16, 32, 64), 32, 128),  # ResNet-20 CIFAR
    ("single", (32,), 16, 64),  # 100 blocks
)


TOP = 3  # configurations of Triton's that a short run times


def training_workloads(gpu: bool, quick: bool) -> list[TrainingConvWorkload]:
    if not gpu:
        return []
    nets = [("basic", (8, 8), 4, 2, "fp16")] if quick else NETS
    return list(dict.fromkeys(one for net in nets for one in training_convs_of(*net)))


def resnet50_workloads(gpu: bool, quick: bool) -> list[TrainingConvWorkload]:
    """Those of one net, in the configurations that are guessed best: a minute on a GPU."""
    found = training_workloads(gpu, True)[:2] if quick else training_convs_of(*NETS[0])
    return [replace(one, suite="resnet50-convs", most=TOP) for one in found if gpu]


def why_no_triton(device: str) -> str | None:
    why = why_not("bn_act", "triton", torch.device(device).type, torch.bfloat16)
    return why and f"it needs Triton, on a CPU TRITON_INTERPRET=1: {why}"


# --- reports


def implementation(row: dict) -> str:
    """``eager``, ``cudnn``, ``triton``, ..."""
    return row["rival"].removeprefix(FUSED).split("-")[0]


def best(rows: list[dict]) -> dict[str, dict]:
    """The fastest row of each implementation that was timed."""
    timed = sorted((r for r in rows if r["median_ms"] is not None), key=lambda r: -r["median_ms"])
    return {implementation(row): row for row in timed}


def table(intro: str, rows: list[dict]) -> list[str]:
    """Milliseconds of every implementation."""
    names = unique(implementation(row) for row in rows)
    body = []
    for workload in Lookup(rows).workloads:
        found = best([row for row in rows if row["workload"] == workload])
        fused = [row for name, row in found.items() if name != "eager"]
        least = min(fused, key=lambda row: row["median_ms"], default={})
        over = least.get("speedup_over", {}).get(f"eager {CL}")
        ms = [number(found.get(name, {}).get("median_ms"), ".3g") for name in names]
        share = number(least.get("percent_of_roofline"), ".3g")
        config = found.get("triton", {}).get("config") or {"": "-"}
        config = " ".join(map(str, config.values()))
        body.append([workload.removeprefix("conv "), *ms, number(over), share, config])
    header = ["convolution", *(f"{name}, ms" for name in names), "fastest over eager",
              "% of roofline", "Triton's configuration"]  # fmt: skip
    return [intro, to_markdown(header, body), caption(rows)]


REPORT = partial(
    table,
    "The convolutions of ResNet-18 and ResNet-50, each with BatchNorm, residual and ReLU, called "
    "from Python: each implementation, Triton's in its fastest configuration.",
)
TRAINING_REPORT = partial(
    table,
    "The convolutions of blocks in training, one way, with what comes with them: PyTorch's and "
    "passes over memory of Triton's, and Triton's own in its fastest configuration.",
)


def timings(rows: list[dict]) -> list[dict]:
    """Of each call every implementation's fastest, and Triton's configuration."""
    out = []
    for workload in unique(row["workload"] for row in rows):
        found = best([row for row in rows if row["workload"] == workload])
        if found:
            row = next(iter(found.values()))
            ms = {name: row["median_ms"] for name, row in found.items()}
            config = found.get("triton", {}).get("config")
            call = {"op": "conv_bn_act", **row["call"], "ms": ms, "config": config}
            out.append({**on_device(row), **call})
    return out


SUITES = (
    Suite("convs", 90, workloads, named=True, gpu_report=REPORT, timings=timings),
    Suite("training-convs", 91, training_workloads, named=True, why_not=why_no_triton,
          gpu_report=TRAINING_REPORT, timings=timings),
    Suite("resnet50-convs", 92, resnet50_workloads, named=True, why_not=why_no_triton,
          gpu_report=TRAINING_REPORT, timings=timings),
)  # fmt: skip
