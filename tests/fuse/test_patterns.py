"""Every kind of skip, with and without ReLUs before and after it, of every depth, in every mode and
by every backend: fused and plain, the same outputs, gradients and statistics."""

import copy
import gc
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from sweeps import sweep
from torch import nn

import fused_res

CHANNELS, SHAPE = 8, (2, 8, 6, 6)
# how a branch `out` of the input x is joined with its skip, and what fuse_ makes of the block
SKIPS = {
    "none": ("y = out", None),
    "identity": ("y = out + x", "fused"),
    "identity, reversed": ("y = torch.add(input=x, other=out)", "fused"),
    "+=": ("out += x; y = out", "fused"),
    "add_": ("y = out.add_(x)", "fused"),
    "projection without norm": ("y = out + self.project(x)", "fused"),
    "projection": ("y = out + self.norm_p(self.project(x))", "fused"),
    "+= into the projection": ("y = self.norm_p(self.project(x)); y += out", "fused"),
    "projection with ReLU": ("y = out + F.relu(self.norm_p(self.project(x)))", "partly"),
    "pooling": ("y = out + self.pool(x)", "fused"),
    "pooled projection": ("y = self.norm_p(self.project(self.pool(x))) + out", "fused"),
    "scaled": ("y = out * 0.5 + x", "partly"),
    "added twice": ("y = out + x + x", "partly"),
    "broadcast": ("y = out + x.mean((2, 3), keepdim=True)", "partly"),
    "concat": ("y = torch.cat((x, out), 1)", "fused"),
    "concat by keywords": ("y = torch.concat(tensors=[x, out], dim=-3)", "fused"),
    "concat, reversed": ("y = torch.cat((out, x), 1)", "partly"),
    "concat along the height": ("y = torch.cat((x, out), 2)", "partly"),
    "concat of a projection": ("y = torch.cat((self.norm_p(self.project(x)), out), 1)", "partly"),
    "concat of three": ("y = torch.cat((x, out, x), 1)", "partly"),
    "add, then concat": ("y = torch.cat((x, out + x), 1)", "partly"),
    "concat, then add": ("y = torch.cat((x, out), 1) + torch.cat((x, x), 1)", "partly"),
}
RELUS = {
    "none": "",
    "function": "{0} = F.relu({0})",
    "module": "{0} = self.relu({0})",
    "in place": "{0} = self.relu_({0})",
    "result unused": "F.relu({0}, inplace=True)",
}
# how many convolutions, whether the last has a norm, the layout, and how ReLUs are called
DEPTHS = [
    (1, True, torch.channels_last, ["none", "module"]),
    (2, True, torch.channels_last, ["none", "function", "module", "in place"]),
    (2, False, torch.contiguous_format, ["none", "in place"]),
    (3, True, torch.contiguous_format, ["none", "in place"]),
    (3, False, torch.channels_last, ["none", "function"]),
]
BACKENDS = [b for b in ("auto", "cpu", "eager") if not fused_res.dispatch.backends.STATUS.get(b)]
MODES = {  # whether in training, and what is around the call
    "eval": (False, nullcontext),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
    "training": (True, nullcontext),
}


def source(skip, before, after, depth, last_norm):
    """The forward of a block, of one line for each step."""
    lines = ["out = x"]
    for i in range(depth):
        last = i + 1 == depth
        norm = f"self.norm{i}" if last_norm or not last else ""
        lines.append(f"out = {norm}(self.conv{i}(out))")
        lines.append(RELUS[before].format("out") if last else "out = self.relu(out)")
    lines += [SKIPS[skip][0], RELUS[after].format("y"), "return y"]
    return "def forward(self, x):\n" + "".join(f"    {line}\n" for line in lines if line)


