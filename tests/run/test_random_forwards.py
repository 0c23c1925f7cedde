"""Blocks whose forward reads one to four things beside tensors, which are changed after ``fuse_``:
what they compute stays what the same blocks compute as they are.

Each of ``READERS`` is a line or more of a forward, what it needs, and a change. A generated class
has some of them in a residual block. The share of blocks that fuse is printed and has a bound: one
that is not fused is always right.
"""

import copy
import gc
import random
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from sweeps import sweep
from torch import nn

import fused_res
from fused_res.nn.blocks import FusedForward

BLOCKS, GROUPS = 2000, 10
CHANNELS = 4


class Reader(NamedTuple):
    """line: of the forward, on the branch's ``y`` and the input ``x``. init: of ``__init__``.
    module: at the top of the source. body: of the class. change: (block, namespace) -> None.
    fuses: whether a forward that reads this can be fused: its value can be known."""

    line: str
    init: str = ""
    module: str = ""
    body: str = ""
    change: object = None
    fuses: bool = True


class Config:
    """An object that is an attribute."""

    def __init__(self, scale, inner=None):
        self.scale, self.inner = scale, inner

    def value(self):
        return self.scale


def setting(name, value):
    return lambda block, space: setattr(block, name, value)


def by_global(name, make):
    return lambda block, space: space.__setitem__(name, make(space))


def new_code(block, space):
    space["helper"].__code__ = (lambda y: y * 3.0).__code__


def twice(y):
    return y * 2.0


def hooked(block, space):
    block.act.register_forward_hook(lambda module, args, y: y * 2.0)


