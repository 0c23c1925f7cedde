"""Chains of residual blocks in one call: the op, and what ``fuse_`` makes of ``nn.Sequential``."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agreement import randomise
from errors import rms, rule
from instruction_sets import ISAS, instruction_set
from res_chain_cases import KINDS, blocks_of, by_blocks, double, image, stage

import fused_res
from fused_res import FusedResBlock, env, fuse_, unfuse_
from fused_res.nn import sequential
from fused_res.nn.sequential import FusedSequential
from fused_res.ops import res_chain as op
from fused_res.ops.res_chain import Link, res_chain
from fused_res.reference import ACTS, ResBlock

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        fused_res.dispatch.backends.STATUS["cpu"] is not None,
        reason="no CPU kernels on this machine",
    ),
]


@pytest.fixture
def called(monkeypatch):
    """How many convolutions each call of the kernel had."""
    found = []
    call = op.Chain.__call__

    def record(chain, x):
        found.append(chain.convolutions)
        return call(chain, x)

    monkeypatch.setattr(op.Chain, "__call__", record)
    return found


def limit(monkeypatch, tile):
    monkeypatch.setattr(env, "settings", env.settings._replace(winograd=tile))


# --- the op

SHAPES = [(1, 32, 16, 16), (2, 8, 7, 7), (3, 24, 15, 15), (1, 40, 8, 12), (9, 100, 5, 6),
          (5, 16, 1, 1), (2, 64, 3, 9), (1, 13, 6, 7)]  # fmt: skip


@pytest.mark.parametrize("tile", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_the_rule(called, monkeypatch, shape, kind, tile):
    limit(monkeypatch, tile)
    x = image(*shape)
    act = ACTS[(shape[0] + tile) % 3]
    blocks = blocks_of(kind, shape[1], 3, act)
    exact = by_blocks(x.double(), double(blocks))
    rule(res_chain(x, blocks), by_blocks(x, blocks), exact)
    assert called == [3 * len(blocks[0].convs)]


@pytest.mark.parametrize("isa", ISAS)
def test_of_every_instruction_set(called, isa):
    x = image(3, 40, 9, 10)
    blocks = blocks_of("basic", 40, 2) + blocks_of("bottleneck", 40, 1, "relu_before_add")
    with instruction_set(isa):
        rule(res_chain(x, blocks), by_blocks(x, blocks), by_blocks(x.double(), double(blocks)))
    assert called == [7]


@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (3, 32, 8, 8)], ids=str)
def test_a_hundred_blocks(called, monkeypatch, shape, tile):
    """With Winograd's tiles of 4 too, each of which alone may have more error."""
    limit(monkeypatch, tile)
    blocks = blocks_of("single", 32, 100, "relu_before_add")
    blocks = [Link([b.convs[0]._replace(weight=b.convs[0].weight * 0.2)], b.act) for b in blocks]
    x = image(*shape)
    rule(res_chain(x, blocks), by_blocks(x, blocks), by_blocks(x.double(), double(blocks)))
    assert called == [100]


def test_tiles_of_4_have_their_own_bound():
    x = image(4, 64, 12, 12)
    blocks = blocks_of("single", 64, 1, "none")
    exact = by_blocks(x.double(), double(blocks))
    assert op._implementation(op.Call(x, blocks[0].convs[0], x))[1] == 4
    assert rms(res_chain(x, blocks) - exact) <= 5e-6 * rms(exact)


CHOICES = {0: "direct", 2: "winograd2", 4: "winograd4"}


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("tile", CHOICES)
def test_the_same_for_any_number_of_threads(monkeypatch, images, threads, tile):
    """Where all of them share each convolution, and where each has its images."""

    def choose(call):
        return ("direct", 0) if call.conv.weight.size(2) == 1 else (CHOICES[tile], tile)

    monkeypatch.setattr(op, "_implementation", choose)
    x = image(images, 24, 9, 7)
    blocks = blocks_of("basic", 24, 2) + blocks_of("bottleneck", 24, 1)
    alone = res_chain(x, blocks)
    torch.set_num_threads(threads)
    for _ in range(10):
        assert torch.equal(res_chain(x, blocks), alone)


