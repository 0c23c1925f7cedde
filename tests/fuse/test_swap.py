"""fuse_ and unfuse_: what is fused, what is skipped and why, and that a model stays the same."""

import copy
import functools
import inspect
import io
import pickle
import random
import subprocess
import sys
import types
import warnings
from pathlib import Path

import blocks
import pytest
import torch
import torch.nn as nn
from agreement import agree, outcome, randomise
from blocks import (
    Configurable,
    OwnBatchNorm,
    backward_hooked,
    changed,
    depends_on_data,
    functional_dropout,
    hooked,
    only_in_training,
    same_norm_twice,
    variant,
)
from model_libraries import timm, torchvision, transformers
from sweeps import sweep
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import fuse_, unfuse_

NAMED = "cpu" if fused_res.dispatch.backends.STATUS["cpu"] is None else "auto"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fuse_ found no residual block"),
]


class FusedCalls(TorchDispatchMode):
    """Counts the fused ops, forward and backward, and PyTorch's own BatchNorms, as they run."""

    def __init__(self):
        super().__init__()
        self.fused = self.backward = self.batch_norms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += func.name() == "fused_res::bn_act_fwd"
        self.backward += func.name() == "fused_res::bn_act_bwd"
        self.batch_norms += func.name() in (
            "aten::native_batch_norm",
            "aten::_native_batch_norm_legit",
        )
        return func(*args, **(kwargs or {}))


def fused_calls(module, x) -> FusedCalls:
    with FusedCalls() as calls, torch.no_grad():
        module(x)
    return calls


needs_kernels = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)


def block(channels=6) -> nn.Module:
    return randomise(blocks.BasicBlock(channels, channels))


def projecting_block(channels=6) -> nn.Module:
    return randomise(blocks.BasicBlock(channels, 2 * channels, 2))


def image(channels=6, size=9, batch=4):
    return torch.randn(batch, channels, size, size)


def identity_of(model):
    """All that must not change: names, classes' names aside, and the objects behind them."""
    return {
        "children": [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        "parameters": [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(n, id(b)) for n, b in model.named_buffers(remove_duplicate=False)],
        "attributes": [
            {k: id(v) for k, v in vars(m).items() if k != "training"} for m in model.modules()
        ],
        "keys": list(model.state_dict()),
        "training": [m.training for m in model.modules()],
    }


def same(model, other, x, train=True):
    """Both give the same numbers in fp64, to rounding; ``model`` and ``other`` become fp64."""
    a, b = (outcome(m.double(), x.double(), train) for m in (model, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=name)


# --- what of many models is fused

TORCHVISION = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnext50_32x4d": 16,
    "wide_resnet50_2": 16,
}
PRE_ACTIVATION = [f"stages.{s}.blocks.{b}" for s, n in enumerate((3, 4, 6, 3)) for b in range(n)]
TIMM = {  # blocks fused; those fused in part; a word of the reason
    "resnet50": (16, [], ""),
    "resnet26d": (8, [], ""),
    "resnetblur18": (5, ["layer2.0", "layer3.0", "layer4.0"], "BlurPool"),
    "seresnet18": (0, [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)], "SEModule"),
    "resnetv2_50": (0, PRE_ACTIVATION, "pre-activation"),
}


def hugging_resnet(layer_type, small=True):
    sizes = (
        {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [2, 2, 1]} if small else {}
    )
    config = transformers.ResNetConfig(layer_type=layer_type, **sizes)
    return transformers.ResNetModel(config)


def check_eval_output(theirs, ours, size=64):
    """The rule on the output alone, in eval mode: enough to see that a deep net is wired right."""
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 3, size, size)
    runs = [
        [outcome(m, x.to(dtype), train=False, backward=False)]
        for m, dtype in ((ours, x.dtype), (theirs, x.dtype), (exact, torch.float64))
    ]
    agree(*runs, largest=False)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    theirs = randomise(getattr(torchvision.models, name)(num_classes=10))
    ours = copy.deepcopy(theirs)
    before = identity_of(ours)
    report = fuse_(ours, strict=True)
    assert len(report.fused) == TORCHVISION[name] and report.skipped == []
    assert report.fused == [
        n
        for n, m in ours.named_modules()
        if isinstance(
            m, (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck)
        )
    ]
    assert identity_of(ours) == before
    check_eval_output(theirs, ours)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    fused, partly, word = TIMM[name]
    theirs = randomise(timm.create_model(name, num_classes=10))
    ours = copy.deepcopy(theirs)
    report = fuse_(ours)
    assert len(report.fused) == fused
    assert [n for n, _ in report.partly] == partly and report.skipped == []
    assert all(word in reason for _, reason in report.partly), report
    check_eval_output(theirs, ours)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers(layer_type):
    report = fuse_(hugging_resnet(layer_type, small=False))
    assert len(report.fused) == 16 and report.skipped == []


