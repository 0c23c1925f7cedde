"""Residual blocks: a training step or, on a GPU, eval mode too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from harness.cudnn import FoldedBlock
from harness.program import FORMATS, TensorProgram, double, place, same, separate
from harness.suite import CL, STEP, Build, Plot, Suite, TrainingWorkload
from report.tables import AGAINST, Lookup, Table, claims, figure, over, saved
from torch import Tensor, nn

from fused_res import FusedResBlock
from fused_res.reference import ResBlock

Shape = tuple[int, int, int, int]


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

    def convolutions(self) -> list[tuple[int, int, int, int, int]]:
        """(channels in, channels out, size, pixels read, pixels written) of the branch's."""
        n, c, h, w = self.shape
        _, out, p, q = self.shape_out()
        inner, before, after = self.width or c, n * h * w, n * p * q
        return {
            "basic": [(c, inner, 3, before, after), (inner, out, 3, after, after)],
            "bottleneck": [
                (c, inner, 1, before, before),
                (inner, inner, 3, before, after),
                (inner, out, 1, after, after),
            ],
            "single": [(c, out, 3, before, after)],
        }[self.kind]

    def moved_bytes(self, direction: str) -> int | None:
        """By every bn_act, ideally, and by the convolutions of ATen, cuDNN or oneDNN beside them.

        Statistics need a pass of their own: in training x is read twice forward, x and dy backward.
        """
        item = self.dtype.itemsize
        n, c, h, w = self.shape_out()
        size, mask = item * n * c * h * w, n * c * h * w // 8
        forward = 4 * size + mask  # x, x, residual -> y, mask
        backward = 6 * size + 2 * mask  # dy, x, mask; dy, x, mask -> dx, dresidual
        evaluated = 3 * size  # x, residual -> y
        branch = self.convolutions()
        convs = list(branch)
        if self.kind == "single":
            backward -= size  # the ReLU comes before the add: dresidual is dy
        if self.shape_out() != self.shape:
            # a strided 1x1 reads only the pixels it keeps; its BatchNorm's statistics read it again
            convs.append((self.shape[1], c, 1, n * h * w, n * h * w))
            forward += size
            backward += 2 * size
        backward += 3 * item * torch.Size(self.shape).numel()  # of branch and skip, added
        for c_in, c_out, k, read, written in convs:
            operands = item * (read * c_in + written * c_out + c_in * c_out * k * k)
            forward += operands
            evaluated += operands
            backward += 2 * operands
        for _, c_out, _, _, written in branch[:-1]:
            forward += 3 * item * written * c_out  # a, a -> z
            backward += 5 * item * written * c_out  # dz, a; dz, a -> da
            evaluated += 2 * item * written * c_out
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
    best = [f"eager {CL}", "compile", "compile-max-autotune"]
    for candidate in blocks.fused:
        for allocator in blocks.allocators:
            what = f"{candidate}, allocator {allocator}: block step over the best of PyTorch"
            steps = {
                w: blocks.speedup(w, candidate, STEP, allocator, best) for w in blocks.workloads
            }
            out += claims((what, list(steps.values()), 1.0, 6, 6))
            for kind, names, least in kinds:
                found = [steps[name] for name in names]
                out += claims((f"{what}, {kind}", found, least, len(names), len(names)))
        ratios = [
            blocks.speedup(w, candidate, "saved", blocks.allocators[0], ["eager"]) for w in deep
        ]
        spared = [None if x is None else 1 - 1 / x for x in ratios]
        what = f"{candidate}: share of saved bytes spared, bottleneck"
        out += claims((what, spared, 0.15, 1, 1))
    return out


SUITES = (
    Suite("blocks", 20, workloads, report=REPORT, gpu_report=GPU_REPORT, targets=targets,
          plot=Plot("blocks", (STEP, "eval"))),
)  # fmt: skip
