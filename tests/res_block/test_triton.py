"""A block in training on Triton's kernels, run by Triton's interpreter: the rule for every plan and
kind of convolution, statistics, what is launched, bounds; and that these checks catch planted
faults."""

import importlib.util
import itertools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from errors import FACTOR, half_ulp, rms
from res_block_cases import Case

import fused_res
from fused_res import FusedResBlock, Norm, backend, reference
from fused_res.dispatch import backends
from fused_res.ops.res_block import res_block
from fused_res.reference import ACTS, ConvNorm

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on a GPU here: make gpu", allow_module_level=True)

from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_traffic import Traffic

from fused_res.kernels import bn_act_bwd, bn_act_fwd, conv_tiles, launch
from fused_res.kernels import res_block as walk
from fused_res.kernels import training_convolution as kernels

HALVES = [torch.bfloat16, torch.float16]
CHANNELS_LAST = torch.channels_last
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends.STATUS, "triton", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "triton", ("cpu",))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN, or bits, until it is written."""

    def poison(allocate):
        def allocated(*args, **kw):
            t = allocate(*args, **kw)
            return t.fill_(float("nan") if t.is_floating_point() else 0xAA)

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    """So that a few tiles are several rounds."""
    monkeypatch.setattr(conv_tiles, "gpu", lambda device: (1, True))


# Input, and plan of a Case. Channels in sixteens are for the descriptor kernel, as are even maps in
# steps of 2; the rest is for the pointer kernel.
DESCRIPTOR, POINTER = (
    f"_training_convolution_fwd_bwd_{kind}_kernel" for kind in ("descriptor", "pointer")
)
BLOCKS = {
    "single": ((3, 16, 5, 6), ([(3, 1)], None)),
    "basic": ((2, 32, 6, 5), ([(3, 1, 16), (3, 1)], None)),
    "bottleneck": ((3, 48, 5, 4), ([(1, 1, 16), (3, 1, 32), (1, 1)], None)),
    "projection": ((2, 16, 8, 6), ([(3, 2, 32), (3, 1, 48)], (1, 2, 48))),
    "projection of an odd map": ((2, 16, 7, 5), ([(1, 1), (3, 2), (1, 1, 24)], (1, 2, 24))),
    "1x1 in steps of 2": ((2, 32, 8, 6), ([(1, 2), (3, 1), (1, 1)], (1, 2))),
    "odd channels": ((3, 13, 7, 6), ([(3, 2, 11), (3, 1, 7)], (1, 2, 7))),
    "one channel": ((3, 1, 4, 5), ([(3, 1), (3, 1)], None)),
    "one pixel": ((40, 16, 1, 1), ([(1, 1), (3, 1)], None)),
    "dilation": ((2, 16, 7, 6), ([(3, 1, 16, 2, 2), (3, 1, 16, (3, 1), (3, 1))], None)),
    "dilation in steps of 2": ((2, 16, 9, 8), ([(3, 2, 16, 2, 2), (3, 1)], (1, 2))),
    "5x5, 3x3 shortcut": ((2, 16, 8, 6), ([(5, 2), (1, 1)], (3, 2))),
    "steps of 3": ((2, 16, 10, 8), ([(3, 3), (3, 1)], (1, 3))),
    "oblong": ((2, 16, 7, 6), ([((3, 1), (2, 1)), ((1, 3), 1)], (1, (2, 1)))),
    "padding": ((2, 16, 5, 6), ([(1, 1, 16, 1), (3, 1, 16, 0)], None)),
    "an identity in steps of 2": ((6, 16, 3, 3), ([(1, 2, 16, 1)], None)),
    "odd identity": ((2, 13, 5, 4), ([(3, 1)], None)),
    "many pixels": ((4, 16, 13, 11), ([(3, 1), (1, 1)], None)),
    "many channels": ((2, 16, 4, 5), ([(1, 1, 208), (1, 1)], None)),
    "nothing added": ((2, 32, 6, 5), ([(1, 1, 16), (3, 1, 32)], False)),
    "nothing added, odd channels": ((3, 13, 7, 6), ([(3, 2, 11), (3, 1, 9)], False)),
    "one convolution, nothing added": ((2, 16, 8, 6), ([(3, 2, 32)], False)),
}


def nearest(case, act):
    """How near the argument of a ReLU of the block comes to 0."""
    found = [float("inf")]

    def bn_act(x, norm, residual=None, second=None, act="relu"):
        before = (x, norm) if act == "relu_before_add" else (x, norm, residual, second)
        if act != "none":
            found.append(reference.bn_act(*before, act="none").abs().min().item())
        return reference.bn_act(x, norm, residual, second, act)

    with torch.no_grad():
        stages, _, _ = case.stages(torch.float64)
        reference.res_block(case.x, *stages, act, bn_act)
    return min(found)


def steady(case):
    """BatchNorm's biases are such that rounding moves no ReLU."""

    def moved(stage):
        side = torch.where(torch.rand(len(stage.weight)) < 0.7, 9.0, -9.0).double()
        return stage._replace(norm=stage.norm._replace(bias=side))

    case.branch = [moved(stage) for stage in case.branch]


