"""On a GPU (`make gpu`): conv_bn_act at real sizes, every configuration, blocks, graphs."""

import pytest
import torch
from conv_bn_act_cases import assert_rule, to
from conv_bn_act_gpu_cases import CALLS, image

from fused_res import FusedResBlock, backend, reference
from fused_res.dispatch import backends
from fused_res.ops.conv_bn_act import conv_bn_act

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
