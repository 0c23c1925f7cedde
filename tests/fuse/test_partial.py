"""Blocks of which only parts run fused: which parts, and that they compute the same."""

import copy
import io
import pickle
from functools import partial

import blocks
import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from agreement import agree, outcome, randomise
from blocks import Configurable, variant
from model_libraries import timm, torchvision
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import fuse_, unfuse_

pytestmark = pytest.mark.usefixtures("one_thread")


def norm_overwritten(self, x):
    """What the first norm is of is overwritten before the add."""
    h = self.conv1(x)
    y = self.bn1(h)
    other = self.bn2(self.conv2(h.relu_()))
    return self.last(y + other * 2)


def input_overwritten(self, x):
    """What the convolution is of is overwritten between it and its add."""
    h = x * 1
    y = self.bn1(self.conv1(h))
    h += 1
    return self.last(y + self.bn2(self.conv2(h)).sigmoid() + h)


def overwritten_through_a_view(self, x):
    h = x * 1
    y = self.bn1(self.conv1(h))
    h[:, :2].zero_()
    return self.last(y + self.bn2(self.conv2(h)).sigmoid())


class IntoTheSecond(nn.Module):
    def forward(self, x, y):
        y += x
        return y


def second_overwritten(self, x):
    """By a module that writes into another input than its first, between two stages."""
    h = x * 1
    y = self.act(self.bn1(self.conv1(h)))
    other = self.into(self.conv3(x), h)
    return self.bn2(self.conv2(y)) * 2 + other


def out_overwritten(self, x):
    h = x * 1
    y = self.act(self.bn1(self.conv1(h)))
    torch.sigmoid(self.conv3(x), out=h)
    return self.bn2(self.conv2(y)) * 2 + h


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        norm_overwritten,
        input_overwritten,
        overwritten_through_a_view,
        second_overwritten,
        out_overwritten,
    ],
)
def test_what_is_overwritten(forward, train):
    theirs = randomise(
        variant(forward, into=IntoTheSecond, conv3=partial(nn.Conv2d, 6, 6, 1))()
    ).train(train)
    ours = copy.deepcopy(theirs)
    assert len(fuse_(ours).partly) == 1
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """Names of the ops, as they run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def count(self, *words):
        return sum(any(word in name for word in words) for name in self.names)


def run(model, x):
    """Its first output, of as many inputs as it takes."""
    cls = getattr(type(model), "original", type(model))
    out = model(x, x.flip(0)) if cls.forward is two_shortcuts else model(x)
    return out[0] if isinstance(out, tuple) else out


def calls(module, x) -> Calls:
    with Calls() as seen, torch.no_grad():
        run(module, x)
    return seen


needs_kernels = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)


def pre_activated(self, x):
    h = self.act(self.bn1(x))
    return self.conv2(self.act(self.bn2(self.conv1(h)))) + x


def multiplied_in_place(self, x):
    h = self.bn1(self.conv1(x))
    h *= 0.5
    h -= x
    return self.last(self.bn2(self.conv2(self.act(h))) + x)


def nested(self, x):
    """Every add's left side is the one before."""
    h = self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))
    h += x
    return self.last(h)


def written_into_kept(self, x):
    h = x * 2
    kept = h
    h += self.bn1(self.conv1(x))
    return self.last(self.bn2(self.conv2(h)) * 2 + kept)


def many_branches(self, x):
    """As in MobileOne: each branch is added to the sum of those before, in place."""
    h = self.bn1(x) + self.bn2(self.conv1(x))
    h += self.bn3(self.conv2(x))
    h += self.bn4(x)
    return self.last(h).sigmoid()


def the_last_first(self, x):
    """The branch that is added last is computed before sums are written into."""
    first = self.bn1(self.conv1(x))
    h = self.bn2(self.conv2(x)) + self.bn3(x)
    h += self.bn4(x)
    h += first
    return self.last(h).sigmoid()


def inner_relu_in_place(self, x):
    """What a ReLU overwrites between a shortcut and its add is its own."""
    h = self.bn1(self.conv1(x))
    shortcut = self.bn2(self.conv2(x))
    gate = self.extra(self.conv3(h.mean((2, 3), True))).sigmoid()
    return self.last(h * gate + shortcut)


def both_relus(self, x):
    return self.last(self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))) + x).mul(2)


