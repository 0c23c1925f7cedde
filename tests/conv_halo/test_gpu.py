"""On a GPU (`make gpu`): conv_halo at real sizes, in graphs, and in training."""

import pytest
import torch
import torch.nn.functional as F
from conv_bn_act_cases import assert_rule, to
from conv_bn_act_gpu_cases import CALLS, image, stage
from errors import rule

from fused_res.dispatch import backends
from fused_res.dispatch.inference_conv import IMPLEMENTATIONS
from fused_res.ops.conv_bn_act import Call

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_float32():
    """Against float64 TensorFloat-32 is no error of ours."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# Calls that conv_halo takes: with tiles of several images, more tiles than blocks, all epilogues.
HALO = {
    "64 3x3": CALLS["64 3x3"],
    "64 3x3 residual": CALLS["64 3x3 residual"],
    "ReLU before the add": CALLS["ReLU before the add"],
    "odd channels": CALLS["odd channels"],
    "1x1": lambda: dict(
        x=image(8, 64, 56, 56), conv=stage(64, 32, 1, bias=True), residual=image(8, 32, 56, 56)),
    "small maps": lambda: dict(x=image(1000, 40, 7, 7), conv=stage(40, 24, 3)),
    "one pixel": lambda: dict(x=image(3, 8, 1, 1), conv=stage(8, 8, 3), act="none"),
    "large map": lambda: dict(
        x=image(2, 16, 331, 517), conv=stage(16, 16, 3), residual=image(2, 16, 331, 517)),
}  # fmt: skip


@pytest.fixture
def conv_halo():
    reason = backends.why_not("conv_bn_act", "cuda", "cuda", torch.float32)
    if reason:
        pytest.skip(reason)
    found = IMPLEMENTATIONS["conv_halo"]

    def run(**given):
        call = Call(**given)
        if found.why_not(call):
            pytest.skip(found.why_not(call))
        return found.prepare(call)(call.x, call.residual)

    return run


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", HALO.values(), ids=HALO)
def test_error_is_within_the_rule(conv_halo, monkeypatch, call, dtype, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    with torch.no_grad():
        assert_rule([call() for _ in range(2)], dtype, conv_halo)
        given = to(call(), dtype, torch.float32)
        first = conv_halo(**given)
        assert all(torch.equal(first, conv_halo(**given)) for _ in range(5))


def test_in_a_cuda_graph(conv_halo):
    """Parameters that change between replays are followed."""
    call = to(CALLS["64 3x3 residual"](), torch.bfloat16, torch.float32)
    with torch.no_grad():
        conv_halo(**call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = conv_halo(**call)
        for t in (call["conv"].weight, call["conv"].norm.weight):
            t.mul_(0.5)
        graph.replay()
        assert torch.equal(y, conv_halo(**call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (300, 24, 7, 9)])
def test_in_training(conv_halo, shape, dtype):
    """Its statistics and gradients against PyTorch's ops on what it makes."""
    x, (n, c, h, w) = image(*shape).to(dtype), shape
    weight, ops = stage(c, 40, 3).weight.to(dtype), torch.ops.fused_res
    y, partial = ops.conv_halo_statistics(x, weight, None, False)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    rule(y, F.conv2d(x, weight, padding=1), exact)
    mean, m2, count = partial.double().unbind(1)
    of_all = (mean * count).sum(0) / count.sum(0)
    torch.testing.assert_close(count.sum(0), torch.full_like(of_all, n * h * w))
    torch.testing.assert_close(of_all, y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    var = (m2 + count * (mean - of_all) ** 2).sum(0) / count.sum(0)
    torch.testing.assert_close(var, y.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)

    stats = torch.rand((5, c), device="cuda") + 0.1
    dx, partial = ops.conv_halo_gradient(y, weight, x, stats, False)
    centre, scale, shift = stats[2:].view(3, -1, 1, 1)
    stopped = (x.float() - centre) * scale + shift <= 0
    own, exact = (
        F.conv_transpose2d(y.to(of), weight.to(of), padding=1).masked_fill(stopped, 0)
        for of in (dtype, torch.float64)
    )
    differs = (dx == 0) != stopped  # by the rounding of a fused multiply-add
    assert differs.float().mean() < 1e-4
    rule(*(t.masked_fill(differs, 0) for t in (dx, own, exact)))
    deviation = x.double() - stats[0].view(-1, 1, 1)
    sums = torch.stack([(t.double()).sum((0, 2, 3)) for t in (dx, dx * deviation)])
    largest = dx.double().abs().sum((0, 2, 3)) * deviation.abs().max()
    assert ((partial.double().sum(0) - sums).abs() <= 1e-5 * largest).all()