def draw(name, dtype=torch.float32, act="relu", **options):
    """A block whose ReLUs are on one side of zero in every dtype: of float32 with any pattern, of
    halves with one pattern for a channel."""
    shape, plan = BLOCKS[name]
    while True:
        case = Case(plan, dtype, shape, layout=CHANNELS_LAST, **options)
        if dtype != torch.float32:
            steady(case)
        if nearest(case, act) > (3e-5 if dtype == torch.float32 else 0.3):
            return case


# Of each stage, forward and backward: see Choice in kernels/res_block.py.
PLANS = {
    "library": lambda n: [0, 0] * n,
    "own": lambda n: [1, 1] * n,
    "forward": lambda n: [1, 0] * n,
    "backward": lambda n: [0, 1] * n,
    "first": lambda n: [1, 1] + [0, 0] * (n - 1),
    "last": lambda n: [0, 0] * (n - 1) + [1, 1],
    "in turn": lambda n: ([1, 0, 0, 1] * n)[: 2 * n],
}


def on_triton(plan="own", **options):
    """res_block by a plan: one of the above, or a choice for all."""
    make = PLANS.get(plan, lambda n: [plan] * 2 * n)

    def call(x, branch, shortcut, act):
        n = len(branch) + bool(shortcut)
        with mock.patch.object(fused_res.dispatch.training_conv, "chosen_for", lambda *_: make(n)):
            y = res_block(x, branch, shortcut, act, backend="triton", **options)
        assert type(y.grad_fn).__name__ == "_ResBlockBackward"
        return y

    return call


def assert_rule(cases, act="relu", call=None):
    """By RMS for every result, by largest error over them all, each in units of PyTorch's RMS: of a
    few numbers, and of what is zero but for rounding, either differs from draw to draw by more than
    the rule allows."""
    ours, theirs, exact = (
        [case.run(f, d, act) for case in cases]
        for f, d in (
            (call or on_triton(), cases[0].dtype),
            (reference.res_block, cases[0].dtype),
            (reference.res_block, torch.float64),
        )
    )
    mine, other = [], []
    columns = [list(zip(*way, strict=True)) for way in (ours, theirs, exact)]
    for i, results in enumerate(zip(*columns, strict=True)):
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        assert [t.shape for t in results[0]] == [t.shape for t in results[1]]
        a, b, c = (torch.cat([t.flatten().double() for t in found]) for found in results)
        floor = half_ulp(c, results[0][0].dtype)
        unit = max(rms(b - c), floor)
        if a.numel() >= 16 and rms(c) > 1e-9:  # else it is luck
            assert rms(a - c) <= FACTOR * unit, (i, rms(a - c), rms(b - c), floor)
        mine.append((a - c) / unit)
        other.append((b - c) / unit)
    largest = [torch.cat(errors).abs().max() for errors in (mine, other)]
    assert largest[0] <= FACTOR * largest[1], largest


@pytest.fixture
def launched(monkeypatch):
    """What is launched: (kernel's name, programs, arguments by name)."""
    found = []

    run = launch.run

    def record(kernel, grid, *given, **arguments):
        found.append((kernel.fn.__name__, grid[0], arguments))
        return run(kernel, grid, *given, **arguments)

    monkeypatch.setattr(launch, "run", record)
    return found


def of_convolutions(launched):
    """Those of ``training_convolution``."""
    return [launch for launch in launched if launch[0] in (DESCRIPTOR, POINTER)]


