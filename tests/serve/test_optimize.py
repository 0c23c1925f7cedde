"""optimize_for_inference: the same numbers, what is fused, what inputs it takes, and that neither
stale weights nor changes of the user's model come of it."""

import collections
import copy
import io
import pickle
import warnings

import blocks
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agreement import agree, outcome, randomise
from errors import rule
from model_libraries import timm, torchvision
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import optimize_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")


def optimized(model, example, **kwargs):
    return optimize_for_inference(model, example, **({"tune": False} | kwargs))


class HandWritten(nn.Module):
    """A net for small images as people write them."""

    def __init__(self, pool=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(blocks.BasicBlock(8, 8), blocks.BasicBlock(8, 11, 2))
        self.dropout = nn.Dropout(0.5)
        self.pool = pool
        self.fc = nn.Linear(44 if pool == 3 else 11, 5)

    def forward(self, x):
        out = self.layers(F.relu(self.bn(self.conv(x))))
        out = F.avg_pool2d(out, self.pool)
        return self.fc(self.dropout(out.flatten(1)))


class Dense(nn.Module):
    """Pre-activation layers, each input of which is all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10)])
        self.squeeze = nn.ModuleList([nn.Conv2d(6, 8, 1), nn.Conv2d(10, 8, 1)])
        self.inner = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.grow = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])

    def forward(self, x):
        features = [self.stem(x)]
        for norm, squeeze, inner, grow in zip(
            self.norms, self.squeeze, self.inner, self.grow, strict=True
        ):
            out = squeeze(F.relu(norm(torch.cat(features, 1))))
            features.append(grow(inner(out).relu_()))
        return torch.cat(features, 1).mean((2, 3))


class Mobile(nn.Module):
    """Depthwise convolutions and ReLU6."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 7, 3, padding="same")

    def forward(self, x):
        out = self.stem(20 * x)
        out = out + self.point(F.relu6(self.bn(self.depthwise(out))))
        return self.same(out).relu()


class Several(nn.Module):
    """Inputs of several kinds, outputs in a dictionary, one convolution used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, scale, other=None, flip=False):
        a = torch.relu(self.bn[0](self.conv(x)))
        b = self.bn[1](self.conv(x.flip(-1) if flip else x * scale)) * self.scale
        out = collections.OrderedDict(a=a, both=(a + b, scale + 1))
        return out if other is None else {**out, "other": other}


class Branching(nn.Module):
    """What it does depends on the numbers: nothing torch.fx can follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.block = blocks.BasicBlock(6, 6)

    def forward(self, x):
        out = self.bn(self.conv(x))
        return self.block(out) if out.sum() > -1e9 else out


class Untrue(nn.Module):
    """A trace of it does something else than it does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        out = self.conv(x).relu()
        return out if isinstance(x, torch.Tensor) else out + 1


NETS = {
    "resnet18": (torchvision.models.resnet18, (2, 3, 37, 33), 9),
    "resnet50": (torchvision.models.resnet50, (1, 3, 33, 35), 17),
    "timm resnet": (lambda: timm.create_model("resnet10t"), (2, 3, 33, 37), 7),
    "by hand": (HandWritten, (3, 3, 13, 13), 3),
    "dense": (Dense, (3, 3, 15, 11), 3),
    "mobile": (Mobile, (3, 3, 11, 14), 2),
    "one block": (lambda: fused_res.FusedResBlock(5, 7), (3, 5, 9, 7), 0),
}


def check_numbers(ours, model, draws):
    """By the 1.5 x rule, over PyTorch in the same layout."""
    theirs = copy.deepcopy(model).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()

    def of(net, x):
        return outcome(net, x.contiguous(memory_format=torch.channels_last), False, False)

    made = [[of(ours, x), of(theirs, x), of(exact, x.double())] for x in draws]
    agree(*zip(*made, strict=True), largest=False)


@pytest.mark.parametrize("name", NETS)
def test_numbers_and_what_is_fused(name):
    make, shape, fused = NETS[name]
    model = randomise(make()).eval()
    ours = optimized(model, torch.randn(shape))
    another_batch = shape[0] + 1, *shape[1:]
    check_numbers(ours, model, [torch.randn(s) for s in (shape, another_batch, shape)])
    assert len(ours.report.fused) == fused, ours.report
    assert not any(reason.startswith("channels") for _, reason in ours.report.skipped)


def test_half_precision():
    model = randomise(HandWritten()).eval()
    draws = [torch.randn(3, 3, 13, 13).bfloat16() for _ in range(5)]
    check_numbers(optimized(model.bfloat16(), draws[0]), model, draws)


def test_several_inputs_and_outputs():
    model = randomise(Several()).eval()
    x, scale = torch.randn(2, 3, 9, 7), torch.randn(())
    ours = optimized(model, (x, scale))
    assert ours.report.fused == ["conv + bn.0 + relu", "conv + bn.1"]
    got, expected = ours(x, scale), model(x, scale)
    assert type(got) is collections.OrderedDict and got.keys() == expected.keys()
    torch.testing.assert_close(got["a"], expected["a"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["both"], expected["both"], rtol=1e-4, atol=1e-5)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


needs_kernels = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)


@needs_kernels
@pytest.mark.parametrize(("make", "calls"), [(HandWritten, 5), (Dense, 3)])
def test_runs_the_op(make, calls):
    ours = optimized(randomise(make()), x := torch.randn(2, 3, 13, 13))
    with Ops() as ops:
        ours(x)
    assert ops.names["fused_res::conv_bn_act"] == calls
    batch_norms = [n for n in ops.names if "batch_norm" in n]
    assert sum(ops.names[n] for n in batch_norms) == (2 if make is Dense else 0), ops.names


class Cases(nn.Module):
    """Convolutions whose results are used more than once, or overwritten."""

    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.n = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x):
        a = self.c[0](x)
        b = F.relu(self.n[0](a))  # a has another use
        n = self.n[1](self.c[1](x))
        r = F.relu(n)  # n has another use: the convolution and norm are one op, no ReLU
        z = self.c[2](x)
        x.mul_(2)  # after the convolution, before its norm
        z = self.n[2](z)
        return a + b + r + n + z.relu_() + torch.relu(input=self.n[3](self.c[3](x)))


def test_values_used_elsewhere():
    model = randomise(Cases()).eval()
    given = (x := torch.randn(2, 3, 5, 5)).clone()
    ours = optimized(model, x)
    assert torch.equal(x, given), "the example is written to"
    expected, exact = model(x.clone()).detach(), copy.deepcopy(model).double()(x.double()).detach()
    rule(ours(x.clone()), expected, exact)
    assert ours.report.fused == ["c.1 + n.1", "c.2 + n.2 + relu", "c.3 + n.3 + relu"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Branching, "convolutions outside blocks: torch.fx cannot trace it: TraceError"),
        (Untrue, "convolutions outside blocks: its forward asks whether something is a tensor"),
    ],
)
def test_what_cannot_be_traced_runs_as_before(make, reason):
    model = randomise(make()).eval()
    x = torch.randn(2, 3, 9, 9)
    ours = optimized(model, x)
    assert any(why.startswith(reason) for name, why in ours.report.skipped), ours.report
    assert reason in str(ours.report)
    assert ours.report.fused == (["block"] if make is Branching else [])
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-5)


class Viewing(nn.Module):
    """Its views are of maps that must not be channels_last."""

    def __init__(self, branching):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 49, 2)
        self.branching = branching

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = x.view(torch.int32).view(dtype=torch.float32)
        x = x.view(x.size(0), -1)
        return self.fc(-x if self.branching and x.sum() < 0 else x)


@pytest.mark.parametrize("branching", [False, True])
def test_models_that_view(branching):
    model = randomise(Viewing(branching)).eval()
    x = torch.randn(2, 3, 9, 9)
    ours = optimized(model, x)
    assert ours.report.fused == ([] if branching else ["conv + bn + relu"])
    in_its_layout = "channels_last: RuntimeError: view size" not in str(ours.report)
    assert in_its_layout == (not branching)
    assert ours.conv.weight.is_contiguous(memory_format=torch.channels_last) == in_its_layout
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_layout():
    model = HandWritten()
    x = torch.randn(2, 3, 13, 13)
    weight = optimized(model, x).conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert optimized(model, x, channels_last=False).conv.weight.is_contiguous()


def test_the_users_model_is_not_changed():
    model = randomise(HandWritten())
    model.layers[1].eval()
    model.fc.weight.requires_grad_(False)
    x = torch.randn(2, 3, 13, 13)
    before = {
        n: (type(m), m.training, dict(m.__dict__), dict(m._modules))
        for n, m in model.named_modules()
    }
    state = {k: (t.clone(), t.stride(), t.data_ptr()) for k, t in model.state_dict().items()}
    given = x.clone()
    ours = optimized(model, x)
    assert torch.equal(x, given) and x.is_contiguous()
    for name, m in model.named_modules():
        kind, training, attributes, children = before[name]
        assert type(m) is kind and m.training == training and dict(m._modules) == children
        assert m.__dict__.keys() == attributes.keys()
    for key, t in model.state_dict().items():
        assert torch.equal(t, state[key][0]) and (t.stride(), t.data_ptr()) == state[key][1:]
    assert not {t.data_ptr() for t in ours.state_dict().values()} & {s[2] for s in state.values()}
    assert not ours.fc.weight.requires_grad and ours.conv.weight.requires_grad
    assert isinstance(ours, HandWritten) and isinstance(ours, fused_res.OptimizedModel)


def test_state_dict_has_the_models_keys():
    model = randomise(HandWritten())
    ours = optimized(model, x := torch.randn(2, 3, 13, 13))
    assert list(ours.state_dict()) == list(model.state_dict())
    other = randomise(HandWritten()).eval()
    ours(x)
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x), other(x).detach(), rtol=1e-4, atol=1e-4)
    model.load_state_dict(ours.state_dict())
    ours.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(ours(x), other(x).detach(), rtol=1e-4, atol=1e-4)


def scaled_weight(model):
    with torch.no_grad():
        model.conv.weight.mul_(1.5)


def moved_mean(model):
    model.bn.running_mean.add_(0.7)


def scaled_data(model):
    model.conv.weight.data.mul_(-1)


def scaled_block(model):
    model.layers[1].n2.weight.data.mul_(3)


def other_layer(model):
    torch.manual_seed(5)
    model.fc = nn.Linear(44, 3)


def other_norm(model):
    model.bn = nn.GroupNorm(2, 8).eval()


def other_eps(model):
    model.bn.eps = 0.5


@pytest.mark.parametrize(
    "change",
    [
        scaled_weight,
        moved_mean,
        scaled_data,
        scaled_block,
        other_layer,
        other_norm,
        other_eps,
    ],
)
def test_changes_of_weights_and_layers_are_seen(change):
    model = randomise(HandWritten()).eval()
    ours = optimized(model, x := torch.randn(2, 3, 13, 13))
    before = ours(x)
    change(model)
    change(ours)
    got, expected = ours(x), model(x).detach()
    assert got.shape != before.shape or not torch.allclose(got, before, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def hook(module, args, output):
    return output + 100


WHERE = ["", "conv", "bn", "layers.0.c1", "layers.1"]


@pytest.mark.parametrize(
    ("where", "when"), [(w, "before") for w in [*WHERE, "layers"]] + [(w, "after") for w in WHERE]
)
def test_hooks_run(where, when):
    model = randomise(HandWritten()).eval()
    x = torch.randn(2, 3, 13, 13)
    if when == "before":
        model.get_submodule(where).register_forward_hook(hook)
        ours = optimized(model, x)
    else:
        ours = optimized(model, x)
        for m in (model, ours):
            m.get_submodule(where).register_forward_hook(hook)
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-3)


def test_a_hook_runs_in_every_call():
    calls = []
    model = Dense()
    model.stem.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    ours = optimized(model, x := torch.randn(2, 3, 13, 13))
    calls.clear()
    for _ in range(3):
        ours(x)
    assert len(calls) == 3


def test_an_empty_shortcut_is_none():
    ours = optimized(HandWritten(), GOOD)
    assert ours.layers[0].plan.shortcut is None and ours.layers[1].plan.shortcut is not None


def test_a_hook_on_a_relu_runs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    ours = optimized(model, x := torch.randn(2, 3, 9, 9))
    assert ours.report.fused == ["0 + 1 + 2"]
    for m in (model, ours):
        m[2].register_forward_hook(hook)
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-3)


def test_an_image_without_a_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    ours = optimized(model, x := torch.randn(3, 9, 9))
    assert ours.report.fused == ["0 + 1"]
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-5)


class Broadcasting(nn.Module):
    """A block whose input has one channel, added to all of the branch's."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def test_a_block_that_broadcasts():
    model = randomise(nn.Sequential(Broadcasting())).eval()
    ours = optimized(model, x := torch.randn(2, 1, 9, 7))
    assert ours.report.fused == ["0"]
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_global_hook_sees_the_layers():
    ours = optimized(randomise(HandWritten()), x := torch.randn(2, 3, 13, 13))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        ours(x)
    finally:
        handle.remove()
    assert ours.conv in seen and ours.bn in seen and ours.layers[1].c2 in seen


def test_parametrized_and_subclassed_layers_are_left_alone():
    class MyConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    def net():
        return nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(),
            MyConv(4, 4, 3), nn.BatchNorm2d(4),
            nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU(),
        )  # fmt: skip

    model = randomise(net()).eval()
    ours = optimized(model, x := torch.randn(2, 3, 13, 13))
    assert ours.report.fused == []
    assert [name for name, _ in ours.report.skipped] == ["5 + 6 + 7"]
    torch.testing.assert_close(ours(x), model(x).detach())


