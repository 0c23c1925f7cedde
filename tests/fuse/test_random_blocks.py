"""Blocks with random forwards, fused and as they are: the same outputs, gradients and statistics.

Each is a class with a source of its own: convolutions, BatchNorms, ReLUs, adds, writes in place and
what is not fused, in any order that PyTorch runs.
"""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from sweeps import sweep
from torch import nn

import fused_res
from fused_res import fuse_

NAMED = "cpu" if fused_res.dispatch.backends.STATUS["cpu"] is None else "auto"
CHANNELS = 4
LINES = {  # of two values that are there; each makes another, or changes one
    "{out} = self.norm{i}(self.conv{i}({a}))": 6,
    "{out} = F.relu(self.norm{i}(self.conv{i}({a})))": 6,
    "{out} = self.conv{i}({a})": 1,
    "{out} = self.norm{i}({a})": 2,
    "{out} = F.relu({a})": 2,
    "{out} = {a} + {b}": 5,
    "{out} = F.relu({a} + {b})": 3,
    "{out} = F.silu({a})": 1,
    "{out} = {a} * {b}.mean((2, 3), keepdim=True).sigmoid()": 2,
    "{out} = self.drop({a})": 1,
    "{a} += {b}": 2,
    "F.relu({b}, inplace=True)": 1,
    "{b}.mul_(0.5)": 2,
    "{b}.relu_()": 1,
    "self.norm{i}({a})": 0.3,
}


def source(rng):
    """A forward, and how many convolutions and norms it has."""
    lines, there, count = [], ["x"], 0
    for _ in range(rng.randint(4, 12)):
        line = rng.choices(list(LINES), list(LINES.values()))[0]
        recent = there[-1] if rng.random() < 0.7 else rng.choice(there)
        out = f"v{len(lines)}"
        lines.append(line.format(a=recent, b=rng.choice(there), out=out, i=count))
        count += "{i}" in line
        if line.startswith("{out}"):
            there.append(out)
    results = there[-1] if rng.random() < 0.8 else f"({there[-1]}, {rng.choice(there)})"
    body = "\n    ".join([*lines, f"return {results}"])
    return f"def forward(self, x):\n    {body}\n", count


def made(seed):
    rng = random.Random(seed)
    text, count = source(rng)
    known = {"F": F}
    exec(text, known)
    block = type("Block", (nn.Module,), {"forward": known["forward"]})()
    block.drop = nn.Dropout(0.3)
    for i in range(count):
        size = rng.choice((1, 3))
        groups = rng.choice((1, 1, 2))
        conv = nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, groups=groups)
        norm = nn.BatchNorm2d(CHANNELS, momentum=rng.choice((0.1, 0.1, None)))
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.train(rng.random() < 0.9)
        for p in (*conv.parameters(), *norm.parameters()):
            p.requires_grad_(rng.random() < 0.9)
        block.add_module(f"conv{i}", conv)
        block.add_module(f"norm{i}", norm)
    return block.double(), text


def step(block, x, train, grad):
    """All that a call does, and the error it raises."""
    torch.manual_seed(0)
    for module in (block, block.drop):
        module.training = train
    x = x.clone().requires_grad_(grad)
    found = {}
    try:
        with torch.set_grad_enabled(grad):
            y = block(x * 1)
        y = y if isinstance(y, tuple) else (y,)
        found |= {f"output {i}": t.detach().clone() for i, t in enumerate(y)}
        tensors = {"x": x, **dict(block.named_parameters())}
        tensors = {name: t for name, t in tensors.items() if grad and t.requires_grad}
        grads = []
        if grad:
            total = sum((t * t.detach().cos()).sum() for t in y)
            grads = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
        found |= {f"d {name}": g for name, g in zip(tensors, grads, strict=True) if g is not None}
    except RuntimeError as error:
        found["error"] = error
    return found | {name: b.clone() for name, b in block.named_buffers()}


@pytest.mark.parametrize("first", sweep(range(0, 400, 50), quick=[0, 50]))
def test_random_blocks(first):
    compared = 0
    ways = [(train, grad) for grad in (False, True) for train in (True, False)]
    for seed in range(first, first + 50):
        torch.manual_seed(seed)
        theirs, text = made(seed)
        ours = copy.deepcopy(theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in some there is nothing to fuse
            report = fuse_(ours)
        for train, grad in ways:
            x = torch.randn(3, CHANNELS, 6, 5, dtype=torch.double)
            with fused_res.backend(NAMED):
                mine = step(ours, x, train, grad)
            other = step(theirs, x, train, grad)
            if "error" in other:  # what a ReLU has saved, say, which ours does not need
                break
            what = f"seed {seed}, train={train}, grad={grad}\n{text}\n{report}\n"
            assert mine.keys() == other.keys(), what
            for name, value in other.items():
                torch.testing.assert_close(
                    mine[name], value, rtol=1e-7, atol=1e-9,
                    msg=lambda m, name=name, what=what: f"{name}: {m}\n{what}",
                )  # fmt: skip
        else:
            compared += bool(report.fused or report.partly)
    assert compared >= 10