def test_nan_goes_where_it_goes_in_pytorch():
    x = image(2, 16, 6, 6)
    x[1, 3, 2, 2] = float("nan")
    blocks = blocks_of("single", 16, 2)
    y, expected = res_chain(x, blocks), by_blocks(x, blocks)
    assert torch.equal(y[0].isnan(), expected[0].isnan()) and not y[0].isnan().any()
    assert y[1].isnan()[expected[1].isnan()].all()


def test_elsewhere_it_is_convolution_by_convolution(called):
    blocks = blocks_of("basic", 16, 2)
    strided = [Link([stage(16, 16, 3)._replace(dilation=(2, 2), padding=(2, 2))])]
    x = image(2, 16, 6, 6)
    wide, plain = blocks_of("single", 136, 2), x.contiguous()
    for given, links in (
        (plain, blocks),
        (x.double(), double(blocks)),
        (x, strided),
        (image(2, 136, 4, 4), wide),
        (image(1, 16, 90, 90), blocks),
        (x[:0], blocks),
        (x.clone().requires_grad_(), blocks),
    ):
        y = res_chain(given, links)
        torch.testing.assert_close(y, by_blocks(given, links), rtol=1e-4, atol=1e-4)
        assert y.dtype == given.dtype and y.requires_grad == given.requires_grad
    torch.testing.assert_close(res_chain(x, blocks, "eager"), by_blocks(x, blocks))
    assert not called


def test_wrong_arguments_are_named():
    x = image(2, 16, 6, 6)
    with pytest.raises(ValueError, match="blocks must be at least one"):
        res_chain(x, [])
    with pytest.raises(ValueError, match="blocks must be at least one"):
        res_chain(x, [Link([])])
    with pytest.raises(ValueError, match=r"conv.weight must have shape \(K, 16 / groups"):
        res_chain(x, blocks_of("single", 8, 1))
    with pytest.raises(ValueError, match="act='swish' must be one of"):
        res_chain(x, blocks_of("single", 16, 1, "swish"))
    block = blocks_of("single", 16, 1)[0]
    trains = block.convs[0]._replace(norm=block.convs[0].norm._replace(training=True))
    with pytest.raises(ValueError, match="norm.training must be False"):
        res_chain(x, [Link([trains])])


def test_wrong_packed_chains_are_refused():
    pack, run = torch.ops.fused_res.packed_chain, torch.ops.fused_res.res_chain
    with pytest.raises(RuntimeError, match="weights must be what"):
        pack([torch.zeros(3)], [None], [0, 3, 16, 1, 1], 16)
    with pytest.raises(RuntimeError, match="5 numbers each"):
        pack([torch.zeros(3)], [None], [0, 3, 16], 16)
    weight = torch.ops.fused_res.direct_weight([torch.randn(16, 16, 3, 3)], [None])
    for program, words in (
        ([1, 3, 16, 1, 1], "tile must be"),
        ([0, 5, 16, 1, 1], "tile must be"),
        ([0, 3, 16, 3, 1], "act 0, 1 or 2"),
        ([0, 3, 8, 1, 1], "must end with the channels"),
        ([0, 3, 16, 1, 0], "must end a block"),
    ):
        with pytest.raises(RuntimeError, match=words):
            pack([weight], [None], program, 16)
    chain, x = pack([weight], [None], [0, 3, 16, 1, 1], 16), image(1, 16, 5, 4)
    assert run(x, chain).shape == x.shape
    for wrong in (chain.clone(), chain[1:], torch.zeros(0)):
        with pytest.raises(RuntimeError, match="must be what packed_chain returned"):
            run(x, wrong)
    with pytest.raises(RuntimeError, match="x must have 16 channels, got 8"):
        run(image(1, 8, 5, 4), chain)


# --- modules


def net(kind="single", count=5, channels=16):
    torch.manual_seed(1)
    relu = "before" if kind == "single" else "after"
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.Sequential(
            *[randomise(ResBlock(channels, channels, kind=kind, relu=relu)) for _ in range(count)]
        ),
        nn.Flatten(),
    )
    return model.eval().to(memory_format=torch.channels_last)


