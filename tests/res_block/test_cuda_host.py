"""The host code of whole blocks on CUDA, run on the CPU by tests/cuda_emulation/host.py: forward
and backward by the 1.5 x rule, every gradient asked for alone, counters, modules; its checks and
its launches. And faults planted, which must be caught."""

import collections

import pytest
import torch
from cuda_emulation.host import PLANS, HostError
from errors import FACTOR, half_ulp, rms
from res_block_cases import PLANS as BLOCKS
from res_block_cases import Case
from torch import nn

import fused_res
from fused_res import reference
from fused_res.dispatch import training_block
from fused_res.ops import res_block as op
from fused_res.reference import ACTS

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# those of the tests on a GPU, with smaller maps and fewer channels
SIZES = {"single": (8, 16, 7, 7), "projection": (6, 24, 8, 8), "nothing added": (5, 13, 15, 17)}


def whole(recompute=False, counters=()):
    """A function that runs a block by these ops, whatever its size."""

    def call(x, branch, shortcut, act):
        given = training_block.Call(x, branch, shortcut, act, recompute)
        y = op._run_as(
            given, training_block.CANDIDATES["cpu"], [*counters], torch.is_grad_enabled()
        )
        assert y is not None
        return y

    return call


@pytest.fixture
def block(host, monkeypatch):
    host.as_cpu(monkeypatch)
    return host


