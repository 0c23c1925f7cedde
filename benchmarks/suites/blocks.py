"""Residual blocks in training and in eval mode: those that ``fuse_`` fuses whole, and in part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness.program import FORMATS, TensorProgram, double, place, same, separate
from harness.suite import CL, STEP, Build, Kernel, Options, Plot, Suite, TrainingWorkload, why_none
from report.tables import AGAINST, Lookup, Table, claims, figure, over, saved
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_conv_bn_weights

from fused_res import FusedResBlock, fuse_
from fused_res.models import ResNet
from fused_res.nn.blocks import FusedForward, FusedStem
from fused_res.reference import ResBlock

from .ops import bn_act_bytes

Shape = tuple[int, int, int, int]


def fused(net: nn.Module, backend: str) -> nn.Module:
    """``net`` with every residual block and its stem fused, run by ``backend`` or not at all."""
    fuse_(net, strict=True)
    for part in net.modules():
        if isinstance(part, (FusedForward, FusedStem)):
            part.backend = backend
    return net


# --- BatchNorm folded into the weights, then cuDNN's convolution + add + ReLU in one call: how one
# builds a net for inference by hand in PyTorch


class FoldedConv(nn.Module):
    """A convolution with its BatchNorm folded in, then + z and a ReLU, in one call on a GPU.

    The same in PyTorch's ops on a CPU, where cuDNN is not, and where channels are not in eights,
    which the fused engines want.
    """

    def __init__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype, relu: bool = True
    ) -> None:
        super().__init__()
        norm = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        weight, bias = fuse_conv_bn_weights(conv.weight.float(), conv.bias, *norm)
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.relu = relu
        self.fusable = relu and not (weight.size(0) % 8 or weight.size(1) % 8)
        # the order of F.conv2d's last arguments, and of cuDNN's
        self.how = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        if x.is_cuda and self.fusable:
            if z is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.how)
            return torch.cudnn_convolution_add_relu(x, self.weight, z, 1.0, self.bias, *self.how)
        y = F.conv2d(x, self.weight, self.bias, *self.how)
        if z is not None:
            y = y + z
        return F.relu(y) if self.relu else y


class FoldedBlock(nn.Module):
    """A residual block in eval mode, one call for each convolution with all that follows it."""

    def __init__(self, block: ResBlock, dtype: torch.dtype) -> None:
        super().__init__()
        *inner, self.last = (
            FoldedConv(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), dtype)
            for i in range(1, block.depth + 1)
        )
        self.inner = nn.Sequential(*inner)
        self.add_inside = block.relu_placement == "after"
        down = block.downsample
        self.shortcut = None if down is None else FoldedConv(*down, dtype, relu=False)
        if self.shortcut is not None and self.add_inside:
            # one bias for both: PyTorch adds a bias without a ReLU in a pass of its own
            self.last.bias += self.shortcut.bias
            self.shortcut.bias = None

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.shortcut is None else self.shortcut(x)
        out = self.inner(x)
        return self.last(out, z) if self.add_inside else self.last(out) + z


def folded(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A net or a block in eval mode, in ``dtype`` throughout.

    A net's first convolution runs in PyTorch's ops: the fused engines do not take 3 channels.
    """
    net = nn.Sequential(net).eval()
    for parent in list(net.modules()):
        if isinstance(parent, ResNet):
            parent.conv1 = fuse_conv_bn_eval(parent.conv1.float(), parent.bn1)
            parent.bn1 = nn.Identity()
        for name, part in list(parent.named_children()):
            if isinstance(part, ResBlock):
                setattr(parent, name, FoldedBlock(part, dtype))
    net.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
    return net.to(dtype, memory_format=torch.channels_last)


# --- workloads


def product_kernel(layer: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor, item: int) -> Kernel:
    """What a layer computes and moves: it reads x and its weight, and writes y.

    item: bytes of an element.
    """
    read = x.numel()
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        # a strided 1x1 reads only the pixels it keeps
        read = read * y[0, 0].numel() // x[0, 0].numel()
    moved = read + layer.weight.numel() + y.numel()
    return Kernel(2 * y.numel() * layer.weight[0].numel(), item * moved)


