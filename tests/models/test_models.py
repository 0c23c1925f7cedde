"""Networks by name: shapes, twins, published numbers, checkpoints and initialisation."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import blocks
import pytest
import torch
import torch.nn.functional as F
from agreement import agree, outcome, randomise
from model_libraries import torchvision
from torch import nn
from torch.testing import assert_close

from fused_res import FusedResBlock, models, reference
from fused_res.nn.blocks import FusedForward
from fused_res.nn.sequential import FusedSequential

DOCS = (Path(__file__).parents[2] / "docs/models.md").read_text()
BLOCKS = reference.ResBlock, models.PreActBlock
WITHOUT_BLOCKS = {"net", "net_functional", "net_width", "net_dropout", "net_batchnorm",
                  "net_depth", "net_res"}  # fmt: skip


def small(name):
    """Arguments that make a net narrow and shallow, and keep what is its own."""
    if name.startswith("wrn"):
        return {"depth": 10, "widen_factor": 2}
    if name.startswith(("resne", "wide")):
        return {"width": 16, "counts": (2, 1)}
    if name == "net_res_deep":
        return {"n_chans1": 8, "n_blocks": 4}
    return {} if name in WITHOUT_BLOCKS else {"width": 8}


def make(name, seed=0, **arguments):
    torch.manual_seed(seed)
    return models.create(name, **{**small(name), **arguments})


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size)


def count(name, **arguments):
    with torch.device("meta"):
        return sum(p.numel() for p in models.create(name, **arguments).parameters())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", models.names())
def test_twins(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused, plain = make(name, num_classes=7), make(name, num_classes=7, fused=False)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert plain.training and fused.training
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    kinds = {n: isinstance(m, FusedForward) for n, m in fused.named_modules()}
    assert kinds == {n: isinstance(m, BLOCKS) for n, m in plain.named_modules()}
    assert any(kinds.values()) == (name not in WITHOUT_BLOCKS)
    assert not any(isinstance(m, (FusedForward, FusedSequential)) for m in plain.modules())
    assert fused(images()).shape == plain(images()).shape == (2, 7)
    assert models.describe(name) and "\n" not in models.describe(name)


STEPS = [
    ("resnet18", {}), ("resnet20", {}), ("resnet50", {}), ("resnext50_32x4d", {}),
    ("wide_resnet50_2", {}), ("wrn16_8", {"dropout": 0.3}), ("resnet18_cifar", {"dropout": 0.3}),
    ("resnet", {"kind": "single"}), ("resnet", {"kind": "plain", "counts": (3,)}),
    ("plain_block", {"n_blocks": 3}), ("plain_block", {"relu": "after", "stride": 2}),
    ("two_blocks", {}), ("bn_block", {}), ("concat_block", {"n_blocks": 2}),
    ("projection_block", {}), ("projection_block", {"skip": "identity", "stride": 1}),
    ("deep_cnn", {}), ("net_res_deep", {}), ("net_res_deep", {"shared": True}),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments", STEPS, ids=lambda v: str(v))
def test_error_is_within_the_rule(name, arguments):
    """A training step, and an evaluation, in which chains run."""
    runs = {True: [], False: []}
    for seed in range(5):
        fused = randomise(make(name, seed, **arguments))
        plain = make(name, seed, fused=False, **arguments)
        plain.load_state_dict(fused.state_dict())
        nets = fused, plain, copy.deepcopy(plain).double()
        x = images(8)
        for train, draws in runs.items():
            dtypes = [next(net.parameters()).dtype for net in nets]
            draws.append([
                outcome(net, x.to(dtype), train, backward=train)
                for net, dtype in zip(nets, dtypes, strict=True)
            ])  # fmt: skip
    for train, draws in runs.items():
        agree(*map(list, zip(*draws, strict=True)), f"{name}, train={train}", largest=False)


# --- published numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032),
        ("resnet101", 44_549_160), ("resnet152", 60_192_808), ("resnext50_32x4d", 25_028_904),
        ("resnext101_32x8d", 88_791_336), ("resnext101_64x4d", 83_455_272),
        ("wide_resnet50_2", 68_883_240), ("wide_resnet101_2", 126_886_696),
    ],
)  # fmt: skip
def test_parameters_on_imagenet(name, parameters):
    assert count(name, num_classes=1000) == parameters


def test_parameters_on_cifar():
    option_a = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    for depth, parameters in option_a.items():
        assert count(f"resnet{depth}") == parameters + projections
    assert count("resnet18_cifar") == 11_173_962
    for name, parameters in ("wrn16_8", 11.0e6), ("wrn28_10", 36.5e6), ("wrn40_4", 8.9e6):
        assert count(name) == pytest.approx(parameters, abs=0.05e6)


def test_parameters_of_the_small_nets():
    """With two classes, as counted by hand: each layer's weights and biases."""
    for name in ("net", "net_functional"):
        assert count(name, num_classes=2) == 448 + 1160 + 16_416 + 66
    width = 896 + 4624 + 32_800 + 66
    assert count("net_width", num_classes=2) == count("net_dropout", num_classes=2) == width
    assert count("net_batchnorm", num_classes=2) == width + 64 + 32
    depth = 896 + 4624 + 2320 + 8224 + 66
    assert count("net_depth", num_classes=2) == count("net_res", num_classes=2) == depth
    ends, block = 896 + 65_568 + 66, 9 * 32 * 32 + 64
    assert count("net_res_deep", num_classes=2) == ends + 100 * block
    assert count("net_res_deep", num_classes=2, shared=True) == ends + block
    assert count("deep_cnn") == 896 + 64 + 2 * 2 * (9 * 32 * 32 + 32 + 64) + 2048 * 10 + 10


