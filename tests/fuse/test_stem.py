"""Convolution, BatchNorm and ReLU outside of residual blocks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from agreement import agree, outcome, randomise
from blocks import Configurable, SqueezeExcite
from model_libraries import timm, torchvision
from sweeps import sweep
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import fuse_, unfuse_
from fused_res.dispatch import backends, cpu_rules
from fused_res.nn import blocks as fused
from fused_res.nn.blocks import FusedForward, FusedStem
from fused_res.nn.sequential import FusedSequential

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(
    backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Small images get fused stems too."""
    monkeypatch.setattr(fused, "stem_pays", lambda x: True)


class Net(nn.Module):
    """A ResNet as torchvision's, of two blocks."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(Configurable(), Configurable())
        self.fc = nn.Linear(6, 4)

    def stem(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        return self.fc(self.layer(self.stem(x)).mean((2, 3)))


class Functional(Net):
    def stem(self, x):
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)


class Deep(Net):
    """As timm's: the stem goes on in an nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, 1, 1, bias=False),
        )  # fmt: skip


class Untraceable(Net):
    """Its forward depends on data; a child's does not."""

    def __init__(self):
        super().__init__()
        self.first = torchvision.ops.Conv2dNormActivation(3, 6, stride=2)

    def stem(self, x):
        return self.first(x) if x.sum() > -1e9 else self.first(-x)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.scale = Net(), 2.0

    def forward(self, x):
        return {"logits": self.backbone(x) * self.scale}["logits"]


def row() -> nn.Sequential:
    """One block alone is no row that runs in one call."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Configurable(), nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class PlainNet(nn.Module):
    """No residual block at all."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def frozen() -> nn.Module:
    net = Net()
    net.bn1 = torchvision.ops.FrozenBatchNorm2d(6)
    return net


def torchvisions() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=4)


def timms(**how):
    block = timm.models.resnet.BasicBlock
    return lambda: timm.models.resnet.ResNet(block, (1, 1, 1, 1), num_classes=4, **how)


ONE = "conv1 + bn1 + relu"
DEEP = "conv1.0 + conv1.1 + conv1.2 + conv1.3 + conv1.4 + conv1.5 + conv1.6 + bn1"
STEMS = {  # net -> the rows of its report, and its BatchNorms outside of blocks
    "as torchvision's": (Net, [("", ONE)], 1),
    "functional": (Functional, [("", ONE)], 1),
    "deep": (Deep, [("", f"{DEEP} + relu")], 3),
    "untraceable": (Untraceable, [("first", "0 + 1 + 2")], 1),
    "wrapped": (Wrapped, [("backbone", ONE)], 1),
    "nn.Sequential": (row, [("", "0 + 1 + 2")], 1),
    "frozen": (frozen, [("", ONE)], 0),
    "no block": (
        PlainNet,
        [("", "features.0 + features.1 + features.2, features.4 + features.5 + features.6")],
        2,
    ),
    "torchvision": (torchvisions, [("", ONE)], 1),
    "timm": (timms(), [("", "conv1 + bn1 + act1")], 1),
    "timm, deep": (timms(stem_type="deep", stem_width=4), [("", f"{DEEP} + act1")], 3),
}


def made(name) -> nn.Module:
    return randomise(STEMS[name][0]()).to(memory_format=torch.channels_last)


def image(*shape):
    return torch.randn(*(shape or (4, 3, 33, 30))).to(memory_format=torch.channels_last)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def batch_norms(model, x) -> int:
    """How many BatchNorms PyTorch runs."""
    with Calls() as seen, torch.no_grad():
        model(x)
    return sum("aten::" in name and "batch_norm" in name for name in seen.names)


@pytest.mark.parametrize("name", STEMS)
def test_what_is_fused(name):
    _, rows, _ = STEMS[name]
    net = made(name)
    kinds = [type(m) for m in net.modules()]
    keys, names = list(net.state_dict()), [n for n, _ in net.named_modules()]
    report = fuse_(net, dry_run=True)
    assert [type(m) for m in net.modules()] == kinds
    assert report == fuse_(net, strict=True) and report.stem == rows and not report.no_stem
    assert ("1 stem" in str(report)) and rows[0][1] in str(report)
    assert list(net.state_dict()) == keys and [n for n, _ in net.named_modules()] == names
    where = net.get_submodule(rows[0][0])
    assert isinstance(where, FusedStem) and not isinstance(where, FusedForward)
    after = [type(m) for m in net.modules()]
    again = fuse_(net)
    assert again.stem == again.fused == again.skipped == [] and again.already == report.fused
    assert [type(m) for m in net.modules()] == after
    assert unfuse_(net) == report.fused and [type(m) for m in net.modules()] == kinds


