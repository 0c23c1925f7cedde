"""On a GPU (`make gpu`): blocks in training on Triton's kernels at real sizes, every configuration
of the convolutions, the same bits again and from a graph."""

from unittest import mock

import pytest
import torch
from errors import FACTOR, half_ulp, rms
from res_block_cases import Case

import fused_res
from fused_res import reference
from fused_res.dispatch import backends
from fused_res.ops.res_block import res_block

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda"

# Input, and plan of a Case.
BLOCKS = {
    "basic": ((8, 64, 56, 56), ([(3, 1), (3, 1)], None)),
    "basic of many channels": ((16, 512, 7, 7), ([(3, 1), (3, 1)], None)),
    "bottleneck": ((8, 256, 28, 28), ([(1, 1, 64), (3, 1, 64), (1, 1)], None)),
    "projection": ((8, 64, 56, 56), ([(3, 2, 128), (3, 1, 128)], (1, 2, 128))),
    "bottleneck's projection": (
        (4, 256, 28, 28), ([(1, 1, 128), (3, 2, 128), (1, 1, 512)], (1, 2, 512))),
    "single of a small map": ((64, 32, 16, 16), ([(3, 1)], None)),
    "odd": ((5, 13, 15, 17), ([(3, 2, 11), (3, 1, 7)], (1, 2, 7))),
    "nothing added": ((8, 64, 28, 28), ([(1, 1, 32), (3, 2, 48)], False)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_float32():
    """Against float64 TensorFloat-32 is no error of ours."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def triton():
    reason = backends.why_not("bn_act", "triton", DEVICE, torch.float32)
    if reason:
        pytest.skip(reason)


def draw(name, dtype):
    """In float32 with BatchNorm's biases far from zero: a ReLU that rounds to the other side of it
    would move a value by more than all rounding does. In half precision many do, in PyTorch too."""
    shape, plan = BLOCKS[name]
    with torch.device(DEVICE):
        case = Case(plan, dtype, shape, layout=torch.channels_last)
        if dtype == torch.float32:
            for stage in case.branch:
                stage.norm.bias.copy_(9 * torch.randn_like(stage.norm.bias).sign())
        return case


def on_triton(choice, **options):
    """res_block with one choice for every convolution, forward and backward: 0 cuDNN, 1 Triton with
    the configuration that is expected to be the fastest, more: that of CONFIGS; -1 ``conv_halo``
    where it can."""

    def call(x, branch, shortcut, act):
        n = len(branch) + bool(shortcut)
        with mock.patch.object(
            fused_res.dispatch.training_conv, "plan", lambda *_: [choice] * 2 * n
        ):
            y = res_block(x, branch, shortcut, act, backend="triton", **options)
        assert type(y.grad_fn).__name__ == "_ResBlockBackward"
        return y

    return call


def assert_rule(case, choice, act="relu"):
    """By RMS: of so many values the largest error is luck."""
    ours = case.run(on_triton(choice), case.dtype, act)
    theirs = case.run(reference.res_block, case.dtype, act)
    exact = case.run(reference.res_block, torch.float64, act)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        mine, other = rms(a.double() - c), rms(b.double() - c)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert mine <= FACTOR * max(other, half_ulp(c, a.dtype)), (i, mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", [0, 1, -1], ids=["library", "own", "conv_halo"])
@pytest.mark.parametrize("name", BLOCKS)
def test_error_is_within_the_rule(name, choice, dtype):
    assert_rule(draw(name, dtype), choice, "relu_before_add" if "single" in name else "relu")


def configurations(kind):
    """Their choices."""
    from fused_res.kernels.conv_tiles import CONFIGS

    return [2 + i for i, config in enumerate(CONFIGS) if config.kind == kind]


@pytest.mark.parametrize("kind", ["descriptor", "pointer", "exact"])
def test_every_configuration(kind):
    case = draw(
        "odd" if kind == "pointer" else "basic",
        torch.float32 if kind == "exact" else torch.bfloat16,
    )
    for choice in configurations(kind):
        assert_rule(case, choice)


@pytest.mark.parametrize("name", ["basic", "bottleneck's projection", "odd"])
def test_another_run_and_recompute_change_no_bit(name):
    case = draw(name, torch.bfloat16)
    calls = [on_triton(1)] * 5 + [on_triton(1, recompute="last")]
    first, *others = (case.run(call, torch.bfloat16, "relu") for call in calls)
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("choice", [0, 1], ids=["library", "own"])
@pytest.mark.parametrize("name", ["bottleneck", "projection"])
def test_a_step_in_a_graph(name, choice):
    case = draw(name, torch.bfloat16)
    (branch, shortcut), leaves, _ = case.stages(torch.bfloat16)
    x = case.x.to(torch.bfloat16).requires_grad_()
    dy = case.dy.to(torch.bfloat16)

    def step():
        y = on_triton(choice)(x, branch, shortcut, "relu")
        return [y.detach(), *torch.autograd.grad(y, [x, *leaves], dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