# --- torchvision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_torchvision_checkpoints(name):
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    torch.manual_seed(3)
    plain = models.create(name, num_classes=1000, fused=False)
    assert_close(plain.state_dict(), dict(theirs.state_dict()), rtol=0, atol=0)  # as initialised
    randomise(theirs)
    plain.load_state_dict(theirs.state_dict(), strict=True)
    with torch.device("meta"):
        fused = models.create(name, num_classes=1000)
    fused.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = images(1, 64)
    with torch.no_grad():
        expected = theirs(x)
        assert torch.equal(plain.eval()(x), expected)
        assert_close(fused.eval()(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    theirs.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152", "wide_resnet101_2",
                                  "resnext101_32x8d", "resnext101_64x4d"])  # fmt: skip
def test_torchvision_keys_and_shapes(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=5)
        ours = models.create(name, num_classes=5)
    shapes = {key: t.shape for key, t in theirs.state_dict().items()}
    assert {key: t.shape for key, t in ours.state_dict().items()} == shapes


# --- the nets of the tutorials, as written by hand -----------------------------------------------


def check_same(ours, theirs, x):
    """Parameters in the same order, and with the same values the same outputs."""
    values = ours.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    ours, theirs = copy.deepcopy(ours).double(), theirs.double()
    for train in (True, False):
        torch.manual_seed(1)
        found = ours.train(train)(x.double())
        torch.manual_seed(1)
        assert_close(found, theirs.train(train)(x.double()))