READERS = {
    # attributes
    "number": Reader("y = y * self.scale", "self.scale = 0.5", change=setting("scale", 2.0)),
    "number of a type": Reader(
        "y = y * (2 if isinstance(self.kind, bool) else 3)", "self.kind = 1",
        change=setting("kind", True),
    ),
    "sign of zero": Reader(
        "y = y * (0.5 if str(self.zero) == '0.0' else 2.0)", "self.zero = 0.0",
        change=setting("zero", -0.0),
    ),
    "flag": Reader("y = y if self.plain else y * 2.0", "self.plain = True",
                   change=setting("plain", False)),
    "text": Reader("y = getattr(torch, self.name)(y)", "self.name = 'sigmoid'",
                   change=setting("name", "tanh")),
    "callable": Reader("y = self.fn(y)", "self.fn = torch.sigmoid",
                       change=setting("fn", torch.tanh)),
    "closure": Reader(
        "y = self.gain(y)", "self.gain = make(0.5)",
        "def make(k):\n    def gain(y):\n        return y * k\n    gain.cell = lambda: None\n"
        "    return gain",
        change=lambda b, s: setattr(b.gain.__closure__[0], "cell_contents", 2.0),
    ),
    "partial": Reader("y = self.part(y)", "self.part = functools.partial(torch.mul, other=0.5)",
                      "import functools",
                      change=lambda b, s: setattr(b, "part", s["functools"].partial(
                          torch.mul, other=2.0))),
    "method of its own": Reader(
        "y = self.bound(y)", "self.bound = self.doubled",
        body="def doubled(self, y):\n    return y * 2.0\ndef halved(self, y):\n    return y * 0.5",
        change=lambda b, s: setattr(b, "bound", b.halved),
    ),
    "by a name that is made": Reader("y = y * getattr(self, 'f' + str(1))", "self.f1 = 0.5",
                                     change=setting("f1", 2.0)),
    "has it": Reader("y = y * (self.more if hasattr(self, 'more') else 0.5)",
                     change=setting("more", 2.0)),
    "of a child": Reader("y = y * self.conv1.factor", "self.conv1.factor = 0.5",
                         change=lambda b, s: setattr(b.conv1, "factor", 2.0)),
    # containers and objects
    "dictionary": Reader("y = y * self.table['k']", "self.table = {'k': 0.5}",
                         change=lambda b, s: b.table.update(k=2.0)),
    "another dictionary": Reader("y = y * self.other['k']", "self.other = {'k': 0.5}",
                                 change=setting("other", {"k": 2.0})),
    "list": Reader("for k in self.factors:\n    y = y * k", "self.factors = [0.5]",
                   change=lambda b, s: b.factors.append(2.0)),
    "list in a dictionary": Reader("y = y * self.deep['k'][0]", "self.deep = {'k': [0.5]}",
                                   change=lambda b, s: b.deep["k"].__setitem__(0, 2.0)),
    "set": Reader("y = y * 2.0 if 'on' in self.flags else y", "self.flags = set()",
                  change=lambda b, s: b.flags.add("on")),
    "object": Reader("y = y * self.config.scale", "self.config = Config(0.5)",
                     change=lambda b, s: setattr(b.config, "scale", 2.0)),
    "object in an object": Reader(
        "y = y * self.outer.inner.scale", "self.outer = Config(1.0, Config(0.5))",
        change=lambda b, s: setattr(b.outer.inner, "scale", 2.0)),
    "object in a list": Reader("y = y * self.configs[0].scale", "self.configs = [Config(0.5)]",
                               change=lambda b, s: setattr(b.configs[0], "scale", 2.0)),
    "method of an object": Reader("y = y * self.source.value()", "self.source = Config(0.5)",
                                  change=lambda b, s: setattr(b.source, "scale", 2.0)),
    "namespace": Reader("y = y * self.opt.scale", "self.opt = types.SimpleNamespace(scale=0.5)",
                        change=lambda b, s: setattr(b.opt, "scale", 2.0)),
    # classes
    "class attribute": Reader("y = y * self.K", body="K = 0.5",
                              change=lambda b, s: setattr(s["Block"], "K", 2.0)),
    "class attribute, hidden": Reader("y = y * self.L", body="L = 0.5", change=setting("L", 2.0)),
    "property": Reader("y = y * self.p", "self.hidden = 0.5",
                       body="@property\ndef p(self):\n    return self.hidden",
                       change=setting("hidden", 2.0)),
    "method": Reader("y = self.step(y)", body="def step(self, y):\n    return y * 0.5",
                     change=lambda b, s: setattr(s["Block"], "step", lambda self, y: y * 2.0)),
    "static method": Reader(
        "y = self.still(y)", body="@staticmethod\ndef still(y):\n    return y * 0.5",
        change=lambda b, s: setattr(s["Block"], "still", staticmethod(twice))),
    # helpers and globals
    "helper": Reader("y = helper(y)", module="def helper(y):\n    return y * 0.5",
                     change=by_global("helper", lambda s: twice)),
    "helper's code": Reader("y = helper(y)", module="def helper(y):\n    return y * 0.5",
                            change=new_code),
    "helper's default": Reader(
        "y = helper2(y)", module="def helper2(y, k=0.5):\n    return y * k",
        change=lambda b, s: setattr(s["helper2"], "__defaults__", (2.0,))),
    "helper's global": Reader("y = helper3(y)",
                              module="DEEP = 0.5\ndef helper3(y):\n    return y * DEEP",
                              change=by_global("DEEP", lambda s: 2.0)),
    "wrapped helper": Reader(
        "y = outer(y)",
        module="import torch.fx\ndef outer(y):\n    return y * 0.5\ntorch.fx.wrap('outer')",
        change=by_global("outer", lambda s: twice)),
    "global": Reader("y = y * FACTOR", module="FACTOR = 0.5",
                     change=by_global("FACTOR", lambda s: 2.0)),
    "global dictionary": Reader("y = y * TABLE['k']", module="TABLE = {'k': 0.5}",
                                change=lambda b, s: s["TABLE"].update(k=2.0)),
    "global object": Reader("y = y * CONFIG.scale", module="CONFIG = Config(0.5)",
                            change=lambda b, s: setattr(s["CONFIG"], "scale", 2.0)),
    "global function": Reader("y = fn2(y)", module="from torch import sigmoid as fn2",
                              change=by_global("fn2", lambda s: torch.tanh)),
    "global of a module": Reader(
        "y = y * extra.K", module="import types as t\nextra = t.ModuleType('x')\nextra.K = 0.5",
        change=lambda b, s: setattr(s["extra"], "K", 2.0)),
    "shadowed builtin": Reader("y = y * max(0.5, 0.25)",
                               change=by_global("max", lambda s: lambda *a: 2.0)),
    # children
    "child that was None": Reader(
        "y = y if self.maybe is None else self.maybe(y)",
        "self.register_module('maybe', None)", change=setting("maybe", nn.Tanh())),
    "child": Reader("y = self.gate(y)", "self.gate = nn.Sigmoid()",
                    change=setting("gate", nn.Tanh())),
    "child of a list": Reader(
        "for m in self.many:\n    y = m(y)", "self.many = nn.ModuleList([nn.Sigmoid()])",
        change=lambda b, s: b.many.append(nn.Tanh())),
    "child with a hook": Reader("y = y + 0.0", change=hooked),
    "two names": Reader("y = self.two(self.one(y))", "self.one = self.two = nn.Sigmoid()",
                        change=setting("two", nn.Tanh())),
    "parameter that was None": Reader(
        "y = y if self.bias is None else y + self.bias",
        "self.register_parameter('bias', None)",
        change=lambda b, s: setattr(b, "bias", nn.Parameter(torch.ones(1)))),
    # what cannot be known, or depends on the call
    "grad mode": Reader("y = y if torch.is_grad_enabled() else y * 2.0"),
    "inference mode": Reader("y = y * 2.0 if torch.is_inference_mode_enabled() else y"),
    "autocast": Reader("y = y * 2.0 if torch.is_autocast_enabled('cpu') else y"),
    "training": Reader("y = y * 2.0 if self.training else y", fuses=False),
    "Python's generator": Reader("y = y * self.rng.random()", "self.rng = random.Random(0)",
                                 fuses=False),
    "NumPy's generator": Reader("y = y * float(self.npr.random())",
                                "self.npr = numpy.random.default_rng(0)", "import numpy",
                                fuses=False),
    "PyTorch's generator": Reader(
        "y = y * torch.rand(1, generator=self.gen).item()",
        "self.gen = torch.Generator()\nself.gen.manual_seed(0)", fuses=False),
    "iterator": Reader("y = y * next(self.it)", "self.it = iter([0.5, 2.0] * 50)", fuses=False),
    "counter": Reader("COUNT[0] += 1\ny = y * float(COUNT[0] % 3)", module="COUNT = [0]",
                      fuses=False),
    "counter of its own": Reader("self.calls += 1\ny = y * float(self.calls % 3)",
                                 "self.calls = 0", fuses=False),
    "counter in an object": Reader(
        "self.stat.scale += 1\ny = y * float(self.stat.scale % 3)", "self.stat = Config(0)",
        fuses=False),
    "shape by try": Reader(
        "try:\n    k = 2.0 if int(x.shape[0]) == 2 else 1.0\nexcept TypeError:\n    k = 0.5\n"
        "y = y * k", fuses=False),
    "environment": Reader("y = y * float(os.environ.get('FUSED_RES_OF_A_TEST', '0.5'))",
                          module="import os",
                          change=lambda b, s: s["os"].environ.update(FUSED_RES_OF_A_TEST="2.0")),
    "clock": Reader("y = y * float(time.time() > 0)", module="import time", fuses=False),
}  # fmt: skip
ORDINARY = [name for name in READERS if READERS[name].fuses]