@needs_kernels
@pytest.mark.parametrize("name", STEMS)
def test_what_runs(name):
    net, x = made(name), image()
    fuse_(net)
    assert batch_norms(net.train(), x) == batch_norms(net.eval(), x) == 0
    unfuse_(net)
    assert batch_norms(net.train(), x) >= max(1, STEMS[name][2])


@pytest.mark.parametrize("name", sweep(STEMS, quick=[n for n in STEMS if n != "torchvision"]))
def test_within_the_rule(name):
    for train in (True, False):
        draws = []
        for _ in range(5):
            theirs = made(name)
            ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
            fuse_(ours)
            x = image()
            models = ours, theirs, exact
            draws.append([outcome(m, x.to(next(m.parameters())), train=train) for m in models])
        agree(*map(list, zip(*draws, strict=True)), name, largest=False)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", STEMS)
def test_copies_and_pickles(name):
    theirs = made(name).double()
    ours = copy.deepcopy(theirs)
    fuse_(ours)
    where, x = STEMS[name][1][0][0], image().double()
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(model.get_submodule(where), FusedStem)
        assert model.get_submodule(where)._is_as_recorded()
        for train in (True, False):
            expected = outcome(copy.deepcopy(theirs), x, train=train)
            same(outcome(copy.deepcopy(model), x, train=train), expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["as torchvision's", "deep", "nn.Sequential"])
def test_compiled(name, train):
    net = made(name).train(train)
    plain, x = copy.deepcopy(net), image()
    fuse_(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_exported_and_traced():
    net, x = made("as torchvision's").eval(), image()
    plain = copy.deepcopy(net)
    fuse_(net)
    graphs = torch.export.export(net, (x,)).module(), torch.jit.trace(net, x)
    with pytest.warns(UserWarning, match="script"):
        scripted = torch.jit.script(copy.deepcopy(net))
    for model in (*graphs, scripted, torch.fx.symbolic_trace(net)):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_optimized():
    """The graph of the whole model has the stem."""
    net, x = made("as torchvision's").eval(), image()
    plain = copy.deepcopy(net)
    fuse_(net)
    for model in (net, plain):
        served = fused_res.optimize_for_inference(model, x, tune=False)
        assert served.report.stem == [] and ONE in served.report.fused
        assert not isinstance(served, FusedStem)
        torch.testing.assert_close(served(x), plain(x), rtol=1e-4, atol=1e-4)
        assert fuse_(served).stem == []
    assert isinstance(net, FusedStem)


# --- what is left alone


def test_a_filter():
    net = Net()
    report = fuse_(net, filter_fn=lambda module, name: name != "", stems=True)
    assert type(net) is Net and report.stem == report.skipped == []
    asked = []
    fuse_(net, filter_fn=lambda module, name: asked.append((module, name)), stems=True)
    assert asked == [(net, "")]


def test_a_filter_is_of_blocks_unless_stems_are_asked_for():
    net, asked = Net(), []
    fuse_(net, filter_fn=lambda module, name: asked.append(name) or True)
    assert asked == ["layer.0", "layer.1"] and type(net) is Net


def test_a_class_on_top_of_a_stem_is_not_taken_off():
    """FSDP's, for example."""
    net = Net()
    fuse_(net)
    net.__class__ = on_top = type("OnTop", (type(net),), {})
    unfuse_(net)
    assert type(net) is on_top and isinstance(net, FusedStem)


class WithoutNorm(Net):
    def stem(self, x):
        return self.maxpool(self.relu(self.conv1(x)))


class OtherAct(Net):
    def stem(self, x):
        return self.maxpool(F.silu(self.bn1(self.conv1(x))))


@pytest.mark.parametrize("kind", [WithoutNorm, OtherAct])
def test_other_stems(kind):
    net = kind()
    report = fuse_(net)
    assert type(net) is kind and report.fused and report.stem == report.no_stem == []
    assert "stem" not in str(report)


class OfData(Net):
    def stem(self, x):
        return super().stem(x if x.sum() > 0 else -x)


class TwoInputs(Net):
    def forward(self, x, mask=None):
        y = super().forward(x)
        return y if mask is None else y * mask


class Drops(Net):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class LooksInside(Net):
    def stem(self, x):
        return super().stem(x) * self.layer[0].gain


@pytest.mark.parametrize("kind", [OfData, TwoInputs, Drops, LooksInside])
def test_the_reason(kind):
    net = kind()
    net.layer[0].gain = 2.0
    plain = copy.deepcopy(net)
    report = fuse_(net, strict=True)
    assert len(report.fused) == 2 and report.stem == report.skipped == [] and type(net) is kind
    ((name, reason),) = report.no_stem
    assert name == "" and f"no stem of (the model): {reason}" in str(report)
    x = image()
    torch.manual_seed(0)
    y = net(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)


def test_an_attribute_of_a_reserved_name():
    net = Net()
    net.backend = "its own"
    ((_, reason),) = fuse_(net).no_stem
    assert "'backend'" in reason and type(net) is Net


def test_a_row_of_blocks_stays_one_call():
    stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    net = nn.Sequential(*stem, Configurable(), Configurable())
    for dry_run in (True, False, False):
        assert fuse_(net, dry_run=dry_run).stem == []
    assert type(net) is FusedSequential
    net = nn.Sequential(nn.Sequential(*stem), Configurable(), Configurable())
    assert fuse_(net).stem == [("0", "0 + 1 + 2")] and type(net) is FusedSequential


def test_blocks_inside_are_not_looked_into():
    net = Net()
    net.layer = nn.Sequential(Configurable(extra=SqueezeExcite(6)), nn.GELU(), Configurable())
    report = fuse_(net)
    assert report.stem == [("", ONE)] and [n for n, _ in report.partly] == ["layer.0"]


# --- changes and hooks


@needs_kernels
@pytest.mark.parametrize("name", ["conv1", "bn1", "relu"])
def test_hooks_in_the_stem(name):
    net, x, seen = made("as torchvision's"), image(), []
    plain = copy.deepcopy(net)
    fuse_(net)
    handle = net.get_submodule(name).register_forward_hook(lambda *a: seen.append(name))
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert seen == [name]
    handle.remove()
    assert batch_norms(net, x) == 0
    hooked = made("as torchvision's")
    hooked.get_submodule(name).register_forward_hook(lambda *a: seen.append(name))
    assert name in fuse_(hooked).no_stem[0][1] and type(hooked) is Net


@needs_kernels
def test_changes_after_the_stem():
    """The program calls what is there."""
    net, x, seen = made("as torchvision's"), image(), []
    plain = copy.deepcopy(net)
    fuse_(net)
    for name in ("maxpool", "layer", "layer.1", "fc"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(1))
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 4 and net._is_as_recorded()
    for model in (net, plain):
        torch.manual_seed(3)
        model.fc, model.maxpool = nn.Linear(6, 2), nn.AvgPool2d(2)
    unfuse_(net.layer)
    fuse_(net.layer, filter_fn=lambda module, name: name == "0")
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert net._is_as_recorded() and isinstance(net, FusedStem)


def test_changes_in_the_stem():
    net, x = made("as torchvision's"), image()
    plain = copy.deepcopy(net)
    fuse_(net)
    for model in (net, plain):
        model.relu = nn.GELU()
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not net._is_as_recorded() and fuse_(net).stem == []
    for model in (net, plain):
        torch.manual_seed(3)
        model.relu, model.conv1 = nn.ReLU(), nn.Conv2d(3, 6, 3, 2)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)


