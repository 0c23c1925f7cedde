"""What is timed: the workloads of each suite, and the bytes that an ideal kernel moves in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fused_res.dispatch import training_conv
from fused_res.reference import ConvNorm, Norm, ResBlock

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CL = "channels_last"
STEP = "forward+backward"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Conv:
    """A call of ``conv_bn_act``: a square kernel, padded so that a stride of 1 keeps the size.

    residual: ``none``, ``add``, or ``shortcut``: a 1x1 of another tensor, which has
    ``shortcut_channels`` and ``shortcut_stride`` times the output's size.
    """

    out_channels: int
    size: int
    stride: int = 1
    residual: str = "none"
    shortcut_channels: int = 0
    shortcut_stride: int = 1


@dataclass(frozen=True)
class Workload:
    """``layout`` is that of x, or None where each rival has its own (all but ``ops``).

    ``directions`` are the calls that are timed: ``forward`` and ``forward+backward`` in training,
    ``eval`` (no gradients, BatchNorm by its running statistics), ``train`` (an optimizer's whole
    step). The last one is checked. ``net`` names one of ``nets.NETS``; ``conv`` is of ``convs``,
    ``call`` of ``training-convs``, ``extra`` of ``parts``: see ``parted``.

    most_rounds: of those asked for, where one call takes a second.
    alone: rivals run one after the other, where all of them would not fit in the memory.
    """

    suite: str
    name: str
    shape: tuple[int, int, int, int]
    layout: str | None = None
    kind: str = "basic"
    width: int | None = None
    out_channels: int | None = None
    stride: int = 1
    extra: str | None = None
    net: str | None = None
    conv: Conv | None = None
    call: training_conv.Call | None = None
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("forward", STEP)
    most_rounds: int | None = None
    alone: bool = False

    @property
    def inference(self) -> bool:
        return self.suite in ("inference", "chains", "convs")

    @property
    def training(self) -> bool:
        return "eval" not in self.directions

    @property
    def channels_out(self) -> int:
        return self.out_channels or self.shape[1]

    def shape_out(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.shape
        return n, self.channels_out, -(-h // self.stride), -(-w // self.stride)

    def block_arguments(self) -> tuple[tuple[int, int, int], dict]:
        args = self.shape[1], self.channels_out, self.stride
        kwargs = {"kind": self.kind, "width": self.width}
        return args, kwargs if self.extra is None else {**kwargs, "extra": self.extra}


def _op(shape: tuple[int, int, int, int], layout: str) -> Workload:
    return Workload("ops", f"bn_act {'x'.join(map(str, shape))} {layout}", shape, layout)


def _block(kind: str, shape: tuple[int, int, int, int], width: int | None = None) -> Workload:
    channels = f"{shape[1]}-{width}" if width else f"{shape[1]}"
    name = f"{kind} {channels}ch {shape[2]}x{shape[3]} batch {shape[0]}"
    return Workload("blocks", name, shape, None, kind, width)


def _parts(
    extra: str, kind: str, shape: tuple[int, int, int, int], width: int | None = None
) -> list[Workload]:
    """The block's training step, then the block in eval mode."""
    block = _block(kind, shape, width)
    block = replace(block, suite="parts", name=f"{extra} {block.name}", extra=extra)
    return [replace(block, directions=(STEP,)), replace(block, directions=("eval",))]


def _inference_block(
    kind: str, shape: tuple[int, int, int, int], width: int | None = None
) -> Workload:
    block = _block(kind, shape, width)
    return replace(block, suite="inference", directions=("eval",))


def _inference_net(
    net: str, batch: int, pixels: int = 224, most_rounds: int | None = None
) -> Workload:
    name = f"{net} batch {batch}"
    shape = batch, 3, pixels, pixels
    return Workload(
        "inference", name, shape, net=net, directions=("eval",), most_rounds=most_rounds
    )


def _chain(
    count: int, channels: int, pixels: int, batch: int, most_rounds: int | None = None
) -> Workload:
    net = f"chain of {count}, {channels}ch"
    name, shape = f"{net} {pixels}x{pixels} batch {batch}", (batch, channels, pixels, pixels)
    return Workload("chains", name, shape, net=net, directions=("eval",), most_rounds=most_rounds)


