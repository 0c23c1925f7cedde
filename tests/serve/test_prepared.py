"""An optimised model looks up once what its blocks and convolutions run. Nothing that is changed
afterwards may go unseen."""

import threading

import pytest
import torch
import torch.nn.functional as F
from agreement import randomise
from blocks import BasicBlock
from torch import nn

import fused_res
from fused_res import optimize_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(nn.Module):
    """The first rows of a map: of how many is an attribute's to say, not the input's."""

    def __init__(self):
        super().__init__()
        self.rows = 9

    def forward(self, x):
        return x[:, :, : self.rows]


class Sum(nn.Module):
    """Takes a list."""

    def forward(self, maps):
        return sum(maps)


class Gain(nn.Module):
    """Takes nothing."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self):
        return self.gain


class Head(nn.Module):
    """A container with an attribute of its own."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(16, 4, 1), gain

    def forward(self, x):
        return self.gain * (1 + self.conv(x).relu().mean((2, 3)))


class Net(nn.Module):
    """Convolutions and blocks in several containers, and a module that is neither."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.rows, self.sum, self.gain = Rows(), Sum(), Gain()
        a, b, c = BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 16)
        self.stages = nn.ModuleList([nn.Sequential(a, b), nn.Sequential(c)])
        self.head = Head()

    def forward(self, x):
        x = self.rows(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.sum([x, self.gain() * x]))


X = torch.randn(2, 3, 11, 11, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair():
    """A model, and what is optimised of it after it was called a few times."""
    model = randomise(Net()).eval()
    ours = optimize_for_inference(model, X, tune=False)
    for _ in range(3):
        assert_same(ours, model)
    return model, ours


def assert_same(ours, model, x=X):
    torch.testing.assert_close(ours(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def ops_of(ours, x=X) -> dict[str, int]:
    """How often a forward calls each of the package's ops."""
    with torch.profiler.profile() as profile:
        ours(x)
    names = [e.key.removeprefix("fused_res::") for e in profile.key_averages()]
    counts = dict(zip(names, (e.count for e in profile.key_averages()), strict=True))
    return {name: counts.get(name, 0) for name in ("fingerprint", "convolutions")}


def test_is_looked_up_once(pair):
    _, ours = pair
    assert ops_of(ours)["fingerprint"] == 1


@torch.no_grad()
def test_a_block_is_one_call(pair):
    _, ours = pair
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    ours.stages[1](x)
    assert ops_of(ours.stages[1], x)["convolutions"] == 1


def test_another_backend(pair):
    model, ours = pair
    with fused_res.backend("eager"):
        assert_same(ours, model)
        assert ops_of(ours)["convolutions"] == 0
    assert ops_of(ours)["convolutions"] > 0


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model, path, new):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def fresh(make):
    """Modules of the same values in both models."""
    torch.manual_seed(3)
    return randomise(make()).eval()


def swapped_data(t):
    t.data = t.data + 0.5