def broadcast(self, x):
    return self.act(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)).mean((2, 3), True)) * 2


def two_shortcuts(self, x, shortcut=None):
    shortcut = x if shortcut is None else shortcut
    return self.last(self.branch(x) + shortcut)


class Attention(nn.Module):
    """Cannot be traced: its branches depend on data."""

    def forward(self, x):
        return x * (x.mean() if x.sum() > 0 else 2 * x.std())


class Split(nn.Module):
    """Slices that take turns, as in Res2Net."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, 1, 1) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        last, out, slices = 0, [], x.chunk(2, 1)
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            last = F.relu(bn(conv(slices[i] + last)))
            out.append(last)
        return F.relu(self.bn(self.conv(torch.cat(out, 1))) + x, inplace=True) + 1


class Grouped(nn.Module):
    """timm's norms, with their activation inside, groups, and a projection."""

    def __init__(self):
        super().__init__()
        norm = timm.layers.BatchNormAct2d
        self.a, self.an = nn.Conv2d(6, 6, 3, 1, 1, groups=3), norm(6)
        self.b, self.bn = nn.Conv2d(6, 6, 3, 1, 1, bias=False), norm(6, act_layer=nn.SiLU)
        self.c, self.cn = nn.Conv2d(6, 8, 1), norm(8, apply_act=False)
        self.d, self.dn = nn.Conv2d(6, 8, 1), norm(8, apply_act=False)
        self.drop = timm.layers.DropPath(0.3)

    def forward(self, x):
        out = self.drop(self.cn(self.c(self.bn(self.b(self.an(self.a(x)))))))
        return (out + self.dn(self.d(x))).relu()


def seen(attention):
    return lambda: Configurable(extra=attention())


PARTS = {  # block; its norms, and of them run fused; a word its reason has
    "squeeze and excite": (lambda: Configurable(extra=blocks.SqueezeExcite(6)), 2, 2, "extra"),
    "ECA": (lambda: Configurable(extra=timm.layers.EcaModule(6)), 2, 2, "extra"),
    "drop path": (lambda: Configurable(extra=timm.layers.DropPath(0.2)), 2, 2, "DropPath"),
    "stochastic depth": (
        lambda: Configurable(extra=torchvision.ops.StochasticDepth(0.2, "row")), 2, 2, "Stochastic",
    ),
    "anti-alias": (lambda: Configurable(extra=timm.layers.BlurPool2d(6, stride=1)), 2, 2, "Blur"),
    "GELU": (lambda: Configurable(act=nn.GELU), 2, 2, "GELU"),
    "LeakyReLU": (lambda: Configurable(act=nn.LeakyReLU), 2, 2, "LeakyReLU"),
    "ReLU6 at the end": (lambda: Configurable(last=nn.ReLU6), 2, 2, "not the last"),
    "pre-activation": (variant(pre_activated), 2, 2, "pre-activation"),
    "weight_norm": (
        blocks.changed(lambda m: parametrizations.weight_norm(m.conv1)), 2, 2, "parametrization",
    ),
    "one convolution twice": (blocks.same_conv_twice, 2, 2, "conv1"),
    "two adds": (variant(blocks.two_adds), 2, 2, "add"),
    "result used twice": (variant(blocks.used_twice), 2, 2, ""),
    "shortcut from inside": (variant(blocks.exit_inside), 2, 2, ""),
    "norm's output used twice": (variant(blocks.norm_used_twice), 2, 2, "bn1"),
    "scaled add": (variant(blocks.scaled), 2, 2, ""),
    "two outputs": (variant(blocks.two_outputs), 2, 2, "more than one"),
    "ReLU before the norm": (variant(blocks.activation_before_norm), 2, 2, "bn1"),
    "*= and -=": (variant(multiplied_in_place), 2, 2, ""),
    "adds in a row": (variant(nested), 2, 2, ""),
    "written into another": (variant(written_into_kept), 2, 2, ""),
    "many branches": (
        variant(many_branches, **dict.fromkeys(("bn3", "bn4"), partial(nn.BatchNorm2d, 6))),
        4, 4, "",
    ),
    "the last first": (
        variant(the_last_first, **dict.fromkeys(("bn3", "bn4"), partial(nn.BatchNorm2d, 6))),
        4, 4, "",
    ),
    "a ReLU in place within": (
        variant(
            inner_relu_in_place,
            conv3=lambda: nn.Conv2d(6, 6, 1),
            extra=lambda: nn.ReLU(inplace=True),
        ), 2, 2, "",
    ),
    "ReLU before and after": (variant(both_relus), 2, 2, ""),
    "broadcast": (variant(broadcast), 2, 2, ""),
    "a second input": (variant(two_shortcuts), 2, 2, "second input"),
    "slices": (Split, 3, 3, ""),
    "timm's norms": (Grouped, 4, 4, "SiLU"),
    "a norm of its own kind": (
        blocks.changed(lambda m: setattr(m, "bn1", blocks.OwnBatchNorm(6))), 2, 1, "OwnBatchNorm",
    ),
    "a part that cannot be traced": (seen(Attention), 2, 2, "Attention"),
}  # fmt: skip