def block_of(text, depth):
    """All blocks of a depth have the same weights."""
    known = {"torch": torch, "F": F}
    exec(text, known)
    torch.manual_seed(depth)
    block = type("Block", (nn.Module,), {"forward": known["forward"]})()
    block.relu, block.relu_, block.pool = nn.ReLU(), nn.ReLU(True), nn.AvgPool2d(3, 1, 1)
    names = [(f"conv{i}", f"norm{i}") for i in range(depth)]
    names.append(("project", "norm_p"))
    for (name, its_norm), size in zip(names, (3, 1, 3, 1)[-depth - 1 :], strict=True):
        bias = its_norm not in text  # before a BatchNorm its gradient is 0, but for rounding
        conv = nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, bias=bias)
        norm = nn.BatchNorm2d(CHANNELS)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        for t in (norm.bias, norm.running_mean):
            nn.init.normal_(t, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        block.add_module(name, conv)
        block.add_module(its_norm, norm)
    return block


class Net(nn.Module):
    """Blocks side by side."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        return [block(x.clone()) for block in self.blocks]


def run(block, x, training, mode):
    """All that a call makes, by name."""
    for module in block.modules():
        module.training = training
    x = x.clone().requires_grad_()
    with mode():
        y = block(x * 1)  # which a block may overwrite
    made = {"output": y.detach()}
    if y.requires_grad:
        tensors = {"x": x, **dict(block.named_parameters())}
        weights = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
        try:
            found = torch.autograd.grad(y, list(tensors.values()), weights, allow_unused=True)
        except RuntimeError:  # what a ReLU returned and has saved was overwritten
            found = [None] * len(tensors)
        named = zip(tensors, found, strict=True)
        made |= {f"d {name}": g for name, g in named if g is not None}
    if training:
        made |= {name: b.clone() for name, b in block.named_buffers()}
    return made


def differing(ours, theirs):
    """Names of what differs."""

    def near(a, b):
        return a.shape == b.shape and (a - b).abs().max() <= 1e-4 * b.abs().max()

    names = ours.keys() if "d x" in theirs else theirs.keys()  # ours has gradients where it can
    missing = names ^ theirs.keys()
    return [*missing, *(n for n in names - missing if not near(ours[n], theirs[n]))]


def fused_kind(skip, before, after):
    """What fuse_ makes of a block: "fused" whole, "partly", or None."""
    kind = SKIPS[skip][1]
    added = kind == "fused" and "concat" not in skip
    twice = added and before != "none" and after != "none"  # a ReLU before and after the add
    unused = kind and "result unused" in (before, after)
    return "partly" if twice or unused else kind


def compare(specs, depth, last_norm, layout):
    """How many calls of blocks with these forwards were compared, fused and plain, and what
    differs."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(memory_format=layout)
    theirs = Net(block_of(source(*spec, depth, last_norm), depth) for spec in specs)
    theirs.to(memory_format=layout)
    ours, count, wrong = copy.deepcopy(theirs), 0, []
    statistics = [b.clone() for b in theirs.buffers()]
    report = fused_res.fuse_(ours)
    kinds = dict.fromkeys(report.fused, "fused") | dict.fromkeys(dict(report.partly), "partly")
    for i, spec in enumerate(specs):
        if kinds.get(f"blocks.{i}") != fused_kind(*spec):
            wrong.append(f"{spec}: {kinds.get(f'blocks.{i}')}, not {fused_kind(*spec)}")
    served = fused_res.optimize_for_inference(ours, x, tune=False)

    def check(what, made, plain):
        nonlocal count
        for spec, a, b in zip(specs, made, plain, strict=True):
            count += 1
            wrong.extend(f"{spec}, {what}: {name}" for name in differing(a, b))

    for name, (training, mode) in MODES.items():
        plain = [run(block, x, training, mode) for block in theirs.blocks]
        outputs = [{"output": one["output"]} for one in plain]
        for backend in BACKENDS:
            with fused_res.backend(backend):
                made = [run(block, x, training, mode) for block in ours.blocks]
                check(f"{name}, {backend}", made, plain)
                if not training:
                    with mode():
                        made = [{"output": y} for y in served(x)]
                    check(f"served, {name}, {backend}", made, outputs)
            if training:
                for buffer, before in zip(ours.buffers(), statistics, strict=True):
                    buffer.copy_(before)
    return count, wrong


@pytest.fixture
def few_classes():
    """torch.fx gets slower with every subclass of nn.Module that there is."""
    yield
    getattr(fused_res.fuse.swap.fused_class, "cache_clear", int)()
    gc.collect()


pytestmark = pytest.mark.filterwarnings("ignore:fuse_ found no residual block")


@pytest.mark.parametrize(
    ("depth", "last_norm", "layout", "relus"), sweep(DEPTHS, quick=DEPTHS[::2], unpack=True)
)
def test_every_skip(depth, last_norm, layout, relus, one_thread, few_classes):
    specs = list(itertools.product(SKIPS, relus, relus))
    count, wrong = compare(specs, depth, last_norm, layout)
    print(f"{count} calls of {len(specs)} blocks compared")
    assert not wrong, "\n".join([f"{len(wrong)} of {count} differ", *wrong[:40]])
    assert count == len(specs) * len(BACKENDS) * (2 * len(MODES) - 1)


def test_relus_in_place_whose_result_is_not_used(one_thread, few_classes):
    relus = [
        r for r in itertools.product(("none", "result unused"), repeat=2) if r != ("none",) * 2
    ]
    count, wrong = compare([(s, *r) for s in SKIPS for r in relus], 1, True, torch.channels_last)
    assert not wrong, "\n".join([f"{len(wrong)} of {count} differ", *wrong[:40]])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        "y = self.project(x) + self.norm0(self.conv0(self.{0}(x)))",
        "y = self.norm0(self.conv0(self.{0}(x))) + self.project(x)",
        "s = self.{0}(x); y = self.norm0(self.conv0(x)) + s",
        "y = self.norm0(self.conv0(x)) + self.{0}(x)",
        "y = self.norm0(self.conv0(x)) + self.project(self.{0}(x))",
        "y = self.{0}(x); y += self.norm0(self.conv0(x))",
    ],
)
@pytest.mark.parametrize("first", ["clip", "drop"])
def test_what_is_written_into_the_input(first, body, training):
    """Branch and shortcut both read it: the order counts."""
    block = block_of(f"def forward(self, x):\n    {body.format(first)}; return y\n", depth=1)
    block.clip, block.drop = nn.ReLU6(inplace=True), nn.Dropout(0.5, inplace=True)
    ours = copy.deepcopy(block).train(training)
    report = fused_res.fuse_(ours)
    assert report.partly and not report.fused
    x = torch.randn(SHAPE)
    results = []
    for net in (ours, block.train(training)):
        given = x.clone()
        torch.manual_seed(0)
        with torch.no_grad():
            results += [net(given), given]
    torch.testing.assert_close(results[:2], results[2:])