def names(launched):
    return [name for name, *_ in launched]


# --- the rule

BLOCK_ACT_BIAS = list(zip(BLOCKS, itertools.cycle(ACTS), itertools.cycle([True, False])))


@pytest.mark.parametrize(("name", "act", "bias"), BLOCK_ACT_BIAS)
def test_error_is_within_the_rule(launched, name, act, bias):
    draws = 8 if name == "one channel" else 2
    assert_rule([draw(name, act=act, bias=bias) for _ in range(draws)], act)
    ran = set(names(of_convolutions(launched)))
    own = {"odd channels": {POINTER}, "one channel": {POINTER}}
    own |= {"projection": {DESCRIPTOR}, "bottleneck": {DESCRIPTOR}}
    assert ran == own.get(name, ran) and ran


@pytest.mark.parametrize("plan", PLANS)
def test_of_every_plan(launched, plan):
    name, act = ("bottleneck", "relu") if len(plan) % 2 else ("projection", "none")
    assert_rule([draw(name, act=act) for _ in range(2)], act, on_triton(plan))
    assert bool(of_convolutions(launched)) == (plan != "library")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "odd channels"])
def test_of_halves(name, dtype):
    act = "none" if name == "projection" else "relu"
    assert_rule([draw(name, dtype, act, bias=True) for _ in range(2)], act)


def test_a_model_in_bfloat16():
    """Its BatchNorms too."""
    case = draw("basic", torch.bfloat16)
    case.wide = torch.bfloat16
    assert_rule([case])


@pytest.mark.parametrize("frozen", [(0, 1, 2), (0,), (1,), (2,)])
def test_frozen_batchnorms(frozen):
    cases = []
    for _ in range(2):
        case = draw("projection", act="none")
        stages = [*case.branch, case.shortcut]
        for i in frozen:
            stages[i] = stages[i]._replace(norm=stages[i].norm._replace(training=False))
        *case.branch, case.shortcut = stages
        cases.append(case)
    assert_rule(cases, "none")


def test_eps_is_what_pytorch_takes():
    block = FusedResBlock(16, 16, backend="triton").to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 16, 4, 3).contiguous(memory_format=CHANNELS_LAST)
    block.bn2.eps = 0.0
    with pytest.raises(ValueError, match="eps=0.0 must be positive during training"):
        block(x)


def test_batchnorms_without_weights(launched):
    case = draw("bottleneck", act="none")
    case.branch = [s._replace(norm=s.norm._replace(weight=None, bias=None)) for s in case.branch]
    if nearest(case, "none") < 1e-4:
        pytest.fail("another seed")
    assert_rule([case], "none")


@pytest.mark.parametrize("index", range(len(conv_tiles.CONFIGS)))
def test_every_configuration_is_right(launched, index):
    config = conv_tiles.CONFIGS[index]
    exact = config.kind == "exact"
    name = "odd channels" if config.kind == "pointer" else "many channels"
    case = draw(name, torch.float32 if exact else torch.bfloat16)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
        assert_rule([case], call=on_triton(2 + index))
    found = [named for _, _, named in of_convolutions(launched)]
    assert {named["warps"] for named in found} == {config.warps}
    assert {named["stages"] for named in found} == {config.stages}
    assert max(named["BN"] for named in found) == (16 if name == "odd channels" else config.BN)
    for named in found:
        boxed = "TH" in named and named["IMAGES"] * named["TH"] * named["TW"]
        assert (boxed or named["M"]) == config.M


# --- statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [16, 13])
def test_statistics_are_those_of_what_was_rounded(dtype, c):
    """With a mean of 100 deviations, of tiles that are mostly past the end, of several rounds."""
    x = torch.randn(5, c, 9, 7).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(24, c, 3, 3) / (9 * c) ** 0.5
    bias = torch.full((24,), 100, dtype=dtype)
    conv = ConvNorm(weight.to(dtype), bias, (1, 1), (1, 1), (1, 1), 1, Norm())
    kind = "descriptor" if c == 16 else "pointer"
    for config in (config for config in conv_tiles.CONFIGS if config.kind == kind):
        y, partial = kernels.convolve(x, conv, True, config)
        mean, m2, n = partial.double().unbind(1)
        assert (n.sum(0) == 5 * 9 * 7).all()
        merged = (mean * n).sum(0) / n.sum(0)
        spread = (m2 + n * (mean - merged).square()).sum(0)
        values = y.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(merged, values.mean(1), rtol=1e-7, atol=0)
        expected = values.var(1, correction=0) * values.size(1)
        torch.testing.assert_close(spread, expected, rtol=1e-5, atol=0)