def made(name) -> nn.Module:
    return randomise(PARTS[name][0]())


def once(model, x, **how):
    return outcome(model, x, call=lambda x: run(model, x), **how)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=name)


def image(*shape):
    return torch.randn(*(shape or (4, 6, 9, 7)))


@pytest.mark.parametrize("name", PARTS)
def test_what_is_fused(name):
    _, norms, fused, word = PARTS[name]
    module = made(name)
    names = [n for n, _ in module.named_modules()]
    parameters = list(map(id, module.parameters()))
    keys = list(module.state_dict())
    cls = type(module)
    report = fuse_(nn.Sequential(module), dry_run=True)
    assert type(module) is cls
    assert report == fuse_(net := nn.Sequential(module))
    ((where, reason),) = report.partly
    assert (where, report.fused) == ("0", [])
    assert reason.startswith(f"{fused} of {norms} norms; ") and word in reason, reason
    assert [n for n, _ in module.named_modules()] == names
    assert list(map(id, module.parameters())) == parameters and list(module.state_dict()) == keys
    assert isinstance(module, cls) and type(module).__name__ == "Fused" + cls.__name__
    assert fuse_(net).partly == []  # a second time
    assert unfuse_(net) == ["0"] and type(module) is cls


@needs_kernels
@pytest.mark.parametrize("name", PARTS)
def test_what_runs(name):
    _, norms, fused, _ = PARTS[name]
    module = made(name)
    fuse_(module)
    seen = calls(module.train(), image())
    assert seen.count("native_batch_norm", "_batch_norm_with_update") == norms - fused
    assert seen.count("fused_res::bn_act") > 0
    assert calls(module.eval(), image()).count("batch_norm") == norms - fused


def nodes_behind(y):
    """Names of the autograd nodes."""
    found, seen = [y.grad_fn], set()
    for node in found:
        if node is not None and node not in seen:
            seen.add(node)
            found += [before for before, _ in node.next_functions]
    return [node.name() for node in seen]


@needs_kernels
@pytest.mark.parametrize(
    ("make", "convolutions"),
    [
        (lambda: timm.models.resnet.BasicBlock(32, 32, attn_layer="se"), 2),  # those of SE
        (lambda: timm.models.resnet.BasicBlock(32, 32, act_layer=nn.SiLU), 1),  # that with the add
        (lambda: timm.models.resnet.Bottleneck(32, 8, attn_layer="eca"), 1),  # that of ECA
        (lambda: timm.models.byobnet.RepVggBlock(32, 32), 0),  # both and their sum are one call
    ],
    ids=["SE", "SiLU", "ECA bottleneck", "RepVGG"],
)
def test_a_part_trains_in_one_call(make, convolutions):
    """Stages that follow each other, with their convolutions, which may then be native kernels."""
    model = make().to(memory_format=torch.channels_last)
    fuse_(model)
    x = torch.randn(8, 32, 12, 12).contiguous(memory_format=torch.channels_last)
    names = nodes_behind(model(x))
    assert sum("_ResBlock" in name for name in names) == 1
    assert sum("Convolution" in name for name in names) == convolutions


@pytest.mark.parametrize("name", PARTS)
def test_within_the_rule(name):
    for train in (True, False):
        draws = []
        for _ in range(5):
            theirs = made(name)
            ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
            fuse_(ours)
            x = image()
            draws.append(
                [once(m, x.to(next(m.parameters())), train=train) for m in (ours, theirs, exact)]
            )
        agree(*map(list, zip(*draws, strict=True)), name, largest=False)