def test_blocks_by_hand():
    x = torch.randn(4, 8, 12, 12)
    check_same(make("plain_block").blocks, blocks.PlainBlock(8, 8), x)
    check_same(make("plain_block", stride=2).blocks, blocks.PlainBlock(8, 8, 2), x)
    plain = nn.Sequential(blocks.PlainBlock(8, 8), nn.ReLU())
    check_same(make("plain_block", relu="after").blocks, plain, x)
    for bias in (True, False):
        check_same(make("bn_block", bias=bias).blocks, blocks.ResidualBlock(8, bias), x)
    check_same(make("concat_block").blocks, blocks.SkipConnectionBlock(8, 8), x)

    def transformed(stride, transform):
        body = nn.Sequential(
            nn.Conv2d(8, 8, 3, stride, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        return blocks.TransformSkip(body, transform)

    projection = nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    check_same(make("projection_block").blocks, transformed(2, projection), x)
    identity = make("projection_block", skip="identity", stride=1)
    check_same(identity.blocks, transformed(1, None), x)


class PooledHead(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def convolve(c_in, c_out, act):
    return nn.Conv2d(c_in, c_out, 3, padding=1), act, nn.MaxPool2d(2)


def test_nets_by_hand():
    two = nn.Sequential(
        blocks.PlainBlock(3, 8), nn.ReLU(), blocks.PlainBlock(8, 16), *PooledHead(16)
    )
    tanh, relu, head = nn.Tanh(), nn.ReLU(), (nn.Linear(32, 10),)
    by_hand = {
        "two_blocks": (two, {}),
        "plain_block": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), relu, blocks.PlainBlock(8, 8), *PooledHead(8)
            ),
            {},
        ),
        "concat_block": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), relu, blocks.SkipConnectionBlock(8, 8),
                *PooledHead(16),
            ),
            {},
        ),
        "resnet18_cifar": (
            blocks.ResNet(blocks.BasicBlock, (2, 2, 2, 2), width=4),
            {"width": 4, "counts": (2, 2, 2, 2)},
        ),
        "resnet": (
            blocks.ResNet(blocks.Bottleneck, (2, 1, 2), width=4),
            {"kind": "bottleneck", "width": 4, "counts": (2, 1, 2)},
        ),
        "deep_cnn": (blocks.DeepCNN(blocks=3), {"n_blocks": 3, "width": 32}),
        "net": (
            nn.Sequential(*convolve(3, 16, tanh), *convolve(16, 8, tanh), nn.Flatten(),
                          nn.Linear(512, 32), tanh, *head),
            {},
        ),
        "net_depth": (
            nn.Sequential(*convolve(3, 32, relu), *convolve(32, 16, relu), *convolve(16, 16, relu),
                          nn.Flatten(), nn.Linear(256, 32), relu, *head),
            {},
        ),
    }  # fmt: skip
    for name, (theirs, arguments) in by_hand.items():
        check_same(make(name, **arguments), theirs, images(4))
    check_same(make("net_res", num_classes=2), blocks.NetRes(), images(4))
    for shared in (False, True):
        ours = make("net_res_deep", n_chans1=32, n_blocks=6, shared=shared, num_classes=2)
        check_same(ours, blocks.NetResDeep(n_blocks=6, shared=shared), images(4))


def test_net_is_written_twice():
    net, functional = make("net"), make("net_functional")
    assert_close(net.state_dict(), functional.state_dict(), rtol=0, atol=0)
    x = images()
    assert torch.equal(net(x), functional(x))


@pytest.mark.parametrize("name", ["net_functional", "net_width", "net_dropout", "net_batchnorm",
                                  "net_depth", "net_res"])  # fmt: skip
@pytest.mark.parametrize("n_chans1", [2, 7, 12])
def test_width_of_the_small_nets(name, n_chans1):
    net = models.create(name, n_chans1=n_chans1)
    assert net(images()).shape == (2, 10)
    assert net.conv1.out_channels == n_chans1 and net.conv2.out_channels == n_chans1 // 2


def inputs_of(net, name, x):
    seen = []
    handle = getattr(net, name).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    net(x)
    handle.remove()
    return seen[0]


def test_net_dropout_zeroes_maps_after_each_pooling():
    net, x = models.create("net_dropout"), images(64)
    width = models.create("net_width")
    width.load_state_dict(net.state_dict())
    for name, pixels in ("conv2", 16 * 16), ("fc1", 8 * 8):
        maps = inputs_of(net, name, x).reshape(64, -1, pixels)
        gone = (maps == 0).all(-1)
        assert torch.equal(gone, (maps == 0).any(-1))
        assert 0.35 < gone.double().mean() < 0.45
        # what was kept of the first layer, whose input is the same, is scaled up
        if name == "conv2":
            whole = inputs_of(width, name, x).reshape(64, -1, pixels)
            assert_close(maps[~gone], whole[~gone] / 0.6)
    assert torch.equal(net.eval()(x), width(x))


