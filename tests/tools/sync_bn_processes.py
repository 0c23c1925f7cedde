"""What the processes of tests/sync_bn_act do: each computes on its part of a batch."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from datetime import timedelta
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from bn_act_cases import LAYOUTS, Case, parameter_dtype
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

import fused_res
from fused_res import FusedResBlock, Norm, fuse_, reference
from fused_res.ops.sync_bn_act import sync_bn_act

PROCESSES = 2
CHANNELS = (3, 37, 100)
SPLITS = {"even": (3, 3), "uneven": (5, 2), "empty": (6, 0)}  # images of each process
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def part(t: Tensor, split: str, rank: int) -> Tensor:
    return t.split(SPLITS[split])[rank]


# --- the op


class Op(NamedTuple):
    """One test of the op: a case on the joined batch, several times with fresh numbers."""

    channels: int
    dtype: str
    layout: str
    split: str
    act: str
    kind: str
    mean: float = 0.0
    affine: bool = True
    backend: str = "cpu"
    size: tuple[int, int] = (7, 5)

    def cases(self) -> list[Case]:
        torch.manual_seed(sum(map(ord, repr(self))))
        shape = sum(SPLITS[self.split]), self.channels, *self.size
        settings = DTYPES[self.dtype], self.layout, self.act, self.kind, True, self.mean
        draws = 1 if self.backend == "triton" else max(2, 120 // self.channels)
        return [Case(shape, *settings, self.affine) for _ in range(draws)]

    def run(self, case: Case, rank: int) -> list[Tensor | None]:
        """``Case.run`` of the process's part."""
        p = parameter_dtype(case.dtype)
        x, residual, dy = (
            part(t, self.split, rank).to(case.dtype).detach().clone().requires_grad_()
            for t in (case.x, case.residual, case.dy)
        )
        channels = [None if t is None else t.to(p).clone().requires_grad_() for t in case.channels]
        running = [t.to(p).clone() for t in case.running]
        second = Norm(*running[2:], *channels[2:], True) if self.kind == "norm" else None
        y = sync_bn_act(
            x, Norm(*running[:2], *channels[:2], True), dist.group.WORLD,
            None if self.kind == "none" else residual, second, self.act, self.backend,
        )  # fmt: skip
        y.backward(dy)
        grads = [x.grad, residual.grad, *(None if t is None else t.grad for t in channels)]
        return [y.detach(), *grads, *running]


ACTS, KINDS = ("relu", "relu_before_add", "none"), ("none", "tensor", "norm")
OPS = [
    Op(channels, dtype, layout, split, ACTS[(i + j + k) % 3], KINDS[(i + k + len(dtype)) % 3])
    for i, channels in enumerate(CHANNELS)
    for j, layout in enumerate(LAYOUTS)
    for k, split in enumerate(SPLITS)
    for dtype in DTYPES
]
OPS += [
    Op(37, "float32", "channels_last", "uneven", "relu", "norm", affine=False),
    Op(37, "float32", "nchw", "uneven", "relu", "norm", mean=2000.0),  # 1000 standard deviations
    Op(37, "float32", "channels_last", "uneven", "relu", "norm", backend="eager"),
    Op(3, "bfloat16", "nchw", "empty", "relu_before_add", "norm", backend="eager"),
    Op(3, "float32", "nchw", "even", "none", "tensor", size=(33, 31)),  # several chunks
    Op(100, "bfloat16", "channels_last", "uneven", "relu", "norm", size=(23, 25)),
    Op(3, "float32", "nchw", "uneven", "relu", "norm", backend="triton", size=(3, 3)),
    Op(37, "float32", "channels_last", "empty", "relu", "tensor", backend="triton", size=(3, 2)),
]


# --- blocks


def sync(model: nn.Module, group=None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)