@pytest.mark.parametrize("name", PARTS)
def test_wiring(name):
    """In fp64, where all is the reference: a copy, a pickle, and without the fast paths."""
    theirs = made(name).double()
    ours = copy.deepcopy(theirs)
    fuse_(ours)
    models = [ours, copy.deepcopy(ours)]
    if "Variant" not in type(theirs).__name__ and name != "weight_norm":  # which do not pickle
        models.append(pickle.loads(pickle.dumps(ours)))
    x = image().double()
    for train in (True, False):
        expected = once(copy.deepcopy(theirs), x, train=train)
        for model in models:
            assert "Fused" in type(model).__name__
            same(once(copy.deepcopy(model), x, train=train), expected)


@needs_kernels
def test_drop_path_is_not_there_in_eval_mode():
    """Then the block is one plan, a kernel for each convolution."""
    module = made("drop path")
    fuse_(module)
    plain = copy.deepcopy(module)
    unfuse_(plain)
    x = image()
    assert calls(module.eval(), x).count("::bn_act") == 0
    torch.testing.assert_close(module(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
    module.extra.train()  # by itself
    assert calls(module, x).count("rand", "bernoulli") == 1
    module.extra.eval()
    module.extra = timm.layers.DropPath(0.9)  # replaced, and training
    assert calls(module, x).count("rand", "bernoulli") == 1


def test_second_input_and_none():
    theirs = made("a second input").double()
    ours = copy.deepcopy(theirs)
    fuse_(ours)
    x, other = image().double(), image().double()
    for args, kwargs in (
        ((x, other), {}),
        ((x,), {}),
        ((x, None), {}),
        ((x,), {"shortcut": other}),
    ):
        torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs))


def test_hooks_and_changes_after_fusing():
    x = image()
    module = made("squeeze and excite")
    plain = copy.deepcopy(module)
    fuse_(module)
    seen = []
    handle = module.bn1.register_forward_hook(lambda *a: seen.append("bn1"))
    module.extra.register_forward_hook(lambda *a: seen.append("extra"))
    module.extra.fc.register_forward_hook(lambda *a: seen.append("fc"))
    module(x)
    assert seen == ["bn1", "fc", "extra"]
    handle.remove()
    for model in (module, plain):
        torch.manual_seed(3)
        model.extra = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh())
        model.bn2 = blocks.OwnBatchNorm(6)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)


def test_weights_change_between_inferences():
    module = made("squeeze and excite").eval()
    plain = copy.deepcopy(module)
    fuse_(module)
    x = image()
    with torch.no_grad():
        for step in range(3):
            torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)
            for model in (module, plain):
                model.conv1.weight.mul_(1 + step)
                model.bn2.running_mean.add_(0.1)
        half = x[:2]
        torch.testing.assert_close(module(half), plain(half), rtol=1e-5, atol=1e-5)
        module.conv2.weight.data = plain.conv2.weight.data = torch.randn(6, 6, 3, 3)
        torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_again_and_again(name):
    """What was prepared for one input serves the next."""
    ours = made(name).eval()
    plain = copy.deepcopy(ours)
    fuse_(ours)
    with torch.no_grad():
        for size in (9, 9, 8, 9, 9):
            x = image(2, 6, size, size)
            torch.testing.assert_close(run(ours, x), run(plain, x), rtol=1e-5, atol=1e-5)


def test_every_convolution_there_is():
    """Strided, grouped and dilated ones, for which other kernels are prepared."""

    class Mixed(nn.Module):
        def __init__(self, **how):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding="same"), nn.BatchNorm2d(16)
            self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, **how), nn.BatchNorm2d(16)

        def forward(self, x):
            h = F.silu(self.bn1(self.conv1(x))) + x
            return F.relu(self.bn2(self.conv2(h))).sigmoid()

    for how in ({}, {"stride": 2}, {"groups": 16}, {"groups": 2, "padding": 1}, {"dilation": 2}):
        ours = randomise(Mixed(**how)).eval()
        plain = copy.deepcopy(ours)
        assert len(fuse_(ours).partly) == 1
        with torch.no_grad():
            for _ in range(3):
                x = image(2, 16, 14, 14).contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