def test_net_batchnorm_normalises_before_tanh():
    net = models.create("net_batchnorm")
    for conv, after, shape in ("conv1", "conv2", (2, 32, 16, 16)), ("conv2", "fc1", (2, 1024)):
        nn.init.constant_(getattr(net, f"{conv}_batchnorm").bias, 100)
        assert torch.equal(inputs_of(net, after, images()), torch.ones(shape))
        assert (
            inputs_of(net, f"{conv}_batchnorm", images()).shape[1]
            == getattr(net, conv).out_channels
        )


def test_blocks_are_separate_unless_shared():
    def state(shared):
        net = make("net_res_deep", shared=shared)
        return net, net.resblocks[0].conv1.weight, net.resblocks[3].conv1.weight

    _, first, last = state(shared=False)
    assert not torch.equal(first, last)
    net, first, last = state(shared=True)
    assert first is last and len(net.resblocks) == 4
    assert len(net.state_dict()) == len(make("net_res_deep").state_dict())


def test_stems():
    """The ImageNet stem makes maps a quarter as large, the CIFAR stem leaves them."""
    for stem, size in ("imagenet", 16), ("cifar", 64):
        net = make("resnet18", stem=stem)
        assert inputs_of(net, "layer1", images(2, 64)).shape == (2, 16, size, size)
        assert inputs_of(net, "layer2", images(2, 64)).shape == (2, 16, size, size)
        assert inputs_of(net, "avgpool", images(2, 64)).shape == (2, 32, size // 2, size // 2)


def test_dropout_is_inside_the_blocks():
    x = images(4)
    for name in ("resnet18", "resnet50", "wrn16_8", "bn_block"):
        net = make(name, dropout=0.5)
        rates = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
        assert rates == [0.5] * sum(isinstance(m, BLOCKS) for m in net.modules())
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), net(x))


def test_wrn_block():
    """BatchNorm and ReLU come first, for the shortcut too; dropout stands before the last
    convolution."""
    block = randomise(models.PreActBlock(4, 6, 2, dropout=0.4)).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.double)
    last = inputs_of(block, "conv2", x)
    block.conv2.register_forward_pre_hook(lambda m, args: (last,))

    def norm_relu(x, bn):
        return F.relu(F.batch_norm(x, None, None, bn.weight, bn.bias, training=True))

    first = norm_relu(x, block.bn1)
    second = norm_relu(F.conv2d(first, block.conv1.weight, None, 2, 1), block.bn2)
    assert_close(last, torch.where(last == 0, 0, second / 0.6))
    assert (last == 0).double().mean() > (second == 0).double().mean() + 0.1
    shortcut = F.conv2d(first, block.downsample.weight, None, 2)
    assert_close(block(x), F.conv2d(last, block.conv2.weight, padding=1) + shortcut)


# --- initialisation ------------------------------------------------------------------------------


def test_initialisation():
    net = make("net_res_deep", n_chans1=32)
    for block in net.resblocks:
        assert block.conv1.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
        assert (block.bn1.weight == 0.5).all() and (block.bn1.bias == 0).all()
    for name in ("resnet20", "wrn16_8"):
        net = models.create(name, **({} if name == "resnet20" else {"depth": 10}))
        for conv in (
            m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000
        ):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert (net.fc.bias == 0).all()
    net = make("resnet18_cifar", init="default")
    torch.manual_seed(0)
    assert torch.equal(net.conv1.weight, nn.Conv2d(3, 16, 3, bias=False).weight)


@pytest.mark.parametrize("name, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name, last):
    net = make(name, zero_init_residual=True)
    norms = {n: m.weight for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    zero = {n for n, weight in norms.items() if (weight == 0).all()}
    assert zero == {n for n in norms if n.startswith("layer") and n.endswith(f".{last}")}
    assert all((weight == 1).all() for n, weight in norms.items() if n not in zero)
    x = torch.rand(2, 64 if last == "bn3" else 16, 8, 8)  # of no negative values
    assert torch.equal(net.layer1[1](x), x)


# --- as modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "wrn16_8", "net_res_deep", "concat_block", "net"])
@pytest.mark.parametrize("fused", [True, False])
def test_copies_and_pickles(name, fused):
    net, x = randomise(make(name, fused=fused)).eval(), images()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(m) for m in other.modules()] == [type(m) for m in net.modules()]
        with torch.no_grad():
            assert torch.equal(other(x), net(x))
        nn.init.zeros_(other.fc2.weight if name.startswith("net") else other.fc.weight)
        assert not torch.equal(other(x), net(x))


def test_blocks_by_class():
    net = models.ResNet("bottleneck", (1, 1), width=16, block=FusedResBlock)
    assert isinstance(net.layer1[0], FusedResBlock)
    assert not isinstance(models.ResNet(counts=(1,), width=8).layer1[0], FusedResBlock)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet19", "name='resnet19' is not a model: did you mean 'resnet18'"),
        ("netresdeep", "'net_res_deep'"),
        ("zzz", "name='zzz' is not a model: fused_res.models.names() has all"),
        (None, "name=None is not a model"),
    ],
)
def test_unknown_names(name, words):
    for call in (models.create, models.describe):
        with pytest.raises(ValueError, match=re.escape(words)):
            call(name)