def check(model, plain, x, chained, called):
    """The model does what the plain one does, with chains of so many convolutions, also when they
    are kept."""
    for again in (False, True):
        called.clear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if again:
                patch.delattr(sequential, "run_container")
            y = model(x)
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
        assert called == chained


@pytest.mark.parametrize("kind", ["single", "basic", "bottleneck"])
def test_fuse_finds_chains(called, kind):
    plain = net(kind)
    model = copy.deepcopy(plain)
    fuse_(model)
    convs = {"single": 5, "basic": 10, "bottleneck": 15}[kind]
    check(model, plain, image(2, 3, 8, 8), [convs], called)
    check(model, plain, image(1, 3, 6, 9), [convs], called)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model[1], nn.Sequential) and type(model[1]) is FusedSequential
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    check(model[1][1:4], plain[1][1:4], image(2, 16, 8, 8), [convs // 5 * 3], called)
    unfuse_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    check(model, plain, image(2, 3, 8, 8), [], called)


def test_fuse_again_changes_nothing(called):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    types = [type(m) for m in model.modules()]
    fuse_(model)
    assert [type(m) for m in model.modules()] == types


def test_hooks_split_a_chain(called):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    x, seen = image(2, 3, 8, 8), []
    check(model, plain, x, [5], called)
    handle = model[1][2].register_forward_hook(lambda m, args, y: seen.append(y))
    check(model, plain, x, [2, 2], called)
    with torch.no_grad():
        torch.testing.assert_close(seen[-1], plain[1][:3](plain[0](x)), rtol=1e-4, atol=1e-4)
    handle.remove()
    handle = model[1][1].conv1.register_forward_pre_hook(lambda m, args: seen.append(args))
    check(model, plain, x, [3], called)
    assert len(seen) == 4
    handle.remove()
    check(model, plain, x, [5], called)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    seen.clear()
    check(model, plain, x, [], called)
    assert model[1][3].conv1 in seen
    handle.remove()
    handle = model[1].register_forward_hook(lambda m, args, y: y * 2)
    twin = plain[1].register_forward_hook(lambda m, args, y: y * 2)
    check(model, plain, x, [5], called)
    handle.remove()
    twin.remove()


def changes():
    """What may happen to a model between two calls."""

    def weight(m):
        with torch.no_grad():
            m[1][2].conv1.weight.mul_(0.5)

    def data(m):
        m[1][2].conv1.weight.data.mul_(0.5)

    def parameter(m):
        m[1][2].conv1.weight = nn.Parameter(m[1][2].conv1.weight.detach() * 0.5)

    def statistics(m):
        m[1][3].bn1.running_mean.add_(1)

    def buffer(m):
        m[1][3].bn1.running_var = m[1][3].bn1.running_var * 2

    def eps(m):
        m[1][0].bn1.eps = 0.5

    def block(m):
        torch.manual_seed(7)
        m[1][4] = randomise(ResBlock(16, 16, kind="single", relu="before")).eval()

    def module(m):
        torch.manual_seed(7)
        m[1][4].conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def fewer(m):
        del m[1][1]

    def more(m):
        torch.manual_seed(7)
        m[1].append(randomise(ResBlock(16, 16, kind="single", relu="before")).eval())

    def forward(m):
        m[1][2].forward = lambda x: x * 2

    def dilation(m):
        m[1][2].conv1.dilation = m[1][2].conv1.padding = (2, 2)

    def load(m):
        torch.manual_seed(8)
        m.load_state_dict({k: torch.rand_like(v.float()).to(v) for k, v in m.state_dict().items()})

    def hidden(m):
        m[1][2].conv1._parameters["weight"] = nn.Parameter(m[1][2].conv1.weight.detach() * 0.5)

    def attribute(m):
        with torch.no_grad():
            m[1][1].conv1.weight.mul_(0.5)

    def attribute_of_norm(m):
        m[1][1].bn1.running_mean.add_(1)

    return [weight, data, parameter, statistics, buffer, eps, block, module, fewer, more, forward,
            dilation, load, hidden, attribute, attribute_of_norm]  # fmt: skip


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_changes_are_followed(change):
    plain = net()
    if "attribute" in change.__name__:  # tensors that are no parameters and buffers
        for module, name in ((plain[1][1].conv1, "weight"), (plain[1][1].bn1, "running_mean")):
            value = getattr(module, name).detach()
            delattr(module, name)
            setattr(module, name, value)
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 3, 8, 8)
    with torch.no_grad():
        before = [model(x) for _ in range(2)][-1]
    change(model)
    change(plain)
    with torch.no_grad():
        expected = plain(x)
        assert expected.shape != before.shape or (expected - before).abs().max() > 1e-3
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_training_and_gradients_are_the_blocks_own(called):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 3, 8, 8)
    results = []
    for m in (model, plain):
        with torch.no_grad():
            m(x)
        m.train()
        m(x).square().mean().backward()
        m.eval()
        with torch.no_grad():
            results.append([m(x), *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    called.clear()
    y = model(x.requires_grad_())
    torch.autograd.grad(y.sum(), x)
    assert not called


@pytest.mark.parametrize("all_of_them", [True, False])
def test_batchnorms_that_train_without_gradients(called, all_of_them):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        for m in (model, plain):
            (m if all_of_them else m[1][2].bn1).train()
        called.clear()
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert called == ([] if all_of_them else [2, 2])
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles(called):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 3, 8, 8)
    check(model, plain, x, [5], called)
    twin = copy.deepcopy(model)
    assert "_kept" in vars(model[1]) and "_kept" not in vars(twin[1])
    check(twin, plain, x, [5], called)
    check(pickle.loads(pickle.dumps(model)), plain, x, [5], called)


def test_one_block_in_every_place(called):
    """The weights are the same: so are those that the kernel gets."""
    torch.manual_seed(1)
    block = randomise(ResBlock(16, 16, kind="single", relu="before"))
    plain = nn.Sequential(*8 * [block]).eval()
    model = copy.deepcopy(plain)
    fuse_(model)
    check(model, plain, image(2, 16, 8, 8), [8], called)


def test_blocks_that_are_no_links_are_called(called):
    torch.manual_seed(1)
    first = [ResBlock(16, 16), ResBlock(16, 16), ResBlock(16, 24, 2), ResBlock(24, 24)]
    rest = [ResBlock(24, 24, dropout=0.5), ResBlock(24, 24), ResBlock(24, 24)]
    plain = nn.Sequential(*map(randomise, first), nn.Identity(), *map(randomise, rest)).eval()
    model = copy.deepcopy(plain)
    fuse_(model)
    check(model, plain, image(2, 16, 8, 8), [4, 4], called)


def test_of_fused_res_blocks(called):
    torch.manual_seed(1)
    model = nn.Sequential(*[FusedResBlock(16, 16) for _ in range(3)]).eval()
    plain = nn.Sequential(*[ResBlock(16, 16) for _ in range(3)]).eval()
    plain.load_state_dict(model.state_dict())
    fuse_(model)
    check(model, plain, image(2, 16, 8, 8), [6], called)


def test_optimize_for_inference_finds_chains(called):
    plain = net()
    x = image(2, 3, 8, 8)
    model = fused_res.optimize_for_inference(plain, x)
    for _ in range(2):
        model(x)  # looks up what is called from then on
        check(model, plain, x, [5], called)
        with torch.no_grad():
            for m in (model, plain):
                m[1][2].conv1.weight.mul_(0.5)


def test_a_block_that_comes_again_is_packed_once(called, monkeypatch):
    packed = []
    make = op.Chain.__init__

    def record(chain, weights, *rest):
        packed.append({w.data_ptr() for w in weights})
        make(chain, weights, *rest)

    monkeypatch.setattr(op.Chain, "__init__", record)
    one, two = (randomise(ResBlock(16, 16, kind="single")) for _ in range(2))
    plain = nn.Sequential(one, one, two, one, two).eval()
    model = copy.deepcopy(plain)
    fuse_(model)
    check(model, plain, image(2, 16, 8, 8), [5], called)
    assert len(packed[0]) == 2
    with torch.no_grad():
        for m in (model, plain):
            m[3].conv1.weight.mul_(0.5)
    check(model, plain, image(2, 16, 8, 8), [5], called)


class Stages(nn.Module):
    """Blocks in no container, one of whose outputs is used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        for i in range(5):
            setattr(self, f"block{i}", ResBlock(16, 16, kind="single"))

    def forward(self, x):
        x = self.block0(self.stem(x).relu())
        middle = self.block2(self.block1(x))
        return middle + self.block4(self.block3(middle))


class Lists(nn.Module):
    """A stage of its own class that walks through a list."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(nn.Identity())
        self.blocks = nn.ModuleList(ResBlock(16, 16, kind="single") for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_optimize_for_inference_finds_lists(called):
    plain = randomise(nn.Sequential(nn.Conv2d(3, 16, 1), Lists(), nn.Flatten())).eval()
    x = image(2, 3, 8, 8)
    model = fused_res.optimize_for_inference(plain, x)
    model(x)
    check(model, plain, x, [4], called)
    alone = fused_res.optimize_for_inference(plain[1], image(2, 16, 8, 8))
    alone(image(2, 16, 8, 8))
    check(alone, plain[1], image(2, 16, 8, 8), [4], called)


class Branching(Lists):
    """What no trace shows."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def test_a_stage_that_cannot_be_traced_is_called(called):
    plain = randomise(nn.Sequential(nn.Conv2d(3, 16, 1), Branching(), nn.Flatten())).eval()
    x = image(2, 3, 8, 8)
    model = fused_res.optimize_for_inference(plain, x)
    assert not model.report.skipped
    model(x)
    check(model, plain, x, [], called)


def add_in_place(x):
    x += 1


WRITES = {
    "add_": lambda x: x.add_(1),
    "+=": add_in_place,
    "relu_": F.relu_,
    "ReLU": nn.ReLU(inplace=True),
    "a view": lambda x: x[:, :4].mul_(2),
}


class Writes(nn.Module):
    """Writes to a chain's input between its blocks."""

    def __init__(self, write):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(16, 16, kind="single") for _ in range(3))
        self.write = write

    def forward(self, x):
        x = self.stem(x)
        y = self.blocks[1](self.blocks[0](x))
        self.write(x)
        return self.blocks[2](y) + x


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_between_blocks(called, write, freeze):
    plain = randomise(Writes(WRITES[write])).eval()
    x = image(2, 3, 8, 8)
    model = fused_res.optimize_for_inference(plain, x, freeze=freeze, tune=False)
    model(x)
    check(model, plain, x, [3], called)


@pytest.mark.parametrize("freeze", [False, True])
def test_optimize_for_inference_chains_blocks_beside_a_stem(called, freeze):
    flat = nn.Sequential(net()[0], *net()[1], nn.ReLU(), *net()[1][:2]).eval()
    for plain, chained in ((flat, [5, 2]), (Stages().eval(), [3, 2])):
        randomise(plain)
        x = image(2, 3, 8, 8)
        model = fused_res.optimize_for_inference(plain, x, freeze=freeze)
        model(x)
        check(model, plain, x, chained, called)


def test_a_frozen_model(called):
    plain = net()
    x = image(2, 3, 8, 8)
    model = fused_res.optimize_for_inference(plain, x, freeze=True, tune=False)
    seen, expected = [], plain(x)

    def change():
        with torch.no_grad():
            for m in (model, plain):
                m[1][2].conv1.weight.mul_(0.5)
        model[1][1].register_forward_hook(lambda *_: seen.append(1))

    model(x)
    change()
    check(model, lambda _: expected, x, [5], called)
    assert not seen  # nothing of what changed
    model.recapture()

    def check_now(model, x):
        model(x)  # looks up what is called from then on
        check(model, plain, x, [3], called)

    check_now(model, x)
    assert seen
    with torch.no_grad():
        plain[0].weight.add_(1)
    model.load_state_dict(plain.state_dict())
    check_now(model, x)
    check_now(model, image(3, 3, 8, 8))
    check_now(copy.deepcopy(model), x)
    for m in (model, plain):
        m[1].append(copy.deepcopy(plain[1][0]))
    fuse_(model[1])
    model.recapture()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_frozen_model_is_called_while_weights_load():
    plain, x = net(), image(2, 3, 8, 8)
    model = fused_res.optimize_for_inference(plain, x, freeze=True, tune=False)
    model(x)
    state = {k: t * 0.9 if t.is_floating_point() else t for k, t in plain.state_dict().items()}

    def serve(*_):
        model(x)

    model[1][2].register_load_state_dict_post_hook(serve)
    model.load_state_dict(state)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_parameters_that_change_names_are_seen():
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        for m in (model, plain):
            bn = m[1][2].bn1
            weight, bias = bn.weight, bn.bias
            del bn.weight, bn.bias
            bn.bias, bn.weight = weight, bias
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="optimised without cuda_graph or freeze"):
        fused_res.optimize_for_inference(plain, x).recapture()