def indented(text, by):
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())


def source(readers, whole):
    """A class ``Block``; ``whole``: the readers stand where a fused block has a place for them."""
    lines = "".join(indented(r.line, 8) for r in readers)
    return (
        "import random, types\nimport torch\nimport torch.nn.functional as F\n"
        "from torch import nn\n"
        + "".join(f"{r.module}\n" for r in readers)
        + "class Block(nn.Module):\n"
        + "".join(indented(r.body, 4) for r in readers)
        + "    def __init__(self, c):\n"
        "        super().__init__()\n"
        "        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)\n"
        "        self.bn1 = nn.BatchNorm2d(c)\n"
        "        self.conv2 = nn.Conv2d(c, c, 3, padding=1)\n"
        "        self.bn2 = nn.BatchNorm2d(c)\n"
        "        self.act = nn.ReLU()\n"
        + "".join(indented(r.init, 8) for r in readers)
        + "    def forward(self, x):\n"
        "        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))\n"
        + (lines if not whole else "")
        + "        y = F.relu(y + x)\n"
        + (lines if whole else "")
        + "        return y\n"
    )


class Pair:
    """A block and its fused copy. What is global to them, and counted or drawn, is set back before
    each call."""

    def __init__(self, names, whole):
        self.names = names
        self.readers = [READERS[name] for name in names]
        self.space = {"__name__": f"random_forwards_{id(self)}", "Config": Config}
        exec(compile(source(self.readers, whole), "<block>", "exec"), self.space)
        self.plain = self.space["Block"](CHANNELS)
        self.ours = copy.deepcopy(self.plain)
        self.report = fused_res.fuse_(self.ours)
        for model in (self.ours, self.plain):  # a trace may have counted
            if hasattr(model, "it"):
                model.it = iter([0.5, 2.0] * 50)

    @property
    def fused(self):
        return isinstance(self.ours, FusedForward)

    def change(self):
        for reader in self.readers:
            if reader.change is None:
                continue
            reader.change(self.ours, self.space)
            changed = dict(self.space)
            reader.change(self.plain, self.space)
            for name in ("helper", "outer", "fn2", "max"):  # both call the same function
                if name in changed:
                    self.space[name] = changed[name]

    def difference(self, train, autocast=False):
        """The largest, of outputs, gradients and statistics."""
        found = []
        x = torch.randn(2, CHANNELS, 5, 5).to(memory_format=torch.channels_last)
        for model in (self.ours, self.plain):
            if "COUNT" in self.space:
                self.space["COUNT"][0] = 0
            model.train(train)
            given = x.clone().requires_grad_(train)
            with torch.set_grad_enabled(train), torch.autocast("cpu", enabled=autocast):
                outputs = [model(given).float() for _ in range(2)]
            tensors = [y.detach() for y in outputs]
            if train:
                tensors += torch.autograd.grad(
                    sum(y.square().sum() for y in outputs),
                    [given, *model.parameters()],
                    allow_unused=True,
                )
            found.append(tensors + [b.clone() for b in model.buffers()])
        worst = 0.0
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                scale = b.double().abs().max().clamp_min(1.0)
                worst = max(worst, ((a.double() - b.double()).abs().max() / scale).item())
        return worst