def test_state_dict_loads_both_ways():
    a, b = made("timm's norms"), made("timm's norms")
    fuse_(a)
    b.load_state_dict(a.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(b.state_dict(), buffer)
    buffer.seek(0)
    a.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    torch.testing.assert_close(a.eval()(x := image()), b.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["squeeze and excite", "pre-activation", "timm's norms", "slices"])
def test_compiled(name, train):
    module = made(name).train(train)
    if name == "timm's norms":
        module.drop.drop_prob = 0.0  # the compiler draws other numbers
    fuse_(module)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x, y = (image().requires_grad_() for _ in range(2))
    y.data.copy_(x)
    a, b = module(x), compiled(y)
    torch.testing.assert_close(a, b)
    dy = torch.randn_like(a)
    torch.testing.assert_close(*(torch.autograd.grad(o, i, dy)[0] for o, i in ((a, x), (b, y))))


def test_export_and_feature_extraction():
    model = randomise(timm.create_model("seresnet18", num_classes=10)).eval()
    plain = copy.deepcopy(model)
    assert len(fuse_(model).partly) == 8
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x), rtol=1e-4, atol=1e-4)
    extract = torchvision.models.feature_extraction.create_feature_extractor
    for name in ("layer2.1.bn2", "layer3"):
        a, b = (extract(m, {name: "out"})(x)["out"] for m in (model, plain))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    served = fused_res.optimize_for_inference(plain, x, tune=False)
    torch.testing.assert_close(served(x), plain(x), rtol=1e-4, atol=1e-4)


def test_graphs_are_left_alone():
    """torch.fx writes a graph's forward onto its class whenever it is compiled again."""
    graph = torch.fx.symbolic_trace(Configurable(act=nn.GELU))
    holds = nn.Sequential(graph, Configurable())
    report = fuse_(holds)
    assert report.fused == ["1"] and [n for n, _ in report.skipped] == ["0"]
    graph.recompile()
    holds(image())


def test_tensors_made_by_the_forward():
    """fx keeps them on its copy of the block, which is not the block."""

    def offset(self, x):
        return self.last(self.branch(x) + x + torch.tensor([0.5]))

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv, self.bn = (
                variant(offset)(),
                nn.Conv2d(6, 6, 1),
                nn.BatchNorm2d(6),
            )

        def forward(self, x):
            return F.silu(self.bn(self.conv(self.inner(x))) + x)

    model, x = Holds(), image()
    plain = copy.deepcopy(model)
    report = fuse_(model)
    assert [n for n, _ in report.partly] == [""] and [n for n, _ in report.skipped] == ["inner"]
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("name", ["many branches", "the last first", "a ReLU in place within"])
def test_every_add_is_fused(name):
    module = made(name)
    fuse_(module)
    assert " + " not in module.plan.usual.source and "+=" not in module.plan.usual.source


# --- forwards that do, or are asked to do, more than their dataflow ------------------------------


def excited(self, x):
    h = self.branch(x)
    return h * h.mean((2, 3), True).sigmoid()


def test_a_relu_called_in_two_places():
    """One of them is folded into a part: hooks on it and another in its place count for both."""

    def forward(self, x):
        h = self.act(self.bn1(self.conv1(x)))
        return self.act(excited(self, h) + x)

    ours = randomise(variant(forward)())
    plain = copy.deepcopy(ours)
    fuse_(ours)
    seen, x = [], image()
    handle = ours.act.register_forward_hook(lambda *a: seen.append(1))
    ours(x)
    handle.remove()
    assert len(seen) == 3
    for model in (ours, plain):
        model.act = nn.GELU()
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("extra", [nn.Dropout(0.2), timm.layers.DropPath(0.2)])
def test_what_only_eval_mode_fuses(extra):
    ours = randomise(Configurable(extra=extra)).eval()
    plain = copy.deepcopy(ours)
    fuse_(ours)
    seen, x = [], image()
    handle = ours.last.register_forward_hook(lambda *a: seen.append(1))
    ours(x)
    handle.remove()
    assert seen == [1]
    for model in (ours, plain):
        model.last = nn.GELU()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))


def test_a_second_input_that_is_not_used():
    def forward(self, x, other=None):
        return self.last(self.branch(x) + x)

    ours = randomise(variant(forward)())
    ours.extra = nn.Dropout(0.1)
    plain = copy.deepcopy(ours.eval())
    fuse_(ours)
    x = image()
    with torch.no_grad():
        for other in (image(), "a word"):
            torch.testing.assert_close(ours(x, other), plain(x, other))