def shallow(groups):
    """A torchvision ResNet of one bottleneck a stage: fifty layers only amplify rounding."""
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 10, groups=groups, width_per_group=4
    )


NETS = {  # (net, blocks fused)
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 8),
    "torchvision resnext": (lambda: shallow(32), 4),
    "timm resnet26d": (lambda: timm.create_model("resnet26d", num_classes=10), 8),
    "timm resnetblur18": (lambda: timm.create_model("resnetblur18", num_classes=10), 5),
    "transformers basic": (lambda: hugging_resnet("basic"), 5),
    "transformers bottleneck": (lambda: hugging_resnet("bottleneck"), 5),
    "S3": (lambda: blocks.ResNet(blocks.BasicBlock, (2, 2, 2, 2), width=16), 8),
    "S4": (lambda: blocks.ResNet(blocks.Bottleneck, (2, 1, 1), width=16), 4),
    "S8": (lambda: blocks.DeepCNN(blocks=3), 3),
    "S13": (lambda: blocks.NetResDeep(n_blocks=10), 10),
    "S13 shared": (lambda: blocks.NetResDeep(n_blocks=6, shared=True), 1),
}


LARGE = ("torchvision resnet18", "timm resnet26d", "timm resnetblur18", "transformers bottleneck")


@pytest.mark.parametrize("name", sweep(NETS, quick=NETS.keys() - LARGE))
def test_net_within_the_rule(name):
    """A training step and an eval step of the whole net, fp32 against fp64."""
    make, fused = NETS[name]
    batch, size = (16, 32) if name.startswith("S") else (4, 64)
    for train in (True, False):
        draws = []
        for _ in range(5):
            theirs = randomise(make())
            ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
            report = fuse_(ours)
            assert len(report.fused) == fused
            x = torch.randn(batch, 3, size, size)
            draws.append(
                [outcome(m, x.to(next(m.parameters())), train) for m in (ours, theirs, exact)]
            )
        agree(*map(list, zip(*draws, strict=True)), name, largest=False)


# --- blocks by hand ------------------------------------------------------------------------------


def conv_bn(c_in, c_out=None, stride=1, size=3):
    c_out = c_out or c_in
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(c_out)
    )