def test_weights_that_change():
    net, x = made("as torchvision's").eval(), image()
    plain = copy.deepcopy(net)
    fuse_(net)
    with torch.no_grad():
        for _ in range(3):
            for model in (net, plain):
                model.conv1.weight.mul_(1.1)
                model.bn1.running_var.add_(0.1)
            torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
            net.load_state_dict(plain.state_dict())


def test_other_inputs_and_backends():
    net, x = made("as torchvision's").eval(), image()
    plain = copy.deepcopy(net)
    fuse_(net)
    torch.testing.assert_close(net(x=x), plain(x), rtol=1e-4, atol=1e-4)
    with fused_res.backend("eager"):
        torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x), plain(x), rtol=0.05, atol=0.05)
    assert net(x[:0]).shape == (0, 4)
    for wrong in (x[0, 0], "text"):
        with pytest.raises((RuntimeError, TypeError)):
            net(wrong)


def test_where_it_pays():
    nchw, small = torch.randn(8, 3, 32, 32), image(1, 3, 32, 32)
    large = image(8, 3, 32, 32)
    assert list(map(cpu_rules.stem_pays, (nchw, small, large))) == [True, False, True]
    with torch.no_grad():
        assert list(map(cpu_rules.stem_pays, (nchw, small, large))) == [False, True, True]


@needs_kernels
def test_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(fused, "stem_pays", cpu_rules.stem_pays)
    net, x = made("as torchvision's").eval(), image().contiguous()
    fuse_(net)
    assert batch_norms(net, x) == 1 and batch_norms(net, image()) == 0
    with fused_res.backend("cpu"):
        assert batch_norms(net, x) == 0


def test_compiled_for_any_batch():
    """With the rules, which must not ask how many images there are."""
    net, x = made("as torchvision's"), image(4, 3, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "stem_pays", cpu_rules.stem_pays)
        fuse_(net)
        shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
        graph = torch.export.export(net.eval(), (x,), dynamic_shapes=shapes).module()
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
        for train in (False, True):
            net.train(train)
            with torch.set_grad_enabled(train):
                for layout in (torch.channels_last, torch.contiguous_format):
                    for count in (4, 6):
                        x = image(count, 3, 32, 32).contiguous(memory_format=layout)
                        twin = copy.deepcopy(net)
                        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
                        if not train:
                            torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-4)