def assert_rule(cases, act, **options):
    """By RMS, of all cases and stages together: where a ReLU rounds to the other side of zero, the
    largest error is luck. By kind of result, each relative to its size."""
    errors = collections.defaultdict(list)
    for case in cases:
        ours, theirs, exact = (
            case.run(call, dtype, act)
            for call, dtype in ((whole(**options), case.dtype), (reference.res_block, case.dtype),
                                (reference.res_block, torch.float64))
        )  # fmt: skip
        stages = len(case.branch) + bool(case.shortcut)
        of_stage = (len(ours) - 2) // stages - 2  # gradients
        kinds = ["y", "dx", *list(range(of_stage)) * stages, *["mean", "var"] * stages]
        for kind, a, b, c in zip(kinds, ours, theirs, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            size, floor = rms(c), half_ulp(c, a.dtype)
            errors[kind].append([rms(a.double() - c) / size,
                                 max(rms(b.double() - c), floor) / size])  # fmt: skip
    for kind, found in errors.items():
        mine, other = torch.tensor(found).square().mean(0).sqrt()
        assert mine <= FACTOR * other, (kind, mine, other)


def draw(name, dtype, layout="channels_last", **options):
    """With biases far from zero, so that few ReLUs round to the other side of it."""
    size = SIZES.get(name if isinstance(name, str) else "", (6, 16, 7, 9))
    case = Case(name, dtype, size, layout=LAYOUTS[layout], **options)
    for stage in (*case.branch, *([case.shortcut] if case.shortcut else [])):
        stage.norm.bias.copy_(9 * torch.randn_like(stage.norm.bias).sign())
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_within_the_rule(block, layout, name, dtype):
    """In training and not, kept or computed again; acts and plans of launches in turn."""
    turn = [*BLOCKS].index(name) + DTYPES.index(dtype)
    block.plan(PLANS[turn % 4])
    for training, recompute in ((True, False), (True, True), (False, False)):
        cases = [draw(name, dtype, layout, training=training) for _ in range(2)]
        assert_rule(cases, ACTS[turn % 3], recompute=recompute)
    where = {(launch.device, launch.stream) for launch in block.launches}
    assert where == {(block.of_tensors, block.stream)}


@pytest.mark.parametrize("options", [dict(bias=True), dict(groups=4)], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_convolutions_of_all_kinds(block, options, act):
    for name in ("bottleneck", ([(3, 2, 8, (1, 2), 2), ((3, 1), 1, 16)], False)):
        if options.get("groups") and name != "bottleneck":
            continue
        assert_rule([draw(name, torch.float32, **options)], act)


def arguments(case, act="relu", recompute=False):
    """x, a call, and its parameters."""
    (branch, shortcut), *_ = case.stages(case.dtype)
    call, parameters = op._flatten(branch, shortcut, act, [], recompute, None)
    parameters = [t if t is None else t.detach() for t in parameters]
    return case.x.to(case.dtype), call, parameters


def forward(host, case, act="relu", recompute=False, save=True, **changed):
    x, call, parameters = arguments(case, act, recompute)
    call = call._replace(**changed)
    result = host("res_block_fwd", x, parameters, *call[:6], save, recompute)
    return x, call, parameters, result


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["bottleneck", "projection", "nothing added"])
def test_each_gradient_alone(host, name, recompute):
    """Is what it is among all, and nothing is computed for the others."""
    case = draw(name, torch.bfloat16, bias=True)
    x, call, parameters, (_, *saved) = forward(host, case, "relu", recompute)
    stages = len(call.numbers) // 2
    dy = case.dy.to(case.dtype)

    def backward(needs):
        return host("res_block_bwd", dy, x, parameters, saved, call.integers, call.shortcut,
                    call.act, recompute, needs)  # fmt: skip

    every = backward(2 ** (1 + 3 * stages) - 1)
    of_x = len(every) - 4 * stages
    assert of_x == (1 if name == "nothing added" else 2)
    names = [0] * of_x + [1 + 3 * s + bit for s in range(stages) for bit in (0, 1, 2, 2)]
    for bit in range(1 + 3 * stages):
        expected = [t for t, of in zip(every, names, strict=True) if of == bit]
        found = backward(1 << bit)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    host.launches.clear()
    assert backward(0) == [] and not host.launches


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_keeps_nothing(host, name):
    case = draw(name, torch.bfloat16, training=False)
    *_, (y, *_) = forward(host, case)
    *_, result = forward(host, case, save=False)
    assert len(result) == 1 and torch.equal(result[0], y)


def test_counters(host):
    """One launch adds to all of them, with a thread for each: no two threads write to one."""
    case = draw("bottleneck", torch.float32)
    first, second = torch.tensor(3), torch.tensor([2**40])
    forward(host, case, counters=[first, second, first])
    assert (first, second) == (5, 2**40 + 1)
    launch = host.launches[0]
    assert (launch.kernel, launch.blocks, launch.threads) == ("res_block_fwd_count", 1, 2)
    with pytest.raises(RuntimeError, match="at most 32 BatchNorms that train"):
        forward(host, case, counters=[first] * 33)
    assert first == 5


def test_blocks_that_do_not_fit_are_left_alone(host):
    """For the caller to run stage by stage: nothing is done."""
    case, other = draw("basic", torch.float32), host.device(20)
    x, call, parameters = arguments(case)
    weight, norm = parameters[0], parameters[2]

    def run(x=x, counters=(), place=None, value=None, integers=call.integers, **changed):
        given = list(parameters)
        if place is not None:
            given[place] = value
        values = call._replace(counters=[*counters], integers=integers, **changed)
        return host("res_block_fwd", x, given, *values[:6], True, False)

    n = call.integers
    for result in (
        run(x=x[:0]), run(x=x[0]), run(x=x[:, :8]), run(x=x.half()), run(x=x[..., :0]),
        run(counters=[torch.zeros(1)]), run(counters=[torch.zeros(2, dtype=torch.long)]),
        run(counters=[host.place(torch.tensor(1), other)]),
        run(place=0, value=weight.half()), run(place=0, value=weight[0]),
        run(place=0, value=host.place(weight.clone(), other)),
        run(place=1, value=torch.zeros(16, dtype=torch.float16)),
        run(place=2, value=norm[:8]), run(place=2, value=norm.double()), run(place=2, value=None),
        run(place=3, value=host.place(norm.clone(), other)),
        run(integers=[0, *n[1:]]), run(integers=[2, 2, *n[2:]]), run(integers=[*n[:6], 0, *n[7:]]),
        run(integers=[*n[:4], 90, *n[5:]]), run(numbers=[0.1, 0.0, *call.numbers[2:]]),
    ):  # fmt: skip
        assert result == []
    assert not host.launches and len(run()) == 6
    lists = "the lists of a block have 4 parameters"
    for changed in (dict(running=call.running[1:]), dict(numbers=call.numbers[1:]),
                    dict(integers=n[1:]), dict(numbers=[])):  # fmt: skip
        with pytest.raises(RuntimeError, match=lists):
            run(**changed)
    with pytest.raises(RuntimeError, match="a convolution must have a weight"):
        run(place=4, value=None)
    *_, saved = forward(host, case)
    with pytest.raises(RuntimeError, match="saved is not what forward returned"):
        host("res_block_bwd", case.dy.float(), x, parameters, saved[2:], n, 0, 1, False, 1)


def test_an_error_of_a_convolution_is_said(host):
    """Of ATen, with its message; of the runtime, after which nothing is left behind."""
    case = draw("one convolution, nothing added", torch.float32)
    x, call, parameters = arguments(case)
    host.use(host.device(number=1))
    host.refuse("cudaLaunchKernelEx", 2)
    with pytest.raises(RuntimeError, match="CUDA error 2 in"):
        forward(host, case)
    host.reset()
    padding = [*call.integers[:2], 2**22, 2**22, *call.integers[4:]]
    with pytest.raises(RuntimeError, match=r"memory|convolution"):
        host("res_block_fwd", x, parameters, call.running, [], padding, *call[3:6], True, False)
    assert not host.launches


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("kind", ["single", "basic", "bottleneck"])
def test_modules_train(block, monkeypatch, kind, momentum):
    """Three steps as PyTorch's modules make them: momentum None is the mean of all batches."""
    monkeypatch.setattr(op, "whole_block_pays", lambda *_: True)
    ours = fused_res.FusedResBlock(16, 32, 2, kind=kind, backend="cpu")
    theirs = reference.ResBlock(16, 32, 2, kind=kind)
    theirs.load_state_dict(ours.state_dict())
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    for _ in range(3):
        x = torch.randn(4, 16, 8, 8)
        results = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            grads = torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))
            results.append([y.detach(), *grads, *(t.clone() for t in module.buffers())])
        assert type(y) is torch.Tensor
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert ("res_block_fwd_count" in block.kernels()) == (momentum is not None)


FAULTS = {"no guard": "on device 0, tensors are on", "default stream": "not on the current stream"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(host, fault):
    case = draw("projection", torch.float32)
    x, call, parameters, (y, *saved) = forward(host, case)
    host.plant(fault)
    with pytest.raises(HostError, match=FAULTS[fault]):
        forward(host, case, counters=[torch.tensor(0)])
    with pytest.raises(HostError, match=FAULTS[fault]):
        host("res_block_bwd", y, x, parameters, saved, *call[2:3], call.shortcut, 1, False, 1)


def test_a_planted_grid_that_is_too_small(block):
    block.plant("smaller grid")
    with pytest.raises((AssertionError, RuntimeError)):
        assert_rule([draw("basic", torch.float32)], "relu")