OP_SHAPES = (
    (32, 64, 56, 56),
    (32, 64, 32, 32),
    (32, 512, 7, 7),
    (16, 256, 56, 56),
    (64, 32, 16, 16),
    (64, 32, 8, 8),
)
CPU_SUITES = {
    "ops": [_op(shape, layout) for layout in FORMATS for shape in OP_SHAPES],
    "blocks": [
        _block("basic", (32, 64, 56, 56)),
        _block("basic", (32, 64, 32, 32)),
        _block("basic", (32, 512, 7, 7)),
        _block("bottleneck", (16, 256, 56, 56), 64),
        _block("single", (64, 32, 16, 16)),
        _block("single", (64, 32, 8, 8)),
    ],
    "parts": [
        *_parts("SE", "basic", (32, 64, 32, 32)),
        *_parts("SE", "bottleneck", (16, 256, 28, 28), 64),
        *_parts("ECA", "bottleneck", (16, 256, 28, 28), 64),
        *_parts("SiLU", "bottleneck", (16, 256, 28, 28), 64),
        *_parts("pre-activation", "bottleneck", (16, 256, 28, 28), 64),
        *_parts("SE", "bottleneck", (16, 1024, 14, 14), 256),
    ],
    "inference": [
        _inference_net("torchvision ResNet-18", 1),
        _inference_net("torchvision ResNet-18", 16, most_rounds=7),
        _inference_net("torchvision ResNet-50", 1),
        _inference_net("torchvision ResNet-50", 16, most_rounds=5),
        _inference_block("basic", (1, 64, 56, 56)),
        _inference_block("basic", (32, 64, 56, 56)),
        _inference_block("basic", (1, 512, 7, 7)),
        _inference_block("basic", (32, 512, 7, 7)),
        _inference_block("bottleneck", (1, 256, 56, 56), 64),
        _inference_block("bottleneck", (16, 256, 56, 56), 64),
    ],
    "chains": [
        _chain(100, 32, 16, 1),
        _chain(100, 32, 8, 1),
        _chain(100, 32, 16, 64, most_rounds=9),
        _chain(100, 32, 8, 64),
        replace(_inference_net("ResNet-20 CIFAR", 1, 32), suite="chains"),
    ],
}
CPU_QUICK = {
    "ops": [_op((8, 16, 12, 12), layout) for layout in FORMATS],
    "blocks": [_block("bottleneck", (4, 64, 12, 12), 16), _block("single", (8, 16, 9, 9))],
    "parts": [
        *_parts("SE", "basic", (4, 16, 9, 9)),
        *_parts("ECA", "bottleneck", (4, 32, 9, 9), 16),
        *_parts("SiLU", "basic", (4, 16, 9, 9)),
        *_parts("pre-activation", "bottleneck", (4, 32, 9, 9), 16),
    ],
    "inference": [
        _inference_net("small ResNet", 1, 32),
        _inference_block("basic", (2, 16, 9, 9)),
    ],
    "chains": [_chain(3, 16, 8, 1)],
}

# --- on a GPU: the most important first, for a run that is out of time leaves out the rest


def _gpu_op(shape: tuple[int, int, int, int], layout: str = CL, dtype: str = "bf16") -> Workload:
    op = _op(shape, layout)
    return replace(op, name=f"{op.name} {dtype}", dtype=DTYPES[dtype])


def _gpu_block(
    kind: str,
    shape: tuple[int, int, int, int],
    width: int | None = None,
    out: int | None = None,
    stride: int = 1,
) -> list[Workload]:
    """The block's training step, then the block in eval mode."""
    block = _block(kind, shape, width)
    name = block.name
    if out:
        name = name.replace(f"{width}ch", f"{width}-{out}ch")
        name = name.replace(" batch", f" stride {stride} batch")
    block = replace(block, name=name, out_channels=out, stride=stride, dtype=torch.bfloat16)
    return [replace(block, directions=(STEP,)), replace(block, directions=("eval",))]


def _net(net: str, batch: int, direction: str, pixels: int = 32) -> Workload:
    shape = (batch, 3, pixels, pixels)
    return Workload(
        "nets",
        f"{net} batch {batch}",
        shape,
        net=net,
        dtype=torch.bfloat16,
        directions=(direction,),
        alone=True,
    )


def _in(dtype: str, workload: Workload) -> Workload:
    """An inference workload of a GPU."""
    name = f"{workload.name} {dtype}"
    return replace(workload, name=name, dtype=DTYPES[dtype], alone=workload.net is not None)


def _conv(shape: tuple[int, int, int, int], dtype: str, conv: Conv) -> Workload:
    channels = f"{shape[1]}-{conv.out_channels}ch {shape[2]}x{shape[3]}"
    what = "" if conv.stride == 1 else f" stride {conv.stride}"
    if conv.residual != "none":
        what += f" {conv.residual}"
    if conv.residual == "shortcut":
        what += f" {conv.shortcut_channels}ch stride {conv.shortcut_stride}"
    name = f"conv {conv.size}x{conv.size} {channels}{what} batch {shape[0]} {dtype}"
    return Workload("convs", name, shape, CL, conv=conv, dtype=DTYPES[dtype], directions=("eval",))