class Tap(nn.Module):
    def forward(self, x):
        self.value = x.mean()
        return x


class AlwaysDropout(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, True)


def test_what_returns_its_input_and_does_more():
    ours = randomise(Configurable(extra=AlwaysDropout(0.5))).eval()
    fuse_(ours)
    x = image()
    assert not torch.equal(ours(x), ours(x))
    ours = randomise(Configurable(extra=Tap())).eval()
    fuse_(ours)
    ours(x)
    assert isinstance(ours.extra.value, torch.Tensor)


class Writes(nn.Module):
    """A leaf of its own that writes into its input."""

    def forward(self, x):
        return x.mul_(F.relu6(x + 3) / 6)


def through_a_writer(self, x):
    shortcut = self.bn1(self.conv1(x))
    return self.last(self.bn2(self.conv2(self.extra(x))) + shortcut).sigmoid()


def asks_for_a_tensor(self, x):
    y = x if isinstance(x, torch.Tensor) else x * 2
    return self.last(self.branch(x) + y).sigmoid()


def without_autocast(self, x):
    h = self.act(self.bn1(self.conv1(x)))
    with torch.autocast("cpu", enabled=False):
        h = self.bn2(self.conv2(h.float()))
    return self.last(h + x).sigmoid()


def checkpointed(self, x):
    part = torch.utils.checkpoint.checkpoint
    return self.last(part(self.branch, x, use_reentrant=False) + x).sigmoid()


def by_a_buffer(self, x):
    return self.last(self.branch(x) * self.bn1.running_var[0].item() + x)


def of_another_shape(self, x):
    pooled = self.bn2(self.conv2(F.adaptive_avg_pool2d(x, 1)))
    return self.last(self.bn1(self.conv1(x)) + pooled).sigmoid()


def plus_a_number(self, x):
    return self.last(self.bn1(self.conv1(x)) + x.shape[0]) + self.bn2(self.conv2(x)).sigmoid()


MORE = [
    through_a_writer, asks_for_a_tensor, without_autocast, checkpointed, by_a_buffer,
    of_another_shape, plus_a_number,
]  # fmt: skip


@pytest.mark.parametrize("forward", MORE, ids=lambda f: f.__name__)
def test_the_same_as_before(forward):
    ours = randomise(variant(forward, extra=Writes())()).eval()
    plain = copy.deepcopy(ours)
    fuse_(ours)
    for model in (ours, plain):
        model.bn1.running_var.mul_(1.5)
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for size in (9, 9, 8):
                x = image(2, 6, size, size)
                torch.testing.assert_close(
                    ours(x.clone()), plain(x.clone()), rtol=0.02 if autocast else 1e-5, atol=0.02
                )


def test_checkpoints_inside_are_kept():
    ours = variant(checkpointed)()
    (row,) = fuse_(ours).skipped
    assert "checkpoints" in row[1]


def test_side_effects_of_the_forward():
    def keeps(self, x):
        h = self.branch(x)
        self.kept.append(h)
        self._last = h
        return self.last(h + x).sigmoid()

    def draws(self, x):
        if self.training and numpy.random.rand() < 0.5:
            return x
        return self.last(self.branch(x) + x)

    ours = variant(keeps)()
    ours.kept = []
    assert fuse_(ours).skipped and ours.kept == []
    ours(x := image())
    assert len(ours.kept) == 1 and ours._last is ours.kept[0]
    numpy.random.seed(3)
    expected = [int(n) for n in numpy.random.randint(1 << 30, size=4)]
    numpy.random.seed(3)
    ours = variant(draws)()
    assert fuse_(ours).skipped
    assert [int(n) for n in numpy.random.randint(1 << 30, size=4)] == expected
    assert sum(ours(x) is x for _ in range(40)) > 5


def test_a_fused_model_is_traced():
    ours = randomise(variant(lambda self, x: self.last(excited(self, x) + x))()).eval()
    assert fuse_(ours).partly
    x = image()
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), ours(x))