class DividedShortcut(nn.Module):
    """Pools before it projects, as ResNet-D; the shortcut first, `+=` on it, methods for ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.down = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), *conv_bn(channels, 8, size=1))
        self.k1, self.k2 = nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.b1, self.b2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        total = self.down(x)
        total += self.b2(self.k2(self.b1(self.k1(x)).relu_()))
        return total.relu()


HAND_WRITTEN = {  # (block of 6 channels in, norms that run fused)
    "S3": (lambda: blocks.BasicBlock(6, 6), 2),
    "S3 projection": (lambda: blocks.BasicBlock(6, 8, 2), 2),
    "S4": (lambda: blocks.Bottleneck(6, 4, 2), 3),
    "S5": (lambda: blocks.ResidualBlock(6, bias=False), 2),
    "S5 bias": (lambda: blocks.ResidualBlock(6, bias=True), 2),
    "S6 normalised": (lambda: blocks.SkipConnectionBlock(6, 5, norm=True), 2),
    "S7 identity": (lambda: blocks.TransformSkip(conv_bn(6), nn.Identity()), 1),
    "S7 none": (lambda: blocks.TransformSkip(conv_bn(6)), 1),
    "S7 empty": (lambda: blocks.TransformSkip(conv_bn(6), nn.Sequential()), 1),
    "S7 strided conv": (
        lambda: blocks.TransformSkip(conv_bn(6, 8, 2), nn.Conv2d(6, 8, 1, stride=2)),
        1,
    ),
    "S13": (lambda: blocks.ResBlock(6), 1),
    "branch handed over": (
        lambda: blocks.Residual(nn.Sequential(*conv_bn(6), nn.ReLU(), *conv_bn(6))),
        2,
    ),
    "a Sequential with its own forward": (lambda: blocks.SequentialResidual(*conv_bn(6)), 1),
    "option A": (lambda: blocks.ParameterFreeShortcut(6, 10), 2),
    "keywords": (lambda: blocks.KeywordStyle(6), 1),
    "pooled projection": (lambda: DividedShortcut(6), 2),
    "no affine": (
        lambda: blocks.Residual(
            nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6, affine=False))
        ),
        1,
    ),
    "no running statistics": (
        lambda: blocks.Residual(
            nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6, track_running_stats=False))
        ),
        1,
    ),
    "cumulative statistics": (
        lambda: blocks.Residual(
            nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6, momentum=None))
        ),
        1,
    ),
    "dropout": (lambda: blocks.WideDropout(6), 2),
}


@needs_kernels
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_block(name):
    """Fused, and its kernels run: one op a norm (a projection's own norm shares the last one's)."""
    make, norms = HAND_WRITTEN[name]
    draws = {True: [], False: []}
    for _ in range(7):
        theirs = randomise(make())
        ours = copy.deepcopy(theirs)
        before = identity_of(ours)
        report = fuse_(ours)
        assert report.fused == [""] and report.skipped == [], report
        assert identity_of(ours) == before
        calls = fused_calls(copy.deepcopy(ours), image())
        assert (calls.fused, calls.batch_norms) == (norms, 0)
        x = image(size=13)
        for train in draws:
            models = (ours, theirs, copy.deepcopy(theirs).double())
            draws[train].append([outcome(m, x.to(next(m.parameters())), train) for m in models])
            assert list(ours.state_dict()) == list(theirs.state_dict())
            theirs.load_state_dict(ours.state_dict(), strict=True)
    for train, runs in draws.items():
        agree(*map(list, zip(*runs, strict=True)), what=f"train={train}")


@needs_kernels
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_block_exactly(name):
    """The dataflow, where rounding hides nothing: the kernels in fp64, to nine digits."""
    make, _ = HAND_WRITTEN[name]
    theirs = randomise(make())
    ours = copy.deepcopy(theirs)
    fuse_(ours)
    for train in (True, False):
        with fused_res.backend("cpu"):
            same(ours, theirs, image(size=8), train)


def test_seed_nets_without_a_norm_are_skipped():
    """S1, S2, S6 and S12 have no BatchNorm, so there is nothing for us to fuse; they are named."""
    for net, names in [
        (blocks.PlainBlock(4, 8), [""]),
        (blocks.TwoBlockNet(), ["one", "two"]),
        (blocks.SkipConnectionBlock(3, 4), [""]),
    ]:
        report = fuse_(net)
        assert report.fused == [] and [n for n, _ in report.skipped] == names
        assert all("norm" in reason for _, reason in report.skipped)
    report = fuse_(blocks.NetRes())
    assert report.fused == [] and [n for n, _ in report.skipped] == [""]


# --- what must be skipped, with the reason -------------------------------------------------------


SKIPPED = {  # block; a word its reason has, if the issue names one
    "GroupNorm": (lambda: Configurable(norm=lambda c: nn.GroupNorm(2, c)), "GroupNorm"),
    "InstanceNorm": (lambda: Configurable(norm=nn.InstanceNorm2d), "InstanceNorm2d"),
    "BatchNorm subclass": (lambda: Configurable(norm=OwnBatchNorm), "OwnBatchNorm"),
    "hook on a norm": (hooked, "bn1"),
    "backward hook on a ReLU": (backward_hooked, "act"),
    "old weight_norm": (changed(lambda m: nn.utils.weight_norm(m.conv2)), "conv2"),
    "old spectral_norm": (changed(lambda m: nn.utils.spectral_norm(m.conv2)), "conv2"),
    "pruned": (changed(lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5)), "conv1"),
    "one norm twice": (same_norm_twice, "bn1"),
    "control flow on data": (variant(depends_on_data), ""),
    "F.dropout": (variant(functional_dropout), "training"),
    "another forward in training": (variant(only_in_training), "training"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_with_the_reason(name):
    make, word = SKIPPED[name]
    module = make()
    net = nn.Sequential(block(), module)  # beside one that is fused
    before = identity_of(net)
    report = fuse_(net)
    assert report.fused == ["0"]
    ((where, reason),) = report.skipped
    assert where == "1" and reason and word in reason, reason
    assert identity_of(net) == before
    assert type(module).forward is type(make()).forward or "Variant" in type(module).__name__
    assert reason in str(report) and "1 fused, 1 skipped" in str(report)


# --- forwards with more in them than their dataflow: skipped, or as right as before --------------


def counts_calls(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.last(self.branch(x) + x)


def counts_in_a_buffer(self, x):
    self.seen.add_(1)
    return self.last(self.branch(x) + x)


def keeps_features(self, x):
    self.features = self.act(self.bn1(self.conv1(x)))
    return self.last(self.bn2(self.conv2(self.features)) + x)


@torch.no_grad()
def without_grad(self, x):
    return self.last(self.branch(x) + x)


def partly_without_grad(self, x):
    with torch.no_grad():
        h = self.act(self.bn1(self.conv1(x)))
    return self.last(self.bn2(self.conv2(h)) + x)


def in_full_precision(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.last(self.branch(x.float()) + x)


def stochastic_depth(self, x):
    if self.training and torch.rand(()).item() < 0.4:
        return x
    return self.last(self.branch(x) + x)


def python_stochastic_depth(self, x):
    if self.training and random.random() < 0.4:
        return x
    return self.last(self.branch(x) + x)


def writes_into_its_input(self, x):
    x += self.branch(x)
    return x


FORWARDS = [
    counts_calls,
    counts_in_a_buffer,
    keeps_features,
    without_grad,
    partly_without_grad,
    in_full_precision,
    stochastic_depth,
    python_stochastic_depth,
    writes_into_its_input,
]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_forward_with_side_effects(forward):
    """What a trace does not record: state, contexts, random numbers, writes."""
    module = randomise(variant(forward)())
    module.register_buffer("seen", torch.zeros((), dtype=torch.long))
    plain = copy.deepcopy(module)
    state, numbers = torch.get_rng_state(), random.getstate()
    before = identity_of(module)
    fuse_(module)
    assert identity_of(module) == before and module.seen == 0
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == numbers

    def run(m):
        torch.manual_seed(3)
        random.seed(3)
        m.train()
        found = []
        for i in range(8):
            x = torch.arange(6 * 64.0).view(1, 6, 8, 8).sin() * (i + 1)
            x.requires_grad_(forward is not writes_into_its_input)
            grad = forward is not writes_into_its_input
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                y = m(x)
            names = []
            if y.requires_grad and y.grad_fn is not None:
                grads = torch.autograd.grad(
                    y.float().square().sum(), [x, *m.parameters()], allow_unused=True
                )
                names = [g is not None for g in grads]
            found.append((y.detach(), x.detach(), names, y.dtype))
        features = getattr(m, "features", None)
        kept = features.dtype if features is not None else None
        return found, (m.seen.item(), getattr(m, "calls", None), kept)

    for (y, x, names, dtype), (y2, x2, names2, dtype2) in zip(
        run(module)[0], run(plain)[0], strict=True
    ):
        assert names == names2 and dtype == dtype2
        torch.testing.assert_close(y, y2, rtol=0.1, atol=0.1)  # bf16: wiring, not rounding
        torch.testing.assert_close(x, x2, rtol=0.1, atol=0.1)
    assert run(module)[1] == run(plain)[1]


def test_forward_patched_on_a_child():
    """As accelerate does: a forward set on the instance, unknown to its class."""
    module = block().double().eval()
    plain = copy.deepcopy(module)
    for m in (module, plain):
        original = m.n1.forward
        m.n1.forward = types.MethodType(lambda self, x, f=original: f(x) * 3, m.n1)
    fuse_(module)
    x = image().double()
    torch.testing.assert_close(module(x), plain(x))


def test_extra_arguments_take_the_blocks_own_forward():
    class Scaled(blocks.BasicBlock):
        def forward(self, x, scale=None):
            out = super().forward(x)
            return out

    module = randomise(Scaled(6, 6)).double()
    plain = copy.deepcopy(module)
    fuse_(module)
    x = image().double()
    for args, kwargs in [((x,), {}), ((x, 2.0), {}), ((), {"x": x}), ((x,), {"scale": 2.0})]:
        torch.testing.assert_close(module(*args, **kwargs), plain(*args, **kwargs))


# --- what must hold ------------------------------------------------------------------------------


def net():
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1),
            blocks.BasicBlock(8, 8),
            blocks.BasicBlock(8, 12, 2),
            blocks.ResBlock(12),
        )
    )


FUSED_IN_NET = ["1", "2", "3"]


def test_model_is_the_same_and_comes_back():
    model = net()
    plain = copy.deepcopy(model)
    calls = []
    model[1].register_forward_hook(lambda m, args, out: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda m, args: calls.append("pre"))
    model[2].register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    before, classes = identity_of(model), [type(m) for m in model.modules()]
    report = fuse_(model)
    assert report.fused == FUSED_IN_NET
    assert identity_of(model) == before
    assert isinstance(model[1], blocks.BasicBlock) and isinstance(model[3], blocks.ResBlock)
    changed = [type(m) for m in model.modules()]
    again = fuse_(model)  # idempotent
    assert [type(m) for m in model.modules()] == changed and identity_of(model) == before
    assert again.skipped == []
    model(image(3)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    assert unfuse_(model) == FUSED_IN_NET
    assert [type(m) for m in model.modules()] == classes and identity_of(model) == before
    assert unfuse_(model) == []
    plain.load_state_dict(model.state_dict())
    x = image(3)
    assert torch.equal(model(x), plain(x))


def test_a_block_by_itself():
    module = block()
    assert fuse_(module).fused == [""] and unfuse_(module) == [""]
    assert type(module) is blocks.BasicBlock


def overwrites_first(self, x):
    x.relu_()
    return self.last(self.branch(x) + x)


def norm_of_no_use(self, x):
    self.bn1(self.conv2(x))
    return self.last(self.bn2(self.conv1(x)) + x)


@pytest.mark.parametrize("forward", [overwrites_first, norm_of_no_use])
def test_what_is_run_beside_branch_and_shortcut(forward):
    """Such a block is no single plan: what it does besides is done in parts."""
    theirs = randomise(variant(forward)())
    ours = copy.deepcopy(theirs)
    ((_, reason),) = fuse_(ours).partly
    assert "is run beside branch and shortcut" in reason
    x = torch.randn(4, 6, 7, 5)
    for train in (True, False):
        a, b = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(ours.train(train)(a), theirs.train(train)(b))
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_norms_without_a_bias():
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("BatchNorm2d has no argument bias before torch 2.13")
    theirs = Configurable(norm=functools.partial(nn.BatchNorm2d, bias=False))
    ours = copy.deepcopy(theirs)
    assert fuse_(ours).fused == [""]
    x = torch.randn(4, 6, 7, 5)
    for train in (True, False):
        a, b = (outcome(m, x, train=train) for m in (ours, theirs))
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", ["double input", "double weight under autocast", "no batch"])
def test_an_error_changes_what_it_does_in_pytorch(case):
    theirs = randomise(Configurable())
    x = torch.randn(4, 6, 7, 5)
    if case == "double input":  # of convolutions in double and norms that are not
        x = x.double()
        for m in (theirs.conv1, theirs.conv2, theirs.bn1):
            m.double()
    elif case == "double weight under autocast":
        theirs.conv2.double()
        x = x.bfloat16()
    else:
        x = x[0]
    ours = copy.deepcopy(theirs)
    assert fuse_(ours).fused == [""]
    for module, backend in ((theirs, "eager"), (ours, NAMED)):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case)
        error = pytest.raises((RuntimeError, TypeError, ValueError))
        with autocast, fused_res.backend(backend), error:
            module(x)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_user_made_fused_blocks_are_left_alone():
    module = fused_res.FusedResBlock(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fuse_(module)
    assert report.fused == [] and report.skipped == []
    assert unfuse_(module) == [] and type(module) is fused_res.FusedResBlock


def test_dry_run_filter_and_strict():
    model = nn.Sequential(net(), Configurable(norm=OwnBatchNorm))
    before, classes = identity_of(model), [type(m) for m in model.modules()]
    report = fuse_(model, dry_run=True)
    assert report.fused == ["0.1", "0.2", "0.3"] and [n for n, _ in report.skipped] == ["1"]
    with pytest.raises(ValueError, match="OwnBatchNorm"):
        fuse_(model, strict=True)
    asked = []
    report = fuse_(model, filter_fn=lambda m, name: asked.append((m, name)) or False)
    assert report.fused == [] and {n for n, _ in report.skipped} == {"0.1", "0.2", "0.3", "1"}
    assert asked == [(model[0][i], f"0.{i}") for i in (1, 2, 3)]
    assert identity_of(model) == before and [type(m) for m in model.modules()] == classes
    assert fuse_(model, filter_fn=lambda m, name: name == "0.2").fused == ["0.2"]
    assert [n for n, m in model.named_modules() if type(m) is not classes.pop(0)] == ["0.2"]
    assert fuse_(model[0], strict=True).fused == ["1", "3"]


def test_report_prints_a_table():
    model = nn.Sequential(block(), Configurable(act=nn.GELU), Configurable(norm=OwnBatchNorm))
    lines = str(fuse_(model)).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["0", "fused"],
        ["1", "partly"],
        ["2", "skipped"],
    ]
    assert "2 of 2 norms" in lines[2] and "GELU" in lines[2] and "OwnBatchNorm" in lines[3]
    assert lines[4] == "1 fused, 1 partly, 1 skipped"


def test_advice_on_the_layout():
    model = net()
    (advice,) = fuse_(model, dry_run=True).advice
    assert "model.to(memory_format=torch.channels_last)" in advice
    model.to(memory_format=torch.channels_last)
    report = fuse_(model)
    assert report.fused and report.advice == [] and "channels_last" not in str(report)
    assert fuse_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).advice == []


@pytest.mark.filterwarnings("default:fuse_ found no residual block")
@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), Configurable(norm=OwnBatchNorm)], ids=["none", "skipped"]
)
def test_nothing_fused_is_one_warning(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fuse_(model)
    (warning,) = caught
    assert warning.category is UserWarning and warning.filename == __file__


@pytest.mark.parametrize("model", [None, [nn.ReLU()], nn.ReLU, {"a": 1}], ids=str)
def test_not_a_module(model):
    with pytest.raises(TypeError, match="Module"):
        fuse_(model)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp(process_group):
    wrapped = nn.parallel.DistributedDataParallel(net())
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        fuse_(wrapped)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        fuse_(nn.Sequential(wrapped))
    plain = net().double()
    inside = copy.deepcopy(plain)
    fuse_(inside)
    x = image(3).double()
    a = outcome(nn.parallel.DistributedDataParallel(inside), x)
    b = outcome(nn.parallel.DistributedDataParallel(plain), x)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)


def compiled_in_place():
    model = net()
    model.compile(backend="eager")
    return model


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*jit.*:FutureWarning"
)
@pytest.mark.parametrize(
    "wrap, word",
    [
        (lambda: nn.DataParallel(net()), "DataParallel"),
        (lambda: torch.compile(net(), backend="eager"), "compile"),
        (lambda: nn.Sequential(torch.compile(net(), backend="eager")), "compile"),
        (compiled_in_place, "compile"),
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), "script"),
        (lambda: torch.jit.trace(net().eval(), torch.zeros(1, 3, 8, 8)), "script|traced"),
    ],
    ids=["DataParallel", "compiled", "compiled inside", "compiled in place", "scripted", "traced"],
)
def test_wrapped_models_are_refused(wrap, word):
    model = wrap()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=word):
        fuse_(model)
    assert [type(m) for m in model.modules()] == classes


def test_optimizer_made_before_fusing_trains():
    plain = net().double()
    ours = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (plain, ours)]
    fuse_(ours)
    with fused_res.backend("auto"):
        for _ in range(4):
            x = image(3).double()
            for model, optimizer in zip((plain, ours), optimizers, strict=True):
                optimizer.zero_grad()
                model.train()(x).square().mean().backward()
                optimizer.step()
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=name)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file, averaged])
def test_copies_stay_fused(copied):
    model = net()
    fuse_(model)
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    a, b = (outcome(m, image_) for image_ in [image(3)] for m in (model, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert unfuse_(other) == FUSED_IN_NET and fuse_(model).skipped == []
    assert not any(type(m) in {type(o) for o in other.modules()} for m in (model[1], model[2]))


def test_a_saved_model_loads_in_a_new_process(tmp_path):
    model = net().eval()
    fuse_(model)
    x = image(3)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "saved = torch.load(sys.argv[2], weights_only=False)\n"
        "torch.testing.assert_close(saved['model'](saved['x']), saved['y'])\n"
        "import fused_res; assert fused_res.unfuse_(saved['model']) == ['1', '2', '3']\n"
    )
    where = str(Path(blocks.__file__).parent)
    subprocess.run([sys.executable, "-c", script, where, tmp_path / "model.pt"], check=True)


def test_state_dict_loads_both_ways():
    plain, ours = net().double().eval(), net().double().eval()
    fuse_(ours)
    x = image(3).double()
    ours.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), plain(x))
    other = net().double().eval()
    ours.load_state_dict(other.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), other(x))
    torch.testing.assert_close(ours(x), other(x))


# --- changed after fusing ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre"])
@pytest.mark.parametrize("where", ["bn1", "relu", "downsample", "downsample.1", "conv2"])
def test_hooks_added_to_a_child_still_fire(where, kind):
    """And change the result as they would have; the block runs its own forward for that."""
    plain = randomise(
        torchvision.models.resnet.BasicBlock(4, 6, 2, nn.Sequential(*conv_bn(4, 6, 2, 1)))
    )
    ours = copy.deepcopy(plain).double()
    plain.double()
    fuse_(ours)
    x = image(4, size=6).double()
    counts = []
    for model in (ours, plain):
        calls = []
        child = model.get_submodule(where)
        if kind == "forward":
            child.register_forward_hook(lambda m, a, out, c=calls: c.append(1) or out * 1.5)
        elif kind == "pre":
            child.register_forward_pre_hook(lambda m, a, c=calls: c.append(1) or (a[0] * 1.5,))
        elif kind == "backward":
            if where == "relu":
                model.relu.inplace = False
            child.register_full_backward_hook(
                lambda m, gi, go, c=calls: (
                    c.append(1) or tuple(g * 1.5 for g in gi if g is not None)
                )
            )
        else:
            if where == "relu":
                model.relu.inplace = False
            child.register_full_backward_pre_hook(
                lambda m, go, c=calls: c.append(1) or (go[0] * 1.5,)
            )
        if where in ("bn1", "downsample", "downsample.1", "conv2"):
            model.relu.inplace = False  # full backward hooks refuse views written in place
        counts.append((calls, outcome(model, x)))
    (mine, a), (other, b) = counts
    assert len(mine) == len(other) > 0
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=name)


def test_global_hooks_see_every_module():
    ours = net()
    plain = copy.deepcopy(ours)
    fuse_(ours)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    try:
        for model in (ours, plain):
            model(image(3))
    finally:
        handle.remove()
    half = len(seen) // 2
    names = [{id(m): n for n, m in model.named_modules()} for model in (ours, plain)]
    assert [names[0][id(m)] for m in seen[:half]] == [names[1][id(m)] for m in seen[half:]]


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))

    def forward(self, x):
        return x * self.scale


def put(where, make):
    def change(model):
        parent, _, name = where.rpartition(".")
        setattr(model.get_submodule(parent), name, make())

    return change


def rebind_forward(model):
    model.bn1.forward = functools.partial(lambda f, x: f(x) * 2, model.bn1.forward)


def doubled_weight():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    return Double()


CHANGES = {
    "SyncBatchNorm": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
    "another BatchNorm": put("bn1", lambda: nn.BatchNorm2d(6, eps=0.1)),
    "another convolution": put("conv2", lambda: nn.Conv2d(6, 6, 5, 1, 2)),
    "no norm": put("bn1", nn.Identity),
    "no norm in the shortcut": put("downsample.1", nn.Identity),
    "GroupNorm": put("bn2", lambda: nn.GroupNorm(2, 6)),
    "a BatchNorm subclass": put("bn2", lambda: OwnBatchNorm(6)),
    "a frozen norm": put("bn2", lambda: FrozenNorm(6)),
    "another activation": put("relu", nn.GELU),
    "another shortcut": put("downsample", lambda: nn.Conv2d(4, 6, 1, 2)),
    "a longer shortcut": put(
        "downsample", lambda: nn.Sequential(*conv_bn(4, 6, 2, 1), nn.Hardtanh(-0.5, 0.5))
    ),
    "parametrized convolution": lambda m: parametrize.register_parametrization(
        m.conv1, "weight", doubled_weight()
    ),
    "parametrized norm": lambda m: parametrize.register_parametrization(
        m.bn1, "weight", doubled_weight()
    ),
    "pruned norm": lambda m: prune.l1_unstructured(m.bn2, "weight", 0.5),
    "patched norm": rebind_forward,
    "frozen statistics": lambda m: m.bn1.eval(),
    "momentum": lambda m: setattr(m.bn1, "momentum", 0.7),
    "frozen weights": lambda m: m.bn2.weight.requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_child_changed_after_fusing(name):
    """What the block computes is what its children now say, as in the block it was made from."""
    plain = randomise(
        torchvision.models.resnet.BasicBlock(4, 6, 2, nn.Sequential(*conv_bn(4, 6, 2, 1)))
    )
    ours = copy.deepcopy(plain)
    fuse_(ours)
    x = image(4, size=6).double()
    models = []
    for model in (plain, ours):
        torch.manual_seed(11)
        model = (
            CHANGES[name](model) if name == "SyncBatchNorm" else (CHANGES[name](model), model)[1]
        )
        models.append(model.double())
    frozen = name == "frozen statistics"
    for train in (None,) if frozen else (True, False):
        a, b = (outcome(m, x, train) for m in models[::-1])
        assert a.keys() == b.keys()
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9, msg=key)
    unfuse_(models[1])
    assert type(models[1]) is torchvision.models.resnet.BasicBlock


def test_identity_replaced_by_drop_path():
    """timm's blocks keep an Identity where a drop path can go."""
    plain = Configurable()
    ours = copy.deepcopy(plain)
    fuse_(ours)
    for model in (plain, ours):
        model.extra = timm.layers.DropPath(0.5)
    x = image(batch=16).double()
    a, b = (outcome(m, x) for m in (ours.double(), plain.double()))
    torch.testing.assert_close(a["output"], b["output"], rtol=1e-9, atol=1e-9)