def _convs(bottleneck: bool, batch: int, dtype: str) -> list[Workload]:
    """The calls of a ResNet-50 or, of basic blocks, a ResNet-18 on images of 224 pixels."""
    width, size = 64, 56
    out = [_conv((batch, 3, 224, 224), dtype, Conv(64, 7, 2))]
    for stage in range(4):
        inner = 64 << stage
        last = 4 * inner if bottleneck else inner
        for stride in (2 if stage else 1, 1):  # the first block; all others are alike
            after = size // stride
            residual = ("add",) if width == last else ("shortcut", width, stride)
            here, then = (batch, width, size, size), (batch, inner, after, after)
            if bottleneck:
                out.append(_conv(here, dtype, Conv(inner, 1)))
                out.append(_conv((batch, inner, size, size), dtype, Conv(inner, 3, stride)))
            else:
                out.append(_conv(here, dtype, Conv(inner, 3, stride)))
            out.append(_conv(then, dtype, Conv(last, 1 if bottleneck else 3, 1, *residual)))
            width, size = last, after
    return out


def _calls(kind: str, x: torch.Tensor, out: int, stride: int) -> list[training_conv.Call]:
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


def _training_convs(
    kind: str, channels: tuple[int, ...], size: int, batch: int, dtype: str = "bf16"
) -> list[Workload]:
    """The convolutions of a net's blocks, both ways; ``channels`` of each stage."""
    width = channels[0] // 4 if kind == "bottleneck" else channels[0]
    found: dict[training_conv.Call, None] = {}
    for stage, out in enumerate(channels):
        for stride in (2 if stage else 1, 1):  # the first block; all others are alike
            shape = batch, width, size, size
            x = torch.empty(
                shape, dtype=DTYPES[dtype], device="meta", memory_format=torch.channels_last
            )
            found |= dict.fromkeys(_calls(kind, x, out, stride))
            width, size = out, size // stride
    out = []
    for call in found:
        (n, c, h, w), (k, _, r, s) = call.shape, call.weight
        strided = "" if call.stride == (1, 1) else f" stride {call.stride[0]}"
        way = "backward" if call.backward else "forward"
        what = f"{r}x{s} {c}-{k}ch {h}x{w}{strided} {way}" + f", {call.end}" * bool(call.end)
        name = f"training conv {what}, batch {n} {dtype}"
        suite = "training-convs"
        out.append(
            Workload(suite, name, call.shape, CL, call=call, dtype=call.dtype, directions=(way,))
        )
    return out


def _gpu_inference_block(*args, out: int | None = None, stride: int = 1) -> Workload:
    block = _gpu_block(*args, out=out, stride=stride)[1]
    return _in("bf16", replace(block, suite="inference"))