def test_running_statistics_of_a_large_mean():
    case = draw("single", act="none", bias=True)
    (stage,) = case.branch
    stage = stage._replace(bias=stage.bias + 100, norm=stage.norm._replace(momentum=1.0))
    case.branch = [stage]
    *_, mean, var = case.run(on_triton(), torch.float32, "none")
    a = torch.conv2d(case.x, stage.weight, stage.bias, padding=1)
    torch.testing.assert_close(mean.double(), a.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), a.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_programs_take_several_tiles(launched):
    assert_rule([draw("many pixels", torch.bfloat16)])
    rounds = [named["tiles"] / programs for _, programs, named in of_convolutions(launched)]
    assert len(rounds) == 4 and min(rounds) > 1 and max(rounds) > 2


# --- the same bits


@pytest.mark.parametrize(
    ("name", "plan", "dtype"),
    [("bottleneck", "own", torch.bfloat16), ("bottleneck", "library", torch.float32),
     ("projection", "in turn", torch.float32), ("single", "own", torch.float16),
     ("odd channels", "own", torch.float32)],
)  # fmt: skip
def test_recompute_and_another_run_change_no_bit(name, plan, dtype):
    shape, convs = BLOCKS[name]
    case = Case(convs, dtype, shape, bias=True, layout=CHANNELS_LAST)
    calls = on_triton(plan), on_triton(plan), on_triton(plan, recompute="last")
    for results in zip(*(case.run(call, dtype, "relu") for call in calls), strict=True):
        assert torch.equal(*results[:2]) and torch.equal(*results[1:])


# Of a bottleneck's backward pass, where only some of x and the parameters of its stages want a
# gradient: Triton's convolutions, passes after these (which of dx and of what the convolution read
# they write), and weights' gradients.
WANTED = {
    "g3": (0, [], 0),
    "w3": (0, [], 1),
    "b2": (1, [], 0),
    "b2 w3": (1, ["y"], 1),
    "w2": (1, ["dx"], 1),
    "g1": (2, ["dx"], 0),
    "w1 g2": (2, ["dx", "dx"], 1),
    "x": (3, ["dx", "dx"], 0),
    "x w2": (3, ["dx", "dx y"], 1),
    "x w1 g1 b1 w2 g2 b2 w3 g3 b3": (3, ["dx y", "dx y"], 3),
}


def test_only_what_is_wanted(launched, monkeypatch):
    """Every gradient is the same, bit by bit, whichever others are wanted, and what is not needed
    for them is not computed."""
    case = draw("bottleneck")
    every = ["x", *(f"{letter}{i}" for i in (1, 2, 3) for letter in "wgb")]
    weights, backward = [], walk.aten_backward

    def library(*args):
        weights.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(walk, "aten_backward", library)
    found = {}
    for wanted in [" ".join(every), *WANTED]:
        stages, leaves, _ = case.stages(torch.float32)
        tensors = dict(zip(every, [case.x.float(), *leaves], strict=True))
        for name, t in tensors.items():
            t.requires_grad_(name in wanted.split())
        y = on_triton()(tensors["x"], *stages, "relu")
        launched.clear()
        weights.clear()
        leaves = [tensors[name] for name in wanted.split()]
        grads = torch.autograd.grad(y, leaves, case.dy.float())
        for name, grad in zip(wanted.split(), grads, strict=True):
            assert torch.equal(found.setdefault(name, grad), grad), (wanted, name)
        passes = [
            " ".join(name for name in ("dx", "y") if named[name] is not None)
            for kernel, _, named in launched
            if kernel == "_bn_act_bwd_reapply_kernel"
        ]
        own = names(launched).count(DESCRIPTOR)
        computed = [flags for flags in weights if any(flags)]
        assert (own, passes, len(computed)) == WANTED[wanted], wanted
        assert all(flags == (False, True, False) for flags in computed)