def test_children_taken_away():
    def optional(self, x):
        h = self.bn1(self.conv1(x))
        h = h if self.extra is None else h * self.extra(h).sigmoid()
        return self.last(h if self.bn2 is None else self.bn2(self.conv2(h)) + x)

    for names in (("extra",), ("extra", "bn2")):
        ours = randomise(variant(optional, extra=nn.Conv2d(6, 6, 1))())
        plain = copy.deepcopy(ours)
        assert fuse_(ours).partly
        for name in names:
            setattr(ours, name, None)
            setattr(plain, name, None)
        torch.testing.assert_close(ours(x := image()), plain(x))


def add_into_a_convolution(self, x):
    h = self.conv1(x)
    h += self.bn1(x)
    return self.last(h) * 2


def add_into_a_norm(self, x):
    h = self.bn2(self.conv1(x))
    h += self.bn1(x)
    return self.last(h) * 2


def add_into_a_smaller_one(self, x):
    h = self.bn2(self.conv1(x[..., :1, :1]))
    h += self.bn1(x)
    return self.last(h) * 2


@pytest.mark.parametrize("forward", [add_into_a_convolution, add_into_a_norm])
def test_an_add_in_place_keeps_the_left_sides_dtype(forward):
    theirs = randomise(variant(forward)())
    ours = copy.deepcopy(theirs)
    assert len(fuse_(ours).partly) == 1
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (m(x) for m, x in zip((ours, theirs), [image()] * 2, strict=True))
    assert a.dtype == b.dtype == torch.bfloat16


def test_an_add_in_place_does_not_broadcast_the_left_side():
    for module in (plain := variant(add_into_a_smaller_one)()), copy.deepcopy(plain):
        if module is not plain:
            assert len(fuse_(module).partly) == 1
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            module(image())


def reads_a_mean(self, x):
    h = self.act(self.bn1(self.conv1(x)))
    mean = self.bn1.running_mean * 1
    return self.bn2(self.conv2(h)) * 2 + x, mean


def reads_a_count(self, x):
    h = self.bn1(self.conv1(x))
    count = self.bn1.num_batches_tracked + 0
    return (h + x) * 2, count


@pytest.mark.parametrize("forward", [reads_a_mean, reads_a_count])
def test_statistics_are_read_when_they_were(forward):
    theirs = randomise(variant(forward)())
    ours = copy.deepcopy(theirs)
    assert len(fuse_(ours).partly) == 1
    x = image()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def gated(self, x):
    h = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
    x += h * self.extra(h).sigmoid()
    return self.last(x)


def test_what_is_not_read_by_the_backward_pass_may_be_overwritten():
    """The input of frozen convolutions."""
    theirs = randomise(variant(gated)())
    for name, p in theirs.named_parameters():
        p.requires_grad_("bn" in name)
    ours = copy.deepcopy(theirs)
    assert len(fuse_(ours).partly) == 1
    x = image()
    ours(x.clone()).sum().backward()
    theirs(x.clone()).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)
    y = ours(x.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), ours.bn1.weight, create_graph=True)


def test_an_attribute_of_a_reserved_name_inside():
    """What is not fused on its own is still seen by what it is in."""

    class Outer(Configurable):
        def forward(self, x):
            return self.extra(x) + self.bn1(self.conv1(x))

    inner = Configurable()
    inner.backend = "its own"
    report = fuse_(Outer(extra=inner))
    assert [name for name, _ in report.skipped] == ["extra"]
    assert report.partly[0][1].startswith("3 of 4 norms")


def test_an_attribute_of_a_reserved_name():
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    holds = type("Holds", (nn.Module,), {"forward": lambda self, x: self.inner(x)})()
    holds.inner, holds.backend = plain, "of no interest"
    assert fuse_(holds).skipped == []
    ours = Configurable()
    ours.backend = "its own"
    ((_, reason),) = fuse_(ours).skipped
    assert "'backend'" in reason and ours.backend == "its own"
    ours(image())


def test_untraceable_blocks_are_named():
    model = nn.Sequential(variant(blocks.depends_on_data)(), Configurable())
    report = fuse_(model)
    assert report.fused == ["1"] and [n for n, _ in report.skipped] == ["0"]


def test_segments_keep_their_backend():
    module = made("squeeze and excite")
    fuse_(module)
    with fused_res.backend("eager"):
        assert calls(module, image()).count("fused_res::") == 0
    module.backend = "eager"
    assert calls(module, image()).count("fused_res::") == 0