GPU_SUITES = {
    "ops": [
        _gpu_op((128, 256, 56, 56)),
        _gpu_op((256, 64, 56, 56)),
        _gpu_op((64, 32, 16, 16)),
        _gpu_op((512, 64, 32, 32)),
        _gpu_op((256, 512, 7, 7)),
        _gpu_op((128, 512, 28, 28)),
        _gpu_op((256, 1024, 14, 14)),
        _gpu_op((256, 2048, 7, 7)),
        _gpu_op((128, 16, 32, 32)),
        _gpu_op((256, 64, 56, 56), "NCHW"),
        _gpu_op((256, 64, 56, 56), dtype="fp16"),
        _gpu_op((128, 64, 56, 56), dtype="fp32"),
        _gpu_op((1024, 16, 32, 32)),
        _gpu_op((256, 128, 28, 28)),
        _gpu_op((512, 64, 8, 8)),
        _gpu_op((512, 512, 4, 4)),
        _gpu_op((256, 32, 16, 16)),
        _gpu_op((32, 64, 56, 56)),
        _gpu_op((32, 2048, 7, 7)),
        _gpu_op((256, 512, 7, 7), "NCHW"),
        _gpu_op((128, 64, 32, 32), "NCHW", "fp32"),
    ],
    "blocks": [
        *_gpu_block("bottleneck", (128, 256, 56, 56), 64),
        *_gpu_block("single", (64, 32, 16, 16)),
        *_gpu_block("basic", (256, 64, 32, 32)),
        *_gpu_block("bottleneck", (128, 512, 28, 28), 128),
        *_gpu_block("bottleneck", (256, 2048, 7, 7), 512),
        *_gpu_block("basic", (128, 64, 56, 56)),
        *_gpu_block("bottleneck", (256, 1024, 14, 14), 256),
        *_gpu_block("bottleneck", (128, 256, 56, 56), 128, 512, 2),
        *_gpu_block("basic", (256, 512, 7, 7)),
    ],
    "nets": [
        _net("ResNet-50", 256, "train", 224),
        _net("ResNet-20 CIFAR", 128, "train"),
        _net("100 blocks", 64, "train"),
        _net("ResNet-50", 256, "eval", 224),
        _net("ResNet-18 CIFAR", 512, "train"),
        _net("ResNet-20 CIFAR", 128, "eval"),
        _net("100 blocks", 64, "eval"),
        _net("ResNet-20 CIFAR", 1024, "train"),
        _net("100 blocks", 256, "train"),
        _net("ResNet-18 CIFAR", 512, "eval"),
        _net("ResNet-20 CIFAR", 1024, "eval"),
        _net("100 blocks", 256, "eval"),
    ],
}
GPU_SUITES["inference"] = [
    _in("bf16", _inference_net("ResNet-50", 256)),
    _in("bf16", _inference_net("ResNet-50", 1)),
    _in("bf16", _inference_net("ResNet-18", 32)),
    _gpu_inference_block("bottleneck", (32, 256, 56, 56), 64),
    _gpu_inference_block("basic", (32, 512, 7, 7)),
]
GPU_SUITES["chains"] = [
    _in("bf16", _chain(*chain))
    for chain in (
        (100, 32, 16, 64), (100, 32, 8, 1), (9, 64, 16, 256), (100, 32, 16, 1), (3, 64, 8, 1024),
        (9, 16, 32, 128), (100, 16, 8, 1024), (3, 32, 32, 16), (1, 64, 16, 256), (100, 64, 8, 16),
    )
]  # fmt: skip
# run only when it is named: it takes minutes
GPU_SUITES["inference-all"] = [
    *(
        _in(dtype, _inference_net(net, batch))
        for dtype in ("bf16", "fp16")
        for net in ("ResNet-50", "ResNet-18")
        for batch in (1, 256, 32, 8)
    ),
    *(
        _gpu_inference_block(*block)
        for batch in (256, 1, 32, 8)
        for block in (
            ("bottleneck", (batch, 256, 56, 56), 64),
            ("basic", (batch, 64, 56, 56)),
            ("basic", (batch, 512, 7, 7)),
            ("bottleneck", (batch, 2048, 7, 7), 512),
        )
    ),
    *(
        _gpu_inference_block("bottleneck", (batch, 512, 28, 28), 256, out=1024, stride=2)
        for batch in (256, 1)
    ),
]
GPU_SUITES["convs"] = [
    workload
    for dtype in ("bf16", "fp16")
    for batch in (256, 1, 32, 8)
    for workload in dict.fromkeys([*_convs(True, batch, dtype), *_convs(False, batch, dtype)])
]
GPU_SUITES["training-convs"] = list(
    dict.fromkeys(
        [
            *_training_convs("bottleneck", (256, 512, 1024, 2048), 56, 256),  # ResNet-50
            *_training_convs("basic", (64, 128, 256, 512), 56, 256),  # ResNet-18
            *_training_convs("basic", (64, 128, 256, 512), 32, 512),  # ResNet-18 CIFAR
            *_training_convs("basic", (16, 32, 64), 32, 128),  # ResNet-20 CIFAR
            *_training_convs("single", (32,), 16, 64),  # 100 blocks
        ]
    )
)
GPU_SUITES["parts"] = [
    replace(workload, name=f"{workload.name} bf16", dtype=torch.bfloat16)
    for block in (
        ("SE", "bottleneck", (128, 256, 56, 56), 64),
        ("ECA", "bottleneck", (128, 512, 28, 28), 128),
        ("SiLU", "bottleneck", (128, 512, 28, 28), 128),
        ("pre-activation", "bottleneck", (128, 256, 56, 56), 64),
        ("SE", "basic", (256, 64, 32, 32)),
    )
    for workload in _parts(*block)
]
GPU_SUITES["autotune"] = [
    *GPU_SUITES["blocks"][:6],
    _net("ResNet-20 CIFAR", 128, "train"),
    _net("ResNet-20 CIFAR", 128, "eval"),
]
GPU_QUICK = {
    "ops": [
        _gpu_op((8, 16, 12, 12)),
        _gpu_op((8, 16, 12, 12), "NCHW", "fp32"),
        _gpu_op((8, 24, 7, 7), dtype="fp16"),
    ],
    "blocks": [
        *_gpu_block("single", (8, 16, 9, 9)),
        *_gpu_block("bottleneck", (4, 32, 12, 12), 16, 64, 2),
    ],
    "nets": [
        _net("3 blocks", 8, "train"),
        _net("3 blocks", 8, "eval"),
        _net("small ResNet", 8, "train"),
        _net("small ResNet", 8, "eval"),
        _net("narrow ResNet-18", 8, "eval"),
    ],
    "autotune": _gpu_block("single", (8, 16, 9, 9))[:1],
    "parts": [
        replace(workload, dtype=torch.bfloat16) for workload in _parts("SE", "basic", (4, 16, 9, 9))
    ],
    "inference": [
        _in("bf16", _inference_net("small ResNet", 8, 32)),
        _in("fp16", _inference_net("small ResNet", 1, 32)),
        _gpu_inference_block("bottleneck", (4, 32, 12, 12), 16, out=64, stride=2),
    ],
    "chains": [_in("bf16", _chain(3, 16, 8, 2))],
    "inference-all": [_gpu_inference_block("basic", (2, 16, 9, 9))],
    "convs": [
        _conv((2, 16, 9, 9), "fp16", Conv(24, 3, 2)),
        _conv((2, 16, 9, 9), "fp16", Conv(16, 3, 1, "add")),
        _conv((2, 16, 9, 9), "bf16", Conv(24, 1, 1, "shortcut", 8, 2)),
    ],
    "training-convs": _training_convs("basic", (8, 8), 4, 2, "fp16"),
}
# suites that run on a GPU only when they are named
NAMED = ("autotune", "inference-all", "convs", "parts", "training-convs")