def test_other_inputs_and_modes(called):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert called == [5]
    check(model, plain, image(2, 3, 200, 200), [], called)  # too large a map
    with torch.no_grad():
        runs = (
            torch.compile(model, backend="aot_eager", fullgraph=True),
            torch.export.export(model, (x,)).module(),
            torch.jit.trace(model, x),  # which also runs the model as it is
            torch.fx.symbolic_trace(model),
        )
        called.clear()
        for run in runs:
            torch.testing.assert_close(run(x), plain(x), rtol=1e-4, atol=1e-4)
        half = copy.deepcopy(model).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), plain(x), rtol=0.1, atol=0.1)
        with fused_res.backend("eager"):
            torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(torch.func.vmap(model)(x[None]), plain(x)[None])
    assert not called


class Scaled(FusedResBlock):
    def forward(self, x):
        return super().forward(x) * 0.5


def test_a_block_with_its_own_forward_is_called(called):
    torch.manual_seed(1)
    model = nn.Sequential(*[Scaled(16, 16) for _ in range(3)], FusedResBlock(16, 16)).eval()
    model.append(FusedResBlock(16, 16).eval())
    x = image(2, 16, 8, 8)
    with torch.enable_grad():
        expected = model(x).detach()
    fuse_(model)
    for run in (model, fused_res.optimize_for_inference(model, x)):
        for _ in range(3):
            called.clear()
            with torch.no_grad():
                torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)
    assert called == [4]