@dataclass(frozen=True)
class BlockWorkload(TrainingWorkload):
    kind: str = "basic"
    width: int | None = None
    out_channels: int | None = None
    stride: int = 1

    compile_s = 20.0
    counts_saved = True

    def block(self, device=None, dtype=None) -> nn.Module:
        """In plain PyTorch."""
        return self._make(ResBlock, device=device, dtype=dtype)

    def _make(self, factory: Callable[..., nn.Module], **kwargs) -> nn.Module:
        args = self.shape[1], self.shape_out()[1], self.stride
        return factory(*args, kind=self.kind, width=self.width, **kwargs)

    def shape_out(self) -> Shape:
        n, c, h, w = self.shape
        return n, self.out_channels or c, -(-h // self.stride), -(-w // self.stride)

    def program(
        self,
        make: Callable[..., nn.Module],
        v: dict[str, Tensor],
        layout: str = CL,
        wrap: Callable = same,
    ) -> TensorProgram:
        """``make``'s block with the values ``v``; what is called is ``wrap`` of it."""
        v = place(v, layout)
        module = make(device=v["x"].device, dtype=v["bn1.weight"].dtype)
        module.load_state_dict({k: t for k, t in v.items() if k not in ("x", "dy")}, strict=False)
        for part in module.modules():
            if isinstance(part, (nn.Conv1d, nn.Conv2d)):  # BatchNorm stays in float32
                part.to(v["x"].dtype)
        module = module.to(memory_format=FORMATS[layout]).train(self.training)
        state = {name: t for name, t in module.named_buffers() if t.is_floating_point()}
        wrt = {"x": v["x"], **dict(module.named_parameters())} if self.training else {}
        if self.training:
            v["x"].requires_grad_()
        call, x = wrap(module), v["x"]
        return TensorProgram(lambda: call(x), self.directions, wrt, state, v["dy"], (x,), module)

    def values(self, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """x, dy and the block's parameters under their names.

        What has four dimensions is of the workload's dtype; BatchNorm's is float32, as under
        autocast.
        """
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        v = {"x": normal(self.shape), "dy": normal(self.shape_out())}
        block = self.block()
        for name, p in block.named_parameters():
            if p.dim() == 4:  # He et al., 2015
                v[name] = normal(p.shape) * (2 / p[0].numel()) ** 0.5
            else:
                v[name] = float(name.endswith("weight")) + 0.2 * normal(p.shape)
        for name, t in block.named_buffers():
            if not self.training and t.is_floating_point():
                # around the statistics that the convolutions' outputs have
                v[name] = 0.2 * normal(t.shape)
                if name.endswith("var"):
                    v[name] = 2 + v[name].abs()
        v = {name: t.to(self.dtype) if t.dim() == 4 else t for name, t in v.items()}
        if self.training and self.dtype == torch.float32:
            separate(v["x"], v, self._relu_inputs)
        return v

    def _relu_inputs(self, v: dict[str, Tensor]) -> list[Tensor]:
        seen: list[Tensor] = []
        program = self.program(self.block, v, "NCHW")
        program.module.relu.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        program.forward()
        return seen

    def exact(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.program(self.block, double(v), "NCHW").result()

    def eager(self, layout: str) -> Build:
        return partial(self.program, self.block, layout=layout)

    def compiled(self, options: dict) -> Build:
        return partial(self.program, self.block, wrap=partial(torch.compile, **options))

    def fused(self, backend: str) -> Build:
        return partial(self.program, partial(self._make, FusedResBlock, backend=backend))

    def folded(self) -> Build | None:
        return partial(self.program, self.block, wrap=partial(FoldedBlock, dtype=self.dtype))

    def convolutions(self) -> dict[str, tuple[int, int]]:
        """By name, the bytes that each convolution moves and those that it writes.

        Hooks see them on tensors without data.
        """
        found, item = {}, self.dtype.itemsize
        block = self.block(device="meta")
        for name, part in block.named_modules():
            if isinstance(part, nn.Conv2d):

                def seen(conv: nn.Conv2d, args: tuple, y: Tensor, name: str = name) -> None:
                    found[name] = product_kernel(conv, *args, y, item).bytes, item * y.numel()

                part.register_forward_hook(seen)
        block(torch.empty(self.shape, device="meta"))
        return found

    def moved_bytes(self, direction: str) -> int | None:
        """By every bn_act, ideally, and by the convolutions of ATen, cuDNN or oneDNN beside them.

        Statistics need a pass of their own: in training x is read twice forward, x and dy backward.
        """
        numbers = torch.Size(self.shape_out()).numel()
        size = self.dtype.itemsize * numbers
        forward, backward = bn_act_bytes(numbers, self.dtype)
        evaluated = 3 * size  # x, residual -> y
        if self.kind == "single":
            backward -= size  # the ReLU comes before the add: dresidual is dy
        if self.shape_out() != self.shape:
            # the statistics of the projection's BatchNorm read the projection once more
            forward += size
            backward += 2 * size
        # of branch and skip, added
        backward += 3 * self.dtype.itemsize * torch.Size(self.shape).numel()
        convs = self.convolutions()
        *inside, _ = [name for name in convs if name.startswith("conv")]
        for name, (operands, written) in convs.items():
            forward += operands
            evaluated += operands
            backward += 2 * operands
            if name in inside:
                forward += 3 * written  # a, a -> z
                backward += 5 * written  # dz, a; dz, a -> da
                evaluated += 2 * written
        return {"forward": forward, STEP: forward + backward, "eval": evaluated}[direction]


def block(
    kind: str,
    shape: Shape,
    width: int | None = None,
    out: int | None = None,
    stride: int = 1,
    **fields,
) -> BlockWorkload:
    """out: channels, where they are not x's."""
    channels = "-".join(str(c) for c in (shape[1], width, out) if c)
    strided = f" stride {stride}" if out else ""
    name = f"{kind} {channels}ch {shape[2]}x{shape[3]}{strided} batch {shape[0]}"
    given = {"kind": kind, "width": width, "out_channels": out, "stride": stride}
    return BlockWorkload("blocks", name, shape, **given, **fields)


def both(workload: BlockWorkload) -> list[BlockWorkload]:
    """Its training step, then eval mode."""
    return [replace(workload, directions=(direction,)) for direction in (STEP, "eval")]


BLOCKS = (
    ("basic", (32, 64, 56, 56)), ("basic", (32, 64, 32, 32)), ("basic", (32, 512, 7, 7)),
    ("bottleneck", (16, 256, 56, 56), 64), ("single", (64, 32, 16, 16)),
    ("single", (64, 32, 8, 8)),
)  # fmt: skip
QUICK = ("bottleneck", (4, 64, 12, 12), 16), ("single", (8, 16, 9, 9))
GPU_BLOCKS = (
    ("bottleneck", (128, 256, 56, 56), 64), ("single", (64, 32, 16, 16)),
    ("basic", (256, 64, 32, 32)), ("bottleneck", (128, 512, 28, 28), 128),
    ("bottleneck", (256, 2048, 7, 7), 512), ("basic", (128, 64, 56, 56)),
    ("bottleneck", (256, 1024, 14, 14), 256), ("bottleneck", (128, 256, 56, 56), 128, 512, 2),
    ("basic", (256, 512, 7, 7)),
)  # fmt: skip
GPU_QUICK = ("single", (8, 16, 9, 9)), ("bottleneck", (4, 32, 12, 12), 16, 64, 2)


def workloads(gpu: bool, quick: bool) -> list[BlockWorkload]:
    if not gpu:
        return [block(*args) for args in (QUICK if quick else BLOCKS)]
    found = [block(*args, dtype=torch.bfloat16) for args in (GPU_QUICK if quick else GPU_BLOCKS)]
    return [one for workload in found for one in both(workload)]


REPORT = Table(
    "Blocks in training",
    "A whole block in training, forward and backward ({candidate}, channels_last): speed-up over "
    "PyTorch, and what is saved for backward.",
    "block",
    [
        over("step over PyTorch, NCHW", "eager NCHW", direction=STEP),
        over(f"over PyTorch, {CL}", f"eager {CL}", direction=STEP),
        over("over torch.compile", "compile", direction=STEP),
        over(f"forward over PyTorch, {CL}", f"eager {CL}", direction="forward"),
        figure("step, ms", "median_ms", direction=STEP),
        saved(),
    ],
)
GPU_REPORT = Table(
    "Blocks on a GPU",
    "A whole block ({candidate}, channels_last): speed-up over PyTorch, and what is saved for "
    "backward.",
    "block",
    [*AGAINST, figure("ms", "median_ms"), saved()],
    by_direction=True,
)


def targets(rows: list[dict]) -> list[tuple[bool, str]]:
    blocks, out = Lookup(rows), []
    deep = [w for w in blocks.workloads if w.startswith("bottleneck")]
    kinds = [
        ("32 channels", [w for w in blocks.workloads if " 32ch " in w], 1.6),
        ("basic, 64 channels", [w for w in blocks.workloads if " 64ch " in w], 1.1),
        ("bottleneck", deep, 1.3),
    ]
    best = f"eager {CL}", "compile", "compile-max-autotune"
    for candidate in blocks.fused:
        for allocator in blocks.allocators:
            what = f"{candidate}, allocator {allocator}: block step over the best of PyTorch"
            case = candidate, STEP, allocator, *best
            out += claims((what, blocks.speedups(blocks.workloads, *case), 1.0, 6, 6))
            for kind, names, least in kinds:
                speeds, count = blocks.speedups(names, *case), len(names)
                out += claims((f"{what}, {kind}", speeds, least, count, count))
        ratios = blocks.speedups(deep, candidate, "saved", blocks.allocators[0], "eager")
        spared = [None if x is None else 1 - 1 / x for x in ratios]
        what = f"{candidate}: share of saved bytes spared, bottleneck"
        out += claims((what, spared, 0.15, 1, 1))
    return out


# --- blocks that are fused in part: with attention, another activation or another order


class PartialBlock(ResBlock):
    """A basic block or bottleneck with more in it.

    Args:
        extra: ``SE``: its branch weighted by squeeze-and-excitation (Hu et al., 2018), ``ECA``: by
            efficient channel attention (Wang et al., 2020); ``SiLU`` in place of every ReLU;
            ``pre-activation``: BatchNorm and ReLU before each convolution (He et al., 2016b).
    """

    def __init__(self, *args, extra: str, device=None, dtype=None, **kwargs) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(*args, **factory, **kwargs)
        self.extra = extra
        channels = getattr(self, f"conv{self.depth}").out_channels
        if extra == "SE":
            inner = max(channels // 16, 8)
            self.squeeze = nn.Conv2d(channels, inner, 1, **factory)
            self.excite = nn.Conv2d(inner, channels, 1, **factory)
        elif extra == "ECA":
            self.across = nn.Conv1d(1, 1, 5, padding=2, bias=False, **factory)
        elif extra == "SiLU":
            self.silu = nn.SiLU()
        else:
            for i in range(1, self.depth + 1):
                before = getattr(self, f"conv{i}").in_channels
                setattr(self, f"bn{i}", nn.BatchNorm2d(before, **factory))

    def forward(self, x: Tensor) -> Tensor:
        act = self.silu if self.extra == "SiLU" else self.relu
        z = x
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if self.extra == "pre-activation":
                z = conv(self.relu(norm(z)))
            else:
                z = norm(conv(z))
                z = z if i == self.depth else act(z)
        if self.extra == "pre-activation":
            return z + x
        if self.extra == "SE":
            z = z * self.excite(self.relu(self.squeeze(z.mean((2, 3), keepdim=True)))).sigmoid()
        elif self.extra == "ECA":
            weights = self.across(z.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(3)
            z = z * torch.sigmoid(weights)
        return act(z + x)


@dataclass(frozen=True)
class PartialWorkload(BlockWorkload):
    extra: str = "SE"

    def block(self, device=None, dtype=None) -> nn.Module:
        return self._make(PartialBlock, extra=self.extra, device=device, dtype=dtype)

    def fused(self, backend: str) -> Build:
        return partial(self.program, self.block, wrap=partial(fused, backend=backend))

    def folded(self) -> Build | None:
        return None

    def backends(self, device: str, options: Options) -> dict[str, str | None]:
        if options.gpu:
            return super().backends(device, options)
        return {"auto": why_none(device, self.dtype)}  # which leaves some norms to PyTorch

    def winograd(self) -> int:
        return self.block(device="meta").depth

    def moved_bytes(self, direction: str) -> int | None:
        return None


PARTIAL_BLOCKS = (
    ("SE", "basic", (32, 64, 32, 32)), ("SE", "bottleneck", (16, 256, 28, 28), 64),
    ("ECA", "bottleneck", (16, 256, 28, 28), 64), ("SiLU", "bottleneck", (16, 256, 28, 28), 64),
    ("pre-activation", "bottleneck", (16, 256, 28, 28), 64),
    ("SE", "bottleneck", (16, 1024, 14, 14), 256),
)  # fmt: skip
PARTIAL_QUICK = (
    ("SE", "basic", (4, 16, 9, 9)), ("ECA", "bottleneck", (4, 32, 9, 9), 16),
    ("SiLU", "basic", (4, 16, 9, 9)), ("pre-activation", "bottleneck", (4, 32, 9, 9), 16),
)  # fmt: skip
GPU_PARTIAL = (
    ("SE", "bottleneck", (128, 256, 56, 56), 64), ("ECA", "bottleneck", (128, 512, 28, 28), 128),
    ("SiLU", "bottleneck", (128, 512, 28, 28), 128),
    ("pre-activation", "bottleneck", (128, 256, 56, 56), 64), ("SE", "basic", (256, 64, 32, 32)),
)  # fmt: skip


def partial_workloads(gpu: bool, quick: bool) -> list[PartialWorkload]:
    found = []
    blocks = PARTIAL_QUICK[: 1 if gpu else None]
    if not quick:
        blocks = GPU_PARTIAL if gpu else PARTIAL_BLOCKS
    for extra, *args in blocks:
        plain = replace(block(*args), suite="partial")
        name = f"{extra} {plain.name}" + " bf16" * (gpu and not quick)
        one = PartialWorkload(**vars(plain) | {"name": name}, extra=extra)
        found += both(replace(one, dtype=torch.bfloat16) if gpu else one)
    return found


def _columns(what: str, direction: str) -> list:
    return [
        over(f"{what} over PyTorch, {CL}", f"eager {CL}", direction=direction),
        over(f"{what} over torch.compile", "compile", direction=direction),
        figure(f"{what} ms", "median_ms", direction=direction),
    ]


PARTIAL_REPORT = Table(
    "Blocks fused in part",
    "Blocks that {candidate} fuses in part (channels_last): speed-up of a training step and, in "
    "eval mode without gradients, of inference; and what is saved for backward.",
    "block",
    [*_columns("step", STEP), *_columns("inference", "eval"), saved(STEP)],
)
GPU_PARTIAL_REPORT = replace(
    GPU_REPORT,
    title="Blocks fused in part on a GPU",
    intro="A block that `fuse_` fuses in part ({candidate}, channels_last): speed-up over PyTorch, "
    "and what is saved for backward.",
)


def partial_targets(rows: list[dict]) -> list[tuple[bool, str]]:
    found, out = Lookup(rows), []
    for candidate, allocator in found.pairs:
        for direction, what in (STEP, "step"), ("eval", "inference"):
            over = found.speedups(found.workloads, candidate, direction, allocator, f"eager {CL}")
            what = f"{candidate}, allocator {allocator}: {what} of blocks fused in part"
            out += claims((f"{what} over eager {CL}", over, 1.0, 6, 6))
    return out


SUITES = (
    Suite("blocks", 20, workloads, report=REPORT, gpu_report=GPU_REPORT, targets=targets,
          plot=Plot("blocks", (STEP, "eval"))),
    Suite("partial", 30, partial_workloads, named=True, report=PARTIAL_REPORT,
          gpu_report=GPU_PARTIAL_REPORT, targets=partial_targets),
)  # fmt: skip