def suites(gpu: bool, quick: bool) -> dict[str, list[Workload]]:
    """Workloads by suite: those of a GPU or of a CPU, in full or tiny ones."""
    return [[CPU_SUITES, CPU_QUICK], [GPU_SUITES, GPU_QUICK]][gpu][quick]


# --- bytes


def convolutions(workload: Workload) -> list[tuple[int, int, int, int, int]]:
    """(channels in, channels out, size, pixels read, pixels written) of the branch's."""
    n, c, h, w = workload.shape
    out, inner, before = workload.channels_out, workload.width or c, n * h * w
    _, _, h, w = workload.shape_out()
    after = n * h * w
    return {
        "basic": [(c, inner, 3, before, after), (inner, out, 3, after, after)],
        "bottleneck": [
            (c, inner, 1, before, before),
            (inner, inner, 3, before, after),
            (inner, out, 1, after, after),
        ],
        "single": [(c, out, 3, before, after)],
    }[workload.kind]


def ideal_bytes(workload: Workload) -> dict[str, int]:
    """Bytes an ideal bn_act (the op, or every one of a block beside library convolutions) moves.

    Of inference, where convolutions are fused too, ``roofline.moved_bytes`` tells.

    Statistics need a pass of their own: in training x is read twice forward, x and dy backward.
    """
    item = workload.dtype.itemsize
    n, c, h, w = workload.shape_out()
    size, mask = item * n * c * h * w, n * c * h * w // 8
    forward = 4 * size + mask  # x, x, residual -> y, mask
    backward = 6 * size + 2 * mask  # dy, x, mask; dy, x, mask -> dx, dresidual
    evaluated = 3 * size  # x, residual -> y
    if workload.suite == "blocks":
        branch = convolutions(workload)
        convs = list(branch)
        if workload.kind == "single":
            backward -= size  # the ReLU comes before the add: dresidual is dy
        if workload.shape_out() != workload.shape:
            # a strided 1x1 reads only the pixels it keeps; its BatchNorm's statistics read it again
            convs.append((workload.shape[1], c, 1, n * h * w, n * h * w))
            forward += size
            backward += 2 * size
        x = workload.shape
        backward += 3 * item * x[0] * x[1] * x[2] * x[3]  # gradients of branch and skip, added
        for c_in, c_out, k, read, written in convs:
            operands = item * (read * c_in + written * c_out + c_in * c_out * k * k)
            forward += operands
            evaluated += operands
            backward += 2 * operands
        for _, c_out, _, _, written in branch[:-1]:
            forward += 3 * item * written * c_out  # a, a -> z
            backward += 5 * item * written * c_out  # dz, a; dz, a -> da
            evaluated += 2 * item * written * c_out
    return {"forward": forward, STEP: forward + backward, "eval": evaluated}
