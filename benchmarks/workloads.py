"""What is timed: the workloads of each suite, and the bytes that an ideal kernel moves in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CL = "channels_last"
STEP = "forward+backward"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """``layout`` is that of x, or None where each rival has its own (``blocks``, ``nets``).

    ``directions`` are the calls that are timed: ``forward`` and ``forward+backward`` in training,
    ``eval`` (no gradients, BatchNorm by its running statistics), ``train`` (an optimizer's whole
    step). The last one is checked. ``net`` names one of ``nets.NETS``.
    """

    suite: str
    name: str
    shape: tuple[int, int, int, int]
    layout: str | None = None
    kind: str = "basic"
    width: int | None = None
    out_channels: int | None = None
    stride: int = 1
    net: str | None = None
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("forward", STEP)

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
        return args, {"kind": self.kind, "width": self.width}


def _op(shape: tuple[int, int, int, int], layout: str) -> Workload:
    return Workload("ops", f"bn_act {'x'.join(map(str, shape))} {layout}", shape, layout)


def _block(kind: str, shape: tuple[int, int, int, int], width: int | None = None) -> Workload:
    channels = f"{shape[1]}-{width}" if width else f"{shape[1]}"
    name = f"{kind} {channels}ch {shape[2]}x{shape[3]} batch {shape[0]}"
    return Workload("blocks", name, shape, None, kind, width)


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
}
CPU_QUICK = {
    "ops": [_op((8, 16, 12, 12), layout) for layout in FORMATS],
    "blocks": [_block("bottleneck", (4, 64, 12, 12), 16), _block("single", (8, 16, 9, 9))],
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
    )


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
}


def suites(gpu: bool, quick: bool) -> dict[str, list[Workload]]:
    """Workloads by suite: those of a GPU or of a CPU, in full or tiny ones."""
    return [[CPU_SUITES, CPU_QUICK], [GPU_SUITES, GPU_QUICK]][gpu][quick]


# --- bytes


def _convolutions(workload: Workload) -> list[tuple[int, int, int, int, int]]:
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

    Statistics need a pass of their own: in training x is read twice forward, x and dy backward.
    """
    item = workload.dtype.itemsize
    n, c, h, w = workload.shape_out()
    size, mask = item * n * c * h * w, n * c * h * w // 8
    forward = 4 * size + mask  # x, x, residual -> y, mask
    backward = 6 * size + 2 * mask  # dy, x, mask; dy, x, mask -> dx, dresidual
    evaluated = 3 * size  # x, residual -> y
    if workload.suite == "blocks":
        branch = _convolutions(workload)
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
