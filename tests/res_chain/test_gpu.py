"""Chains of residual blocks on a GPU (`make gpu`), by the CUDA kernel."""

import copy

import pytest
import torch
from agreement import randomise
from errors import rule
from res_chain_cases import blocks_of, by_blocks, double

from fused_res import fuse_
from fused_res.dispatch import backends
from fused_res.ops import res_chain as op
from fused_res.ops.res_chain import Link, res_chain
from fused_res.reference import ResBlock

pytestmark = pytest.mark.gpu
# fewer images than multiprocessors, which share them where there are clusters, and more
SHAPES = [(1, 32, 16, 16), (5, 64, 15, 15), (9, 24, 8, 12), (1000, 16, 7, 7), (3, 13, 1, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def available(monkeypatch):
    reason = backends.why_not("conv_bn_act", "cuda", "cuda", torch.float32)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def draw(shape, dtype, kind="basic", count=3):
    def of(t):
        return None if t is None else t.cuda()

    def conv(c):
        norm = c.norm and c.norm._replace(**{
            name: of(getattr(c.norm, name))
            for name in ("running_mean", "running_var", "weight", "bias")
        })  # fmt: skip
        bias = None if c.bias is None else c.bias.cuda().to(dtype)
        return c._replace(weight=c.weight.cuda().to(dtype), bias=bias, norm=norm)

    blocks = blocks_of(kind, shape[1], count, "relu")
    blocks = [Link([conv(c) for c in b.convs], b.act) for b in blocks]
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=torch.channels_last), blocks


@pytest.mark.parametrize("kind", ["single", "basic", "bottleneck", "no norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tf32", [False, True])
def test_error_is_within_the_rule(monkeypatch, tf32, shape, dtype, kind):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    x, blocks = draw(shape, dtype, kind)
    exact = by_blocks(x.double(), double(blocks))
    y = op.prepared_chain(x, blocks, "cuda")(x)
    rule(y, by_blocks(x, blocks), exact)
    assert torch.equal(res_chain(x, blocks, "cuda"), y)


def test_of_modules():
    """One call for the chain; a hook splits it; values that change are seen."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[randomise(ResBlock(32, 32)) for _ in range(5)])
    net = net.cuda().to(torch.bfloat16, memory_format=torch.channels_last).eval()
    for bn in net.modules():
        if isinstance(bn, torch.nn.BatchNorm2d):
            bn.float()
    plain = copy.deepcopy(net)
    exact = copy.deepcopy(net).double()
    fuse_(net)
    x = torch.randn(4, 32, 16, 16, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)

    def check(steps):
        with torch.no_grad():
            for _ in range(2):
                rule(net(x), plain(x), exact(x.double()))
        assert [len(kept.steps) for kept in net._kept.values()] == [steps]

    with backends.backend("cuda"):
        check(1)
        with torch.no_grad():
            for one in (net, plain, exact):
                one[2].conv1.weight.mul_(0.5)
        check(1)
        seen = []
        net[2].register_forward_hook(lambda *_: seen.append(1))
        check(3)
        assert seen


def test_in_a_cuda_graph():
    """Parameters that change between replays are followed."""
    x, blocks = draw((4, 32, 16, 16), torch.bfloat16)
    res_chain(x, blocks, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = res_chain(x, blocks, "cuda")
    for block in blocks:
        block.convs[0].weight.mul_(0.5)
    graph.replay()
    assert torch.equal(y, res_chain(x, blocks, "cuda"))