def test_copies_and_pickles():
    for make in (HandWritten, Branching, lambda: blocks.BasicBlock(3, 5)):
        ours = optimized(randomise(make()), x := torch.randn(2, 3, 13, 13))
        expected = ours(x)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for other in (
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        ):
            assert type(other) is type(ours) and str(other.report) == str(ours.report)
            assert torch.equal(other(x), expected)
            for p in other.parameters():
                p.data.zero_()
        assert torch.equal(ours(x), expected)


def test_gradients_are_not_kept_and_outputs_can_go_on():
    ours = optimized(randomise(HandWritten()), x := torch.randn(2, 3, 13, 13))
    out = ours(x.requires_grad_())
    assert not out.requires_grad and not out.is_inference()
    head = nn.Linear(5, 1)
    head(out).sum().backward()  # an inference tensor cannot be saved for this
    assert head.weight.grad is not None


def test_made_in_inference_mode():
    with torch.inference_mode():
        ours = optimized(randomise(HandWritten()), torch.randn(2, 3, 13, 13))
        made_inside = ours(x := torch.randn(2, 3, 13, 13))
    assert not any(t.is_inference() for t in ours.state_dict().values())
    torch.testing.assert_close(ours(x.clone()), made_inside.clone())


GOOD = torch.zeros(2, 3, 13, 13)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((GOOD[:, :2],), {}, RuntimeError, "to have 3 channels, but got 2 channels"),
        ((GOOD[..., 7:],), {}, RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        ((GOOD.double(),), {}, TypeError, r"inputs\[0\] must be torch.float32.*got torch.float64"),
        ((GOOD.to("meta"),), {}, ValueError, r"inputs\[0\] must be on cpu.*got meta"),
        (([GOOD],), {}, TypeError, "invalid combination of arguments - got .list"),
        ((GOOD, GOOD), {}, TypeError, "takes 2 positional arguments but 3 were given"),
        ((), {"y": GOOD}, TypeError, "unexpected keyword argument 'y'"),
    ],
)
def test_inputs_it_was_not_made_for(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        BY_HAND(*args, **kwargs)


BY_HAND = optimized(HandWritten(), GOOD)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: optimized(nn.Conv2d, GOOD),
            TypeError,
            "model must be a torch.nn.Module, got type",
        ),
        (lambda: optimized(HandWritten(), 3), TypeError, "example must be a tensor or.*got int"),
        (lambda: optimized(HandWritten(), ()), TypeError, "example must be .*got an empty one"),
        (lambda: optimized(HandWritten(), (GOOD, 2)), TypeError, r"example\[1\] must be .*got int"),
        (lambda: optimized(HandWritten(), GOOD[:, :2]), RuntimeError, "expected input.*3 channels"),
        (lambda: optimized(BY_HAND, GOOD), ValueError, "model must not be optimised"),
        (
            lambda: optimized(nn.DataParallel(HandWritten()), GOOD),
            ValueError,
            r"a DataParallel: call optimize_for_inference\(model\) first",
        ),
        (lambda: optimized(nn.Sequential(BY_HAND), GOOD), ValueError, "must not be optimised"),
        (lambda: BY_HAND.train(), RuntimeError, "mode must be False"),
        (lambda: BY_HAND.double(), RuntimeError, "for torch.float32 on cpu, got torch.float64"),
        (lambda: BY_HAND.to("meta"), RuntimeError, "on cpu, got torch.float32 on meta"),
        (lambda: BY_HAND.recapture(), RuntimeError, "nothing to capture"),
        (
            lambda: optimized(HandWritten(), GOOD.to("meta"), freeze=True),
            ValueError,
            r"example\[0\] must be on a CPU with freeze=True, got meta",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_model_that_cannot_be_copied():
    model = HandWritten()
    model.generator = (i for i in range(3))
    with pytest.raises(ValueError, match="model must be one that can be copied, got TypeError"):
        optimized(model, GOOD)


def test_what_changes_nothing_is_allowed():
    ours = optimized(HandWritten(), GOOD)
    assert ours.eval() is ours and ours.to("cpu") is ours and ours.float() is ours
    ours(GOOD)


def test_a_cuda_graph_needs_cuda(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="cuda_graph=True needs a CUDA device"):
            optimized(HandWritten(), GOOD, cuda_graph=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"example\[0\] must be on a CUDA device.*got cpu"):
        optimized(HandWritten(), GOOD, cuda_graph=True)


def test_compiles():
    ours = optimized(randomise(HandWritten()), x := torch.randn(2, 3, 13, 13))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_tunes_once(monkeypatch):
    tuned = []
    tune = fused_res.dispatch.tuning.tune
    monkeypatch.setattr(
        fused_res.dispatch.tuning, "tune", lambda *args: tuned.append(tune(*args)) or tuned[-1]
    )
    model = randomise(HandWritten())
    x = torch.randn(1, 3, 13, 13)
    ours = optimized(model, x, tune=True)
    assert len(tuned) == 1 and len(tuned[0].rows) == 5
    again = optimized(model, x, tune=True)
    assert len(tuned) == 1, "its table has these convolutions"
    assert torch.equal(ours(x), again(x))
    optimized(model, torch.randn(2, 3, 13, 13), tune=True)
    assert len(tuned) == 2


@needs_kernels
def test_tuning_that_cannot_be_written_is_a_warning(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fused_res.dispatch.user_timings.os, "replace", refuse)
    with pytest.warns(UserWarning, match="Permission denied.*FUSED_RES_CACHE"):
        ours = optimized(randomise(HandWritten()), x := torch.randn(5, 3, 13, 13), tune=True)
    ours(x)


def test_nothing_to_fuse_or_tune_is_no_error():
    model = nn.Sequential(nn.Flatten(), nn.Linear(507, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = optimized(model, GOOD, tune=True)
    torch.testing.assert_close(ours(GOOD), model(GOOD).detach())


def test_norms_with_an_activation_behind_others():
    """Which the graph of the model does not see: their blocks stay fused."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 1, 1), timm.layers.BatchNormAct2d(6)

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return y * y.mean((2, 3), keepdim=True) + x

    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), Gated())).eval()
    ours = optimized(model, GOOD, tune=False)
    with Ops() as seen, torch.no_grad():
        y = ours(GOOD)
    torch.testing.assert_close(y, model(GOOD).detach(), rtol=1e-4, atol=1e-4)
    assert not any("batch_norm" in name for name in seen.names)


@pytest.mark.gpu
def test_cuda_graph():
    model = randomise(HandWritten()).cuda().eval()
    x = torch.randn(2, 3, 13, 13, device="cuda")
    ours = optimized(model, x, cuda_graph=True)
    for _ in range(3):
        x = torch.randn_like(x)
        torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-3, atol=1e-3)
    first = ours(x)
    kept = first.clone()
    ours(torch.randn_like(x))
    assert torch.equal(first, kept), "an output is the caller's"
    with pytest.raises(ValueError, match=r"must have shape \(2, 3, 13, 13\).*got \(3, 3"):
        ours(torch.randn(3, 3, 13, 13, device="cuda"))
    for change in (scaled_weight, moved_mean, scaled_block):
        change(model)
        change(ours)
    ours.recapture()
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-3, atol=1e-3)
    other = randomise(HandWritten()).cuda().eval()
    ours.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(ours(x), other(x).detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(copy.deepcopy(ours)(x), ours(x))
    with pytest.raises(RuntimeError, match="cuda_graph=True cannot be exported"):
        torch.export.export(ours, (x,))