def test_a_module_in_between_may_return_anything(called):
    class Turns(nn.Module):
        def forward(self, x):
            return x.contiguous() if self.nchw else x

    torch.manual_seed(1)
    blocks = [randomise(ResBlock(16, 16)) for _ in range(4)]
    turns = Turns()
    plain = nn.Sequential(*blocks[:2], turns, *blocks[2:]).eval()
    model = copy.deepcopy(plain)
    fuse_(model)
    x = image(2, 16, 8, 8)
    for nchw in (False, True, False):
        plain[2].nchw = model[2].nchw = nchw
        called.clear()
        with torch.no_grad():
            y, expected = model(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert y.stride() == expected.stride() and called == [4] * (1 if nchw else 2)


def test_several_sizes_are_kept(called):
    plain = net()
    model = copy.deepcopy(plain)
    fuse_(model)
    sizes = [image(n, 3, 8, 8) for n in (1, 2, 3)]
    for x in sizes:
        check(model, plain, x, [5], called)
    assert len(model[1]._kept) == 3
    model.train().eval()
    assert "_kept" not in vars(model[1])
    check(model, plain, sizes[0], [5], called)


def test_names_of_arguments_are_those_of_sequential(called):
    model = net()
    fuse_(model)
    with torch.no_grad():
        model[1](input=image(2, 16, 8, 8))
    assert called == [5]


def test_one_block_that_does_not_fit_leaves_the_others(called):
    torch.manual_seed(1)
    blocks = [randomise(ResBlock(16, 16)) for _ in range(4)]
    blocks.append(randomise(ResBlock(16, 16, dilation=2)))
    plain = nn.Sequential(*blocks).eval()
    model = copy.deepcopy(plain)
    fuse_(model)
    check(model, plain, image(2, 16, 8, 8), [8], called)