class Block(NamedTuple):
    args: tuple
    kwargs: dict
    dtype: str
    layout: str
    split: str
    draws: int = 5

    def plain(self, draw: int) -> reference.ResBlock:
        torch.manual_seed(draw)
        block = reference.ResBlock(*self.args, **self.kwargs)
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
                nn.init.normal_(m.running_mean, 0, 0.3)
        return block.to(DTYPES[self.dtype])

    def fused(self, way: int) -> nn.Module:
        """``plain(way)``, converted before or after it is fused, or into a FusedResBlock."""
        plain = self.plain(way)
        if way % 3 == 0:
            model = sync(plain)
            assert fuse_(model).fused == [""]
            return model
        if way % 3 == 1:
            fuse_(plain)
            return sync(plain)
        model = FusedResBlock(*self.args, **self.kwargs).to(DTYPES[self.dtype])
        model.load_state_dict(plain.state_dict())
        return sync(model)

    def batch(self, draw: int) -> tuple[Tensor, Tensor]:
        """x, and the gradient of what the block makes of it."""
        torch.manual_seed(100 + draw)
        n, stride = sum(SPLITS[self.split]), (*self.args, 1)[2]
        x = torch.randn(n, self.args[0], 8, 6).to(DTYPES[self.dtype])
        dy = torch.randn(n, self.args[1], 8 // stride, 6 // stride).to(DTYPES[self.dtype])
        layout = LAYOUTS[self.layout]
        return x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)


def step(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """As ``agreement.outcome``, with a gradient that is this process's part of the batch's."""
    x = x.detach().clone().requires_grad_()
    out = model(x)
    named = dict(model.named_parameters())
    dx, *grads = torch.autograd.grad(out, [x, *named.values()], dy)
    of = {f"gradient of {n}": g for n, g in zip(named, grads, strict=True)}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {"output": out.detach(), "gradient of x": dx} | of | buffers


KINDS_OF_BLOCKS = {
    "basic": lambda c: ((c, c), {}),
    "projection": lambda c: ((c, c + 2, 2), {}),
    "bottleneck": lambda c: ((c, c), {"kind": "bottleneck", "width": c}),
}
BLOCKS = {}
for i, c in enumerate(CHANNELS):
    for j, (name, make) in enumerate(KINDS_OF_BLOCKS.items()):
        for dtype, layout, split in [
            ("float32", [*LAYOUTS][(i + j) % 2], [*SPLITS][(i + j) % 3]),
            (("bfloat16", "float64")[(i + j) % 2], [*LAYOUTS][j % 2], "uneven"),
        ]:
            BLOCKS[f"{name} {c} {dtype} {layout} {split}"] = Block(*make(c), dtype, layout, split)
PROJECTION = Block((37, 39, 2), {}, "float64", "nchw", "uneven")
BASIC = Block((37, 37), {}, "float32", "nchw", "uneven")


# --- more of what training does


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        reference.ResBlock(6, 6),
        reference.ResBlock(6, 9, 2, kind="bottleneck"),
        nn.AdaptiveAvgPool2d(1),
    ).double()


def images(split: str) -> Tensor:
    torch.manual_seed(8)
    return torch.randn(sum(SPLITS[split]), 3, 9, 8, dtype=torch.float64)


def train(model: nn.Module, x: Tensor, images: int, steps: int = 3) -> dict[str, Tensor]:
    """SGD by the mean over ``images``, of which x are a part; DDP divides by the processes."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    share = PROCESSES if isinstance(model, DistributedDataParallel) else 1
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).pow(3).sum() * share / images).backward()
        optimizer.step()
    return {n.removeprefix("module."): t.clone() for n, t in model.state_dict().items()}


def penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that has gradients in it."""
    x = x.detach().clone().requires_grad_()
    out = model(x).pow(2).sum()
    (dx,) = torch.autograd.grad(out, x, create_graph=True)
    (out + dx.pow(2).sum()).backward()
    gradients = {"x": x.grad} | {n: p.grad for n, p in model.named_parameters()}
    return {f"gradient of {n}": g for n, g in gradients.items()}


@contextlib.contextmanager
def counted():
    """Yields how often each collective is called."""
    found = Counter()

    def count(name):
        call = getattr(dist, name)

        def counting(*args, **kwargs):
            found[name] += 1
            return call(*args, **kwargs)

        return mock.patch.object(dist, name, counting)

    with count("all_gather"), count("all_reduce"):
        yield found


def collectives(rank: int) -> list[Counter]:
    """Of forward and backward of the op with two norms, of one, and where x wants no gradient."""
    x, residual = (torch.randn(2, 5, 3, 3, requires_grad=True) for _ in range(2))
    norms = [Norm(None, None, torch.ones(5, requires_grad=True), torch.zeros(5), True)] * 2
    found = []
    for inputs in ((x, norms[0], dist.group.WORLD, residual, norms[1]),
                   (x, norms[0], dist.group.WORLD),
                   (x.detach(), norms[0], dist.group.WORLD)):  # fmt: skip
        with counted() as calls:
            sync_bn_act(*inputs, backend="cpu").sum().backward()
        found.append(calls)
    return found


