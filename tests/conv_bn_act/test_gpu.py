"""On a GPU (`make gpu`): conv_bn_act at real sizes, every configuration, blocks, graphs."""

import pytest
import torch
import torch.nn.functional as F
from conv_bn_act_cases import assert_rule, to
from errors import rule

from fused_res import FusedResBlock, backend, reference
from fused_res.dispatch import backends
from fused_res.dispatch.inference_conv import IMPLEMENTATIONS
from fused_res.ops.conv_bn_act import Call, conv_bn_act
from fused_res.reference import ConvNorm, Norm

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_float32():
    """Against float64 TensorFloat-32 is no error of ours."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    reason = backends.why_not("conv_bn_act", request.param, "cuda", torch.float32)
    if reason:
        pytest.skip(reason)
    return request.param


def image(*shape):
    return torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last)


def stage(c, k, size, stride=1, dilation=1, groups=1, bias=False):
    weight = torch.randn(k, c // groups, size, size, device="cuda")
    weight *= (2 * groups / (c * size**2)) ** 0.5
    per_channel = [torch.rand(k, device="cuda") + low for low in (-0.5, 0.3, 0.5, -0.5)]
    return ConvNorm(
        weight.contiguous(memory_format=torch.channels_last),
        torch.randn(k, device="cuda") if bias else None,
        (stride, stride),
        (dilation * (size // 2),) * 2,
        (dilation, dilation),
        groups,
        Norm(*per_channel),
    )


CALLS = {
    "64 3x3": lambda: dict(x=image(32, 64, 56, 56), conv=stage(64, 64, 3)),
    "64 3x3 residual": lambda: dict(
        x=image(8, 64, 56, 56), conv=stage(64, 64, 3), residual=image(8, 64, 56, 56)),
    "256 3x3 of a small map": lambda: dict(
        x=image(8, 256, 14, 14), conv=stage(256, 256, 3), residual=image(8, 256, 14, 14)),
    "512 3x3 of a 7x7 map": lambda: dict(
        x=image(16, 512, 7, 7), conv=stage(512, 512, 3), residual=image(16, 512, 7, 7)),
    "one image": lambda: dict(x=image(1, 512, 7, 7), conv=stage(512, 512, 3)),
    "1x1": lambda: dict(
        x=image(8, 64, 56, 56), conv=stage(64, 256, 1), residual=image(8, 256, 56, 56)),
    "1x1 of many channels": lambda: dict(x=image(8, 2048, 7, 7), conv=stage(2048, 512, 1)),
    "stride 2": lambda: dict(x=image(8, 128, 56, 56), conv=stage(128, 128, 3, 2)),
    "stride 2, odd": lambda: dict(x=image(8, 64, 15, 13), conv=stage(64, 72, 3, 2)),
    "projection": lambda: dict(
        x=image(8, 64, 28, 28), conv=stage(64, 256, 1), residual=image(8, 128, 56, 56),
        shortcut=stage(128, 256, 1, 2, bias=True)),
    "projection of a basic block": lambda: dict(
        x=image(8, 128, 28, 28), conv=stage(128, 128, 3), residual=image(8, 64, 56, 56),
        shortcut=stage(64, 128, 1, 2)),
    "concat": lambda: dict(
        x=image(8, 64, 14, 14), conv=stage(64, 64, 3), residual=image(8, 48, 14, 14),
        concat=True),
    "ReLU before the add": lambda: dict(
        x=image(64, 32, 16, 16), conv=stage(32, 32, 3), residual=image(64, 32, 16, 16),
        act="relu_before_add"),
    "dilation": lambda: dict(x=image(4, 64, 20, 20), conv=stage(64, 64, 3, 1, 2)),
    "groups": lambda: dict(x=image(4, 64, 20, 20), conv=stage(64, 128, 3, 1, 1, 4)),
    "depthwise": lambda: dict(x=image(4, 96, 20, 20), conv=stage(96, 96, 3, 1, 1, 96)),
    "stem": lambda: dict(x=image(4, 3, 224, 224), conv=stage(3, 64, 7, 2)),
    "odd channels": lambda: dict(x=image(5, 13, 9, 7), conv=stage(13, 37, 3, bias=True)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_error_is_within_the_rule(name, call, dtype):
    with torch.no_grad():
        calls = [call() for _ in range(4)]
        assert_rule(calls, dtype, lambda **given: conv_bn_act(**given, backend=name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_configuration_of_tritons(call, dtype):
    reason = backends.why_not("conv_bn_act", "triton", "cuda", dtype)
    if reason:
        pytest.skip(reason)
    from fused_res.kernels import conv_bn_act as kernels

    calls = [call() for _ in range(2)]
    rounded = to(calls[0], dtype, torch.float32)
    with torch.no_grad():
        for config in kernels.candidates(**rounded):
            assert_rule(calls, dtype, lambda c=config, **given: kernels.forward(**given, config=c))


# Calls that conv_halo takes: of tiles of several images, of more tiles than blocks, of all ends.
HALO_CALLS = {
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
@pytest.mark.parametrize("call", HALO_CALLS.values(), ids=HALO_CALLS)
def test_conv_halo(conv_halo, monkeypatch, call, dtype, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    with torch.no_grad():
        assert_rule([call() for _ in range(2)], dtype, conv_halo)
        given = to(call(), dtype, torch.float32)
        first = conv_halo(**given)
        assert all(torch.equal(first, conv_halo(**given)) for _ in range(5))


def test_conv_halo_in_a_cuda_graph(conv_halo):
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
def test_conv_halo_in_training(conv_halo, shape, dtype):
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


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_blocks_and_graphs_follow_their_weights(name, kind):
    block = FusedResBlock(64, 128, 2, kind=kind, backend=name).cuda().eval()
    block = block.to(memory_format=torch.channels_last)
    x = image(4, 64, 20, 20)
    with torch.no_grad():
        block(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(x)
        for _ in range(3):
            graph.replay()
            with backend("eager"):
                twin = reference.ResBlock(64, 128, 2, kind=kind).cuda().eval()
                twin.load_state_dict(block.state_dict())
                expected = twin(x)
            torch.testing.assert_close(captured, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(block(x), expected, rtol=1e-3, atol=1e-3)
            for p in block.parameters():  # in place, and uncounted
                p.data.mul_(1.25)
            x.mul_(0.5)


def test_the_same_on_every_run(name):
    call = CALLS["256 3x3 of a small map"]()
    with torch.no_grad():
        first = conv_bn_act(**call, backend=name)
        assert all(torch.equal(first, conv_bn_act(**call, backend=name)) for _ in range(20))