# --- what a call may be


def test_float32_is_rounded_only_where_pytorch_says_so(launched):
    for name, allowed, kernel in (
        ("basic", True, DESCRIPTOR),
        ("basic", False, POINTER),
        ("odd channels", True, POINTER),
        ("odd channels", False, POINTER),
    ):
        launched.clear()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            case = draw(name)
            case.run(on_triton(), torch.float32, "relu")
        convolutions = of_convolutions(launched)
        own = [(n, named.get("PRECISION", "tf32")) for n, _, named in convolutions]
        assert set(own) == {(kernel, "tf32" if allowed else "ieee")}


def to_tf32(t):
    bits = t.permute(0, 2, 3, 1).contiguous().view(torch.int32)
    bits = bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF  # to the nearest, ties to even
    return bits.view(torch.float32).permute(0, 3, 1, 2)


def test_tf32_is_rounded_where_it_is_multiplied_and_nowhere_else(monkeypatch):
    """As GPUs are told to, because their tensor cores would cut it off. Triton 3.6 has no such
    descriptors: see ``test_float32_in_descriptors``."""
    if "round_f32_to_tf32" not in TensorDescriptor.__dataclass_fields__:
        pytest.skip("Triton before 3.7 rounds nothing where it is loaded")
    monkeypatch.setattr(conv_tiles, "ROUND", {"round_f32_to_tf32": True})
    x, a, dy = (torch.randn(2, c, 8, 6).to(memory_format=CHANNELS_LAST) for c in (16, 16, 32))
    for size, stride in ((3, 1), (3, 2), (1, 2)):
        weight = torch.randn(32, 16, size, size).to(memory_format=CHANNELS_LAST)
        pads = (size // 2,) * 2
        conv = ConvNorm(weight, None, (stride,) * 2, pads, (1, 1), 1, Norm())
        y, _ = kernels.convolve(x, conv, False)
        expected = torch.conv2d(to_tf32(x), to_tf32(weight), None, stride, pads)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(y)
        dx, _ = kernels.input_gradient(dy, conv, (8, 6), kernels.Epilogue(kernels.ADD, other=a))
        if size == 1:  # of pixels that the convolution did not read nothing is said
            dx, expected = dx[:, :, ::2, ::2], a[:, :, ::2, ::2]
        else:
            expected = a
        of_conv = torch.nn.grad.conv2d_input(x.shape, to_tf32(weight), to_tf32(dy), stride, pads)
        of_conv = of_conv[:, :, ::2, ::2] if size == 1 else of_conv
        torch.testing.assert_close(dx, expected + of_conv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layouts", ["input", "weights", "all", "first weight", "gradient"])
def test_of_any_layout(launched, layouts):
    """What is not channels_last is cuDNN's; a convolution may change the layout."""
    cases = []
    for _ in range(4):
        case = Case(([(3, 1)] * 3, None), torch.float32, (2, 4, 5, 4), layout=CHANNELS_LAST)
        steady(case)
        stages = [s._replace(weight=s.weight.contiguous()) for s in case.branch]
        if layouts in ("weights", "all"):
            case.branch = stages
        if layouts == "first weight":
            case.branch[0] = stages[0]
        if layouts in ("input", "all", "first weight"):
            case.x = case.x.contiguous()
        if layouts == "gradient":
            case.dy = case.dy.contiguous()
        cases.append(case)
    assert_rule(cases)
    assert bool(of_convolutions(launched)) == (layouts != "all")


def test_gradients_that_are_expanded():
    case = draw("basic")
    case.dy = torch.ones(1, 1, 1, 1).double().expand(case.dy.shape)
    assert_rule([case])


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_autocast(launched, kind):
    block, twin = FusedResBlock(16, 32, 2, kind=kind), reference.ResBlock(16, 32, 2, kind=kind)
    twin.load_state_dict(block.state_dict())
    exact = reference.ResBlock(16, 32, 2, kind=kind).double()
    exact.load_state_dict(block.state_dict())
    x = torch.randn(4, 16, 8, 8).to(memory_format=CHANNELS_LAST)
    results = []
    for m in (block.to(memory_format=CHANNELS_LAST), twin, exact):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=m is not exact), backend("triton"):
            y = m(leaf)
        leaves = [leaf, *m.parameters()]
        results.append([y, *torch.autograd.grad(y.double().square().mean(), leaves)])
    assert of_convolutions(launched)
    mine, other = 0.0, 0.0
    for a, b, c in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float32)
        mine += rms(a.double() - c) / rms(c)
        other += rms(b.double() - c) / rms(c)
    assert mine <= FACTOR * other


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, of infinity times 0
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_what_is_not_finite_reaches_all_that_it_reaches_in_pytorch(where, value):
    """So GradScaler sees it."""
    for name in ("bottleneck", "odd channels"):
        case = draw(name)
        getattr(case, where)[1, 2, 1, 2] = value
        ours, theirs = (
            case.run(f, torch.float32, "relu") for f in (on_triton(), reference.res_block)
        )
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a.isfinite(), b.isfinite()), (name, i)