@pytest.mark.parametrize(
    "name, argument",
    [("resnet18", "n_blocks"), ("net", "width"), ("net_res", "block"), ("resnet18", "block")],
)
def test_unknown_arguments(name, argument):
    words = f"model '{name}' takes no argument {argument}; it takes: .*num_classes"
    with pytest.raises(TypeError, match=words):
        models.create(name, **{argument: 3})


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("resnet18", {"num_classes": 0}, "num_classes=0 must be an integer of at least 1"),
        ("net", {"num_classes": 2.5}, "num_classes=2.5 must be an integer"),
        ("resnet18", {"width": 0}, "width=0 must be"),
        ("resnet18", {"counts": (2, 0)}, r"counts\[1\]=0 must be"),
        ("resnet18", {"counts": ()}, r"counts=\(\) must have at least one stage"),
        ("resnet18", {"stem": "large"}, "stem='large' must be one of: imagenet, cifar"),
        ("resnet18", {"init": "he"}, "init='he' must be one of: kaiming, default"),
        ("resnet", {"kind": "dense"}, "kind='dense' must be one of: basic, bottleneck"),
        ("resnet", {"kind": "plain", "zero_init_residual": True}, "zero_init_residual=True needs"),
        ("resnext50_32x4d", {"width": 8}, "width=8 times width_per_group=4 must be at least 64"),
        ("resnet18", {"dropout": 1.0}, "dropout=1.0 must be"),
        ("wrn16_8", {"depth": 17}, "depth=17 must be 6 n [+] 4: 10, 16"),
        ("wrn16_8", {"depth": 4}, "depth=4 must be"),
        ("wrn16_8", {"widen_factor": 0}, "widen_factor=0 must be"),
        ("net_width", {"n_chans1": 1}, "n_chans1=1 must be an integer of at least 2"),
        ("net_res", {"n_chans1": "8"}, "n_chans1='8' must be an integer of at least 2"),
        ("net_res_deep", {"n_blocks": 0}, "n_blocks=0 must be"),
        ("projection_block", {"skip": "identity"}, "skip='identity' needs"),
        ("bn_block", {"skip": "none"}, "skip='none' must be one of"),
        ("deep_cnn", {"n_blocks": -1}, "n_blocks=-1 must be"),
        ("two_blocks", {"width": None}, "width=None must be"),
    ],
)
def test_bad_arguments(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        models.create(name, **arguments)


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", DOCS, flags=re.S))
def test_code_of_the_page_runs(code):
    exec(code, {})


def test_tables_of_the_page():
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in DOCS.splitlines()
        if line.startswith("| ") and "`" in line
    ]
    tutorial = {row[1]: row[2] for row in rows if len(row) == 5}
    family = {row[0]: row[1] for row in rows if len(row) == 3}
    assert set(tutorial) | set(family) == set(models.names())
    with torch.device("meta"):
        for name, kind in tutorial.items():
            classes = type(models.create(name)).__mro__  # a stem is fused by a subclass
            assert kind in [cls.__name__ for cls in classes]
    cifar = "resnet18_cifar", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"
    for name, parameters in family.items():
        classes = 10 if name in cifar or name.startswith("wrn") else 1000
        assert parameters == f"{count(name, num_classes=classes, fused=False):,}"