CHANGES = {
    "weight in place": lambda m: m.stages[0][1].c2.weight.detach().mul_(1.5),
    "weight's data": lambda m: m.stages[0][1].c2.weight.data.mul_(1.5),
    "weight's data replaced": lambda m: swapped_data(m.stages[1][0].c1.weight),
    "stem's weight": lambda m: m.stem[0].weight.data.mul_(1.5),
    "stem's bias": lambda m: m.stem[0].bias.data.add_(1),
    "one running variance": lambda m: m.stages[1][0].n1.running_var.data[3].mul_(9),
    "a parameter": lambda m: setattr(m.stages[0][0].c1, "weight",
                                     nn.Parameter(m.stages[0][0].c1.weight.detach() * 2)),
    "a buffer": lambda m: setattr(m.stages[0][0].n2, "running_mean", torch.ones(8)),
    "eps": lambda m: setattr(m.stages[0][0].n2, "eps", 3.0),
    "eps of the stem's": lambda m: setattr(m.stem[1], "eps", 3.0),
    "a block": lambda m: replaced(m, "stages.0.0", fresh(lambda: BasicBlock(8, 8))),
    "a block by a convolution": lambda m: replaced(m, "stages.0.0", fresh(
        lambda: nn.Conv2d(8, 8, 3))),
    "a convolution": lambda m: replaced(m, "stages.0.0.c2", fresh(
        lambda: nn.Conv2d(8, 8, 3, padding=1))),
    "a convolution's class": lambda m: setattr(m.stages[0][0].c2, "__class__", Doubled),
    "the stem's class": lambda m: setattr(m.stem[0], "__class__", Doubled),
    "a stage": lambda m: m.stages.__setitem__(1, nn.Sequential(
        fresh(lambda: BasicBlock(16, 16)), fresh(lambda: BasicBlock(16, 16)))),
    "one more block": lambda m: m.stages[0].append(fresh(lambda: BasicBlock(16, 16))),
    "one less": lambda m: m.stages[1].__delitem__(0),
    "the stem's ReLU": lambda m: replaced(m, "stem.2", nn.Tanh()),
    "a block's forward": lambda m: setattr(m.stages[1][0], "forward", lambda x: -x),
    "a convolution's forward": lambda m: setattr(
        m.stages[1][0].c1, "forward", lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "the stem's forward": lambda m: setattr(m.stem[1], "forward", lambda x: x * 3),
    "a stage's forward": lambda m: setattr(m.stages[1], "forward", lambda x: x + 3),
    "a container": lambda m: setattr(m, "head", fresh(lambda: Head(gain=3.0))),
    "the size between": lambda m: setattr(m.rows, "rows", 6),
    "train": lambda m: m.stages[0][1].n1.train(),
    "train of the stem": lambda m: m.stem[1].train(),
    "padding": lambda m: setattr(m.stages[1][0].c1, "padding_mode", "circular"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(pair, change):
    model, ours = pair
    before = model(X).detach()
    with torch.no_grad():
        change(model)
        change(ours)
    for _ in range(3):
        expected = model(X).detach()
        assert not torch.allclose(expected, before, atol=1e-3)
        torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-4)


HOOKED = ["stem", "stem.0", "stem.1", "stem.2", "rows", "stages.0", "stages.0.1", "stages.0.1.c1",
          "stages.0.1.n2", "stages.1", "stages.1.0", "head",
          "head.conv"]  # fmt: skip


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_run(pair, path):
    model, ours = pair
    handles = [
        m.get_submodule(path).register_forward_hook(lambda module, args, y: y + 1) for m in pair
    ]
    for _ in range(2):
        assert_same(ours, model)
    for handle in handles:
        handle.remove()
    for _ in range(2):
        assert_same(ours, model)


def test_a_global_hook_sees_the_layers(pair):
    _, ours = pair
    seen = []
    with nn.modules.module.register_module_forward_pre_hook(lambda m, x: seen.append(m)):
        ours(X)
    assert {ours.stages[0][1].c1, ours.stem[0], ours.head.conv} <= set(seen)


def test_sizes_dtypes_and_threads_in_turns(pair):
    model, ours = pair
    for batch in (1, 2, 3, 4, 5, 6, 2, 1):
        x = torch.randn(batch, 3, 11, 11)
        for layout in (torch.contiguous_format, torch.channels_last):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert_same(ours, model, x.contiguous(memory_format=layout))


def test_each_size_is_looked_up_once(pair):
    _, ours = pair
    other = torch.randn(3, 3, 11, 11)
    for _ in range(2):
        ours(other)
        assert ops_of(ours)["fingerprint"] == ops_of(ours, other)["fingerprint"] == 1


def test_autocast_is_that_of_the_call(pair):
    model, ours = pair
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(X), model(X).detach(), rtol=3e-2, atol=3e-2)
        assert ours(X).dtype == model(X).dtype
    assert_same(ours, model)


def test_serves_several_threads(pair):
    model, ours = pair
    inputs = [torch.randn(1 + i % 2, 3, 11, 11) for i in range(6)]
    expected = [model(x).detach() for x in inputs]
    wrong = []

    def serve(i):
        torch.set_num_threads(1)
        for _ in range(20):
            if not torch.allclose(ours(inputs[i]), expected[i], rtol=1e-4, atol=1e-4):
                wrong.append(i)

    workers = [threading.Thread(target=serve, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_weights_that_change_in_every_call(pair):
    model, ours = pair
    for _ in range(3):
        for m in pair:
            with torch.no_grad():
                m.stages[0][0].c1.weight.add_(0.1)
                m.stem[1].running_mean.add_(0.1)
        assert_same(ours, model)