def test_second_derivatives():
    case = draw("basic")
    results = []
    for call in (on_triton(), reference.res_block):
        stages, leaves, _ = case.stages(torch.float32)
        x = case.x.float().requires_grad_()
        y = call(x, *stages, "relu")
        grads = torch.autograd.grad(y, [x, *leaves], case.dy.float(), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *leaves]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_opcheck(monkeypatch):
    module, found = fused_res.ops.res_block, []
    for name in ("_forward_triton", "_backward_triton"):
        op = getattr(module, name)

        def record(*args, op=op):
            found.append((op, torch.utils._pytree.tree_map(detached, args)))
            return op(*args)

        monkeypatch.setattr(module, name, record)
    case = draw("projection", bias=True)
    case.run(on_triton(recompute="last"), torch.float32, "relu")
    (forward, args), (backward, more) = found
    # as in test_res_block
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, args, test_utils=utils)
    torch.library.opcheck(backward, more)


def detached(t):
    return t.detach().clone() if isinstance(t, torch.Tensor) else t


# --- bounds


@pytest.mark.parametrize(
    ("c", "k", "taps", "stride", "size"),
    [(16, 24, 3, 2, (8, 6)), (16, 32, 1, 2, (7, 5)), (16, 16, 3, 1, (1, 2)), (13, 11, 3, 2, (7, 6)),
     (13, 11, 1, 1, (5, 3)), (16, 16, 5, 3, (7, 4))],
)  # fmt: skip
def test_each_element_is_written_once_and_nothing_else_is_touched(c, k, taps, stride, size):
    weight = torch.randn(k, c, taps, taps).to(memory_format=CHANNELS_LAST)
    conv = ConvNorm(weight, torch.randn(k), (stride,) * 2, (taps // 2,) * 2, (1, 1), 1, None)
    x, a, other = (torch.randn(3, c, *size).to(memory_format=CHANNELS_LAST) for _ in range(3))
    with Traffic() as traffic:
        y, partial = kernels.convolve(x, conv, True)
    assert y.isfinite().all() and partial.isfinite().all()
    assert sum(traffic.written.values()) == y.nbytes + partial.nbytes
    made = x if taps >= stride else x[:, :, ::stride, ::stride]  # the rest is zeros
    mask = torch.randint(256, (3 * size[0] * size[1], (c + 7) // 8)).byte()
    for end in (
        kernels.Epilogue(),
        kernels.Epilogue(kernels.RELU, a=a, stats=torch.randn(5, c)),
        kernels.Epilogue(kernels.ADD, other=other, mask=mask),
        kernels.Epilogue(kernels.ADD, other=other),
    ):
        with Traffic() as traffic:
            dx, partial = kernels.input_gradient(torch.randn_like(y), conv, size, end)
        assert dx.isfinite().all()
        sums = 0 if partial is None else partial.nbytes
        assert sum(traffic.written.values()) == made.numel() * 4 + sums


@pytest.mark.parametrize(("c", "size", "stride"), [(16, 1, 1), (16, 3, 1), (16, 3, 2), (1, 3, 2)])
def test_grids_and_coordinates_are_within_their_limits(monkeypatch, c, size, stride):
    """3 * 2**32 pixels."""
    found = []

    def record(kernel, grid, *_, **arguments):
        found.append((grid[0], arguments))

    monkeypatch.setattr(launch, "run", record)

    def empty(*shape):
        t = torch.zeros(shape, device="meta", dtype=torch.bfloat16)
        return t.to(memory_format=CHANNELS_LAST)

    conv = ConvNorm(empty(c, c, size, size), None, (stride,) * 2, (size // 2,) * 2, (1, 1), 1, None)
    y, _ = kernels.convolve(empty(3, c, 2**15, 2**17), conv, True)
    kernels.input_gradient(y, conv, (2**15, 2**17))
    assert len(found) == 1 + stride**2
    for programs, named in found:
        assert programs < 2**31
        for name, value in named.items():
            if isinstance(value, int) and name not in ("image", "pixels"):
                assert value < 2**31, name
            if name in "xwy" and c == 16:
                assert max(value.shape) < 2**31, name


# --- the checks can fail


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(module, old, new): from here on blocks run with one line of kernels/ changed."""

    def change(module, old, new):
        source = Path(module.__file__).read_text()
        assert source.count(old) == 1, f"{old!r} is in the kernels once"
        source = source.replace("from . ", "from fused_res.kernels ")
        source = source.replace("from .", "from fused_res.kernels.")
        path = tmp_path / "planted.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("planted", path)
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "planted", planted)
        spec.loader.exec_module(planted)
        if module is walk:
            monkeypatch.setattr("fused_res.kernels.res_block", planted)
        else:
            name = "convolutions" if module is kernels else module.__name__.split(".")[-1]
            monkeypatch.setattr(walk, name, planted)
        return planted

    return change


FAULTS = {
    "taps in order": ("single", kernels, "[-d for d in", "[d for d in"),
    "filters not transposed": ("single", kernels, "weight.transpose(0, 1)", "weight"),
    "the next outputs": ("projection", kernels, "-((f + pad) // s)", "-((f + pad) // s + 1)"),
    "a full tile": ("odd channels", kernels, "tl.minimum(M, pixels - m0)", "tl.maximum(M, m0)"),
    "rows past the end": (
        "odd channels",
        kernels,
        "tl.where(inside[:, None], value - origin[None, :], 0.0)",
        "value - origin[None, :]",
    ),
    "pixels past the image": ("basic", kernels, "inside[:, None] & positive", "positive"),
    "deviations from another mean": ("many pixels", kernels, "s1 -= off * s0", "s1 -= 0 * s0"),
    "another origin for each tile": ("many pixels", kernels, "if seen == 0:", "if seen >= 0:"),
    "sums of the next channel": ("basic", kernels, "row + K + k, s1", "row + K + (k + 1) % K, s1"),
    "sums of one part of four": (
        "projection of an odd map",
        kernels,
        "begin += count",
        "begin += 0",
    ),
    "the other side of the ReLU": ("basic", kernels, "<= 0) == 0  #", "<= 0) == 1  #"),
    "not centered": ("basic", kernels, "g * (value - mean)", "g * value"),
    "the next bit": ("single", kernels, "(k % 8)[None, :]) & 1", "((k + 1) % 8)[None, :]) & 1"),
    "bytes of a row": (
        "odd identity",
        kernels,
        "pixel[:, None] * ((K + 7) // 8)",
        "pixel[:, None] * (K // 8)",
    ),
    "all of dy": (
        "single",
        walk,
        "mask = self.mask if self.block.act == _RELU else None",
        "mask = None",
    ),
    "parts of a size": ("basic", bn_act_fwd, "if ROWS == 3:", "if ROWS == 4:"),
    "means that do not differ": (
        "many pixels",
        bn_act_fwd,
        "square + off * off * n",
        "square + 0 * off",
    ),
    "z before the ReLU": ("basic", bn_act_bwd, "tl.where(v <= 0, 0.0, v).to(y.", "v.to(y."),
}


@pytest.mark.parametrize(("name", "module", "old", "new"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(plant, name, module, old, new):
    plant(module, old, new)
    with pytest.raises(AssertionError):
        assert_rule([draw(name)])


def test_a_planted_write_out_of_bounds_is_caught(plant):
    planted = plant(kernels, "inside = m < pixels", "inside = m <= pixels")
    case = draw("odd channels")
    with pytest.raises(InterpreterError, match="OutOfBounds.*_fwd_bwd_pointer"), Traffic():
        planted.convolve(case.x.float(), case.stages(torch.float32)[0][0][0], True)