def frozen_parts(rank: int) -> list[dict[str, Tensor]]:
    """Blocks whose shortcut's norm, or inner norm, is frozen."""
    found = []
    for name in ("downsample.1", "bn1"):
        model = PROJECTION.fused(1)
        model.get_submodule(name).eval()
        x, dy = (part(t, "uneven", rank) for t in PROJECTION.batch(1))
        found.append(step(model, x, dy))
    return found


def alone(rank: int) -> tuple[bool, Counter]:
    """Whether a group of one process, eval mode and a model in one process give the same; how many
    collectives that took."""
    groups = [dist.new_group([r]) for r in range(PROCESSES)]
    x, dy = BASIC.batch(0)
    ours, others = BASIC.plain(0), BASIC.plain(0)
    for model in (ours, others):
        fuse_(model)
    ours = sync(ours, groups[rank])
    with counted() as calls:
        same = [step(ours, x, dy), step(others, x, dy)]
        ours, others = sync(ours).eval(), others.eval()  # of all processes, but for eval mode
        same += [step(ours, x, dy), step(others, x, dy)]
        same += [
            {"output": m(x)} for m in (ours.requires_grad_(False), others.requires_grad_(False))
        ]
    equal = all(
        torch.equal(a[name], b[name])
        for a, b in zip(same[::2], same[1::2], strict=True)
        for name in b
    )
    return equal, calls


def on_another_device(rank: int) -> bool:
    """Whether a tensor that is not on a CPU goes to PyTorch's own function, with its arguments."""
    x, rest = torch.empty(2, 5, 3, 3, device="meta"), torch.empty(4, 5, device="meta")
    norm = Norm(*rest, True, 0.3, 0.2)
    with mock.patch.object(SyncBatchNorm, "apply", side_effect=lambda x, *args: x) as apply:
        sync_bn_act(x, norm, dist.group.WORLD)
    (args,) = [call.args for call in apply.call_args_list]
    expected = x, *norm[2:4], *norm[:2], norm.eps, norm.momentum, dist.group.WORLD, PROCESSES
    return all(a is b for a, b in zip(args, expected, strict=True))


def without_gradients(rank: int) -> dict[str, Tensor]:
    model = PROJECTION.fused(0)
    with torch.no_grad():
        out = model(part(PROJECTION.batch(0)[0], "uneven", rank))
    return {"output": out} | dict(model.named_buffers())


def compiled(rank: int) -> dict[str, Tensor]:
    model = PROJECTION.fused(0)
    model.compile(backend="aot_eager", fullgraph=True)
    return step(model, *(part(t, "uneven", rank) for t in PROJECTION.batch(0)))


def hooked(rank: int) -> str:
    model = BASIC.fused(1)
    model.bn1.register_forward_hook(lambda *args: None)
    try:
        model(torch.randn(2, 37, 4, 4))
    except ValueError as error:
        return str(error)
    return ""


def second_derivatives(rank: int) -> list[dict[str, Tensor]]:
    found = []
    for split in SPLITS:
        for backend in ("cpu", "eager"):
            model = sync(net())
            fuse_(model)
            with fused_res.backend(backend):
                found.append(penalty(model, part(images(split), split, rank)))
    return found


def ddp(rank: int) -> list[dict[str, Tensor]]:
    found = []
    for split in SPLITS:
        model = net()
        fuse_(model)
        model = DistributedDataParallel(model)
        sync(model)  # not before: DDP refuses a SyncBatchNorm on a CPU
        with fused_res.backend("cpu"):
            x = images(split)
            found.append(train(model, part(x, split, rank), len(x)))
    return found


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    ops = [[op.run(case, rank) for case in op.cases()] for op in OPS]
    again = [OPS[-5].run(case, rank) for case in OPS[-5].cases()]
    blocks = {}
    for name, block in BLOCKS.items():
        blocks[name] = []
        for draw in range(block.draws):
            x, dy = (part(t, block.split, rank) for t in block.batch(draw))
            blocks[name].append(step(block.fused(draw), x, dy))
    found = {"ops": ops, "again": again, "blocks": blocks}
    for scenario in (collectives, frozen_parts, alone, on_another_device, without_gradients,
                     hooked, second_derivatives, ddp, compiled):  # fmt: skip
        found[scenario.__name__] = scenario(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)  # Python's shutdown may race with gloo's threads: pytorch#117762
