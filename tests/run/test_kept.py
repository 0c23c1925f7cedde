"""Steps that are kept for inference are of the module that is called, and keep nothing alive."""

import copy
import gc
import weakref

import pytest
import torch
from model_libraries import timm
from torch import nn

from fused_res import fuse_
from fused_res.reference import ResBlock

CL = torch.channels_last
X = torch.randn(2, 16, 8, 8).to(memory_format=CL)
pytestmark = pytest.mark.usefixtures("one_thread")


def fused(*more):
    net = nn.Sequential(ResBlock(16, 16), ResBlock(16, 16), *more).eval().to(memory_format=CL)
    fuse_(net)
    return net


@torch.no_grad()
def test_a_replica_runs_its_own_weights():
    net = fused()
    net(X), net(X)  # kept
    other = copy.deepcopy(net)
    for p in other.parameters():
        p.mul_(1.5)
    for replica in net._replicate_for_data_parallel(), copy.copy(net):
        replica._modules = dict(other._modules)
        torch.testing.assert_close(replica(X), other(X))


def owner(conv, net):
    conv.owner = [net]


def hook(conv, net):
    conv.register_forward_hook(lambda *_, net=net: None)


@torch.no_grad()
@pytest.mark.parametrize("lead_back", [owner, hook])
@pytest.mark.parametrize("child", ["0.conv2", "1.bn1"])
def test_a_child_that_comes_to_lead_back_keeps_nothing_alive(lead_back, child):
    net = fused(nn.Conv2d(16, 4, 1))
    net(X), net[0](X), net[1](X)
    lead_back(net.get_submodule(child), net)
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


@torch.no_grad()
def test_a_container_is_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        net = fused()
        net(X)
        reference = weakref.ref(net)
        del net
        assert reference() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_attributes_of_a_container_change_nothing():
    net = fused()
    net.calls = 0
    net(X)
    (kept,) = net._kept.values()
    net.calls += 1
    net(X)
    assert [*net._kept.values()] == [kept]


@torch.no_grad()
def test_a_size_that_is_changed_in_place_is_seen():
    plain = ResBlock(16, 16).eval().to(memory_format=CL)
    plain.conv1.padding, plain.conv1.dilation = [1, 1], [1, 1]
    block = nn.Sequential(copy.deepcopy(plain))
    fuse_(block)
    block(X), block(X)
    for module in plain, block[0]:
        module.conv1.padding[0], module.conv1.dilation[0] = 2, 2
    torch.testing.assert_close(block(X), plain(X), rtol=1e-4, atol=1e-4)


class WithAct(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = timm.layers.BatchNormAct2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = timm.layers.BatchNormAct2d(16, apply_act=False)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


CHANGES = {
    "no activation": lambda bn: setattr(bn, "act", nn.Identity()),
    "another": lambda bn: setattr(bn, "act", nn.GELU()),
    "pooling": lambda bn: setattr(bn, "drop", nn.MaxPool2d(3, 1, 1)),
    "a hook": lambda bn: bn.act.register_forward_hook(lambda *args: 2 * args[2]),
    "a forward": lambda bn: setattr(bn.act, "forward", lambda x: x),
}


@torch.no_grad()
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_children_of_a_norm_may_change(change, warm):
    plain = WithAct().eval().to(memory_format=CL)
    block = nn.Sequential(copy.deepcopy(plain))
    assert fuse_(block).fused == ["0"]
    if warm:
        block(X), block(X)
    change(plain.bn1), change(block[0].bn1)
    torch.testing.assert_close(block(X), plain(X), rtol=1e-4, atol=1e-4)