def check(pair, autocast=False):
    for step in ("as made", "changed"):
        if step == "changed":
            pair.change()
        for train in (False, True):  # gradients of a BatchNorm of 50 values: what is wrong is 1/2
            error = pair.difference(train)
            assert error < 1e-2, f"{pair.names}, {step}, train={train}: off by {error:.2g}"
        if autocast:
            error = pair.difference(False, autocast=True)
            assert error < 0.1, f"{pair.names}, {step}, autocast: off by {error:.2g}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("FUSED_RES_OF_A_TEST", "0.5")
    return lambda: monkeypatch.setenv("FUSED_RES_OF_A_TEST", "0.5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_each(name, one_thread, environment):
    for whole in (False, True):
        environment()
        pair = Pair([name], whole)
        check(pair, autocast=True)
        assert pair.fused or not READERS[name].fuses, pair.report
        assert not pair.fused or READERS[name].fuses, "what cannot be known is fused"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", sweep(range(GROUPS), quick=range(1)))
def test_random(group, one_thread, environment, capsys):
    draw = random.Random(group)
    counts = Counter()
    for i in range(BLOCKS // GROUPS):
        torch.manual_seed(i)
        environment()
        names = draw.sample(list(READERS), draw.randint(1, 4))
        if "helper" in names and "helper's code" in names:
            names.remove("helper")
        pair = Pair(names, whole=draw.random() < 0.5)
        check(pair)
        ordinary = all(READERS[name].fuses for name in names)
        counts[ordinary, pair.fused] += 1
        del pair
    gc.collect()
    could, did = counts[True, True] + counts[True, False], counts[True, True]
    with capsys.disabled():
        print(f"\n{sum(counts.values())} blocks, {did} of {could} fused of those that read "
              f"attributes, helpers, globals, modes or children")  # fmt: skip
    assert did >= 0.6 * could and counts[False, True] == 0