def test_output_may_be_written_in_place():
    plain = nn.Sequential(
        randomise(blocks.ResBlock(4)), nn.ReLU(inplace=True), randomise(blocks.ResBlock(4))
    )
    ours = copy.deepcopy(plain)
    fuse_(ours)
    same(ours, plain, image(4))


# --- the trace -----------------------------------------------------------------------------------


class RaisesOnProxy(Configurable):
    def forward(self, x):
        if int(x.size(1)) != 6:
            raise RuntimeError("six channels")
        return self.last(self.branch(x) + x)


@pytest.mark.parametrize("make", [Configurable, RaisesOnProxy, variant(depends_on_data)])
def test_training_flags_are_left_alone(make):
    module = make()
    module.train()
    module.bn1.eval()
    module.extra.training = False
    before = [m.training for m in module.modules()]
    fuse_(module, dry_run=True)
    fuse_(module)
    assert [m.training for m in module.modules()] == before


def test_overridden_train_is_not_called():
    class Frozen(blocks.BasicBlock):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    assert fuse_(Frozen(6, 6)).fused == [""]


# --- feature extraction --------------------------------------------------------------------------


def test_timm_features_only():
    plain = randomise(timm.create_model("resnet18", features_only=True)).eval()
    ours = copy.deepcopy(plain)
    assert len(fuse_(ours).fused) == 8
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(ours(x), plain(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_torchvision_feature_extractors():
    extraction = torchvision.models.feature_extraction
    plain = randomise(torchvision.models.resnet18()).eval()
    ours = copy.deepcopy(plain)
    fuse_(ours)
    x = torch.randn(1, 3, 64, 64)
    layers = {"layer1": "a", "layer3.1": "b", "layer4": "c"}
    expected = extraction.create_feature_extractor(plain, layers)(x)
    got = extraction.create_feature_extractor(ours, layers)(x)
    getter = torchvision.models._utils.IntermediateLayerGetter(ours, {"layer4": "c"})
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        torch.testing.assert_close(got[name], b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(getter(x)["c"], expected["c"], rtol=1e-4, atol=1e-4)


def test_export_and_trace():
    model = net().eval()
    expected = model(x := image(3))
    fuse_(model)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)


def test_torchscript():
    """Gets PyTorch's own ops: what is scripted is the block as it was."""
    in_parts = nn.Sequential(nn.Conv2d(3, 6, 1), Configurable(act=nn.GELU))
    for model in (torchvision.models.resnet18(num_classes=5), in_parts):
        model = randomise(model).eval()
        expected = model(x := torch.randn(2, 3, 33, 33))
        fuse_(model)
        with pytest.warns(UserWarning, match="deepcopy"):  # it writes into what it is given
            scripted = torch.jit.script(copy.deepcopy(model))
        assert fuse_(copy.deepcopy(model)).partly == []  # still fused
        torch.testing.assert_close(scripted(x), expected, rtol=1e-4, atol=1e-4)
        assert scripted.state_dict().keys() == model.state_dict().keys()


def test_recompute_is_a_blocks_own():
    model = nn.Sequential(
        fused_res.reference.ResBlock(8, 8), fused_res.reference.ResBlock(8, 16, 2)
    )
    with pytest.raises(ValueError, match="recompute='every' must be None or 'last'"):
        fuse_(model, recompute="every")
    assert fuse_(model, recompute="last").fused == ["0", "1"]
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(block.recompute == "last" for m in (model, *copies) for block in m)
    other = nn.Sequential(fused_res.reference.ResBlock(8, 8))
    fuse_(other)
    assert other[0].recompute is None
    x = torch.randn(2, 8, 6, 6)
    y = model(x)
    assert unfuse_(model) == ["0", "1"] and not hasattr(model[0], "recompute")
    torch.testing.assert_close(y, model(x))


# --- norms of constants --------------------------------------------------------------------------


def frozen_block() -> nn.Module:
    """Of a detection backbone: torchvision's FrozenBatchNorm2d."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    down = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), frozen(8))
    block = torchvision.models.resnet.BasicBlock(6, 8, 2, down, norm_layer=frozen)
    for norm in (block.bn1, block.bn2, down[1]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return block


@pytest.mark.parametrize("train", [True, False])
def test_frozen_norms(train):
    draws = []
    for _ in range(5):
        theirs = frozen_block()
        ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
        before = copy.deepcopy(theirs.state_dict())
        assert fuse_(ours).fused == [""]
        x = image()
        draws.append([outcome(m, x.to(m.conv1.weight), train) for m in (ours, theirs, exact)])
        assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    agree(*map(list, zip(*draws, strict=True)), largest=False)


@needs_kernels
def test_frozen_norms_run_fused_and_are_seen_to_change():
    ours = frozen_block()
    plain = copy.deepcopy(ours)
    fuse_(ours)
    calls = fused_calls(ours, x := image())  # nothing is trained by its batches: also in training
    assert calls.fused == calls.batch_norms == 0
    y = ours(x)
    with FusedCalls() as calls:
        ours(x).sum().backward()
    assert (calls.fused, calls.backward) == (2, 2)
    torch.testing.assert_close(y, plain(x))
    with torch.no_grad():
        for model in (ours, plain):
            model.bn1.running_mean.add_(1)
            model.bn2.weight = model.bn2.weight * 2
        torch.testing.assert_close(ours(x), plain(x))


def test_frozen_norms_promote():
    """As in the block they are of: constants of float32 make float32 of anything less."""
    ours = frozen_block()
    plain = copy.deepcopy(ours)
    fuse_(ours)
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), plain(x)
    assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)
    for model in (ours, plain):
        model.bn2.double()
    assert ours(x).dtype == plain(x).dtype == torch.float64


def test_timms_frozen_norms():
    model = randomise(timm.create_model("regnetx_002", num_classes=10))
    frozen = timm.layers.freeze_batch_norm_2d(model)
    plain = copy.deepcopy(frozen)
    report = fuse_(frozen)
    assert len(report.fused) == 13 and not report.partly and not report.skipped
    same(frozen, plain, torch.randn(1, 3, 64, 64))
