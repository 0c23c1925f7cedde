"""The host code of bn_act's CUDA kernels, run on the CPU by tests/cuda_emulation/host.py: every
mode, layout and plan against fp64 by the 1.5 x rule, its checks, its launches on devices of all
sizes, and what it does where a launch is refused. And faults planted, which must be caught."""

import itertools
import math
import re

import pytest
import torch
from bn_act_cases import LAYOUTS, Case, assert_rule, assert_statistics, parameter_dtype
from cuda_emulation import at_offset
from cuda_emulation.host import PLANS, HostError
from sweeps import sweep

from fused_res import Norm
from fused_res.ops.bn_act import bn_act, unpack_mask
from fused_res.reference import ACTS

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("none", "tensor", "norm")
GPU_SHAPES = [(32, 64, 56, 56), (8, 256, 14, 14), (64, 32, 8, 8), (32, 512, 7, 7), (5, 13, 9, 7),
              (2, 1030, 6, 5), (16, 24, 64, 64)]  # fmt: skip


def spread(t):
    """A copy of ``t`` that has gaps."""
    n, c, h, w = t.shape
    wide = torch.full((n, c, h, w + 3), float("nan"), dtype=t.dtype)
    return wide[..., 1 : w + 1].copy_(t)


PLACES = {
    "dense": torch.clone,
    "an odd address": lambda t: at_offset(t, 1),
    "gaps": spread,
}


@pytest.fixture
def run(host, monkeypatch):
    """What ``Case.run`` gives, by the host code; tensors as ``place`` makes them."""
    host.as_cpu(monkeypatch)

    def call(case, place=torch.clone):
        x, residual, dy = (place(t.to(case.dtype)) for t in (case.x, case.residual, case.dy))
        p = parameter_dtype(case.dtype)
        channels = [None if t is None else t.to(p).clone() for t in case.channels]
        running = [t.to(p).clone() for t in case.running]
        leaves = [x, residual, *filter(lambda t: t is not None, channels)]
        for leaf in leaves:
            leaf.requires_grad_()
        second = Norm(*running[2:], *channels[2:], case.training)
        y = bn_act(
            x, *running[:2], *channels[:2], case.training,
            residual=None if case.kind == "none" else residual,
            residual_norm=second if case.kind == "norm" else None,
            act=case.act, backend="cpu",
        )  # fmt: skip
        y.backward(dy)
        return [y.detach(), x.grad, residual.grad,
                *(None if t is None else t.grad for t in channels), *running]  # fmt: skip

    return call


def draw(shape, *args, **kwargs):
    return [Case(shape, *args, **kwargs) for _ in range(max(1, -(-192 // shape[1])))]


SHAPES = ((3, 192, 2, 8), (2, 193, 3, 5), (40, 200, 1, 1))
MODES = [*itertools.product(LAYOUTS, PLANS, ACTS, (True, False))]


@pytest.mark.parametrize("share", sweep(range(4), quick=[0]))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode(host, run, kind, dtype, share):
    """12 of the 48 modes, which are held to the rule together, for a few numbers are luck."""
    modes = [
        (i, *mode)
        for i, mode in enumerate(MODES)
        if (i // 6 + i % 6 + KINDS.index(kind) + DTYPES.index(dtype)) % 4 == share
    ]
    plans, places = {}, {}
    for i, layout, plan, act, training in modes:
        case = Case(SHAPES[i % 7 % 3], dtype, layout, act, kind, training)
        plans[case], places[case] = plan, (*PLACES.values(),)[i % 5 % 3]

    def by_plan(case):
        host.plan(plans[case])
        return run(case, places[case])

    assert_rule([*plans], by_plan)
    devices = {(launch.device, launch.stream) for launch in host.launches}
    assert devices == {(host.of_tensors, host.stream)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weights(run, dtype):
    for kind in KINDS:
        cases = [
            Case(SHAPES[i % 3], dtype, layout, "relu", kind, training, affine=False)
            for i, (layout, training) in enumerate(itertools.product(LAYOUTS, (True, False)))
        ]
        assert_rule(cases, run)


@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["tensor", "norm"])
def test_each_plan_is_what_was_launched(host, run, layout, kind, plan):
    host.plan(plan)
    assert_rule(draw((4, 64, 8, 8), torch.bfloat16, layout, "relu", kind, True), run)
    kernels = {
        "whole": {"bn_act_fwd_whole", "bn_act_bwd_whole"},
        "cooperative": {"bn_act_fwd_cooperative", "bn_act_bwd_cooperative"},
        "split": {"bn_act_fwd_statistics", "bn_act_fwd_merge", "bn_act_fwd_apply",
                  "bn_act_bwd_sums", "bn_act_bwd_merge", "bn_act_bwd_gradients"},
    }  # fmt: skip
    assert set(host.kernels()) == kernels[plan]


FULL = [shape for shape in GPU_SHAPES if math.prod(shape) < 2**20]  # others take minutes


@pytest.mark.parametrize(
    "shape", sweep([(2, *s[1:]) for s in GPU_SHAPES] + FULL, quick=[(2, 256, 14, 14)])
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shapes_of_the_tests_on_a_gpu(run, shape, layout):
    """With two images, and where that is quick as they are."""
    kind = KINDS[shape[1] % 3]
    assert_rule(draw(shape, torch.bfloat16, layout, "relu", kind, True), run)


@pytest.mark.parametrize("kilobytes", [48, 99, 163, 227])
@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_devices_of_all_sizes(host, run, multiprocessors, kilobytes):
    """What a plan counts on is there, whatever the device: no launch is refused."""
    host.use(host.device(multiprocessors, kilobytes, clusters=False))
    for plan in ("cooperative", "automatic"):
        host.plan(plan)
        kind = "norm" if plan == "cooperative" else "tensor"
        assert_rule(draw((2, 192, 4, 8), torch.float32, "channels_last", "relu", kind, True), run)
    cooperative = [launch for launch in host.launches if launch.cooperative]
    assert all(launch.blocks <= 2 * multiprocessors for launch in cooperative)
    assert bool(cooperative) == (multiprocessors > 1)
    assert all(launch.shared_bytes <= kilobytes << 10 for launch in host.launches)


@pytest.mark.parametrize("function", ["launches", "attributes"])
@pytest.mark.parametrize("kind", ["tensor", "norm"])
def test_a_cooperative_launch_that_is_refused_is_split(host, run, kind, function):
    host.use(host.device(20 + len(kind), number=len(function)))  # which was not asked yet
    host.plan("cooperative")
    if function == "launches":
        host.set(most_together=1)
    else:
        host.refuse("cudaFuncSetAttribute")
    assert_rule(draw((4, 64, 8, 8), torch.float32, "channels_last", "relu", kind, True), run)
    assert "bn_act_fwd_apply" in host.kernels() and "bn_act_bwd_gradients" in host.kernels()
    assert not any(launch.cooperative for launch in host.launches)


def arguments(x, residual=None, second=False, training=True, act="relu", save=True):
    """Of bn_act_fwd, with fresh running statistics."""
    c = x.size(1)

    def norm():
        return [torch.rand(c), torch.rand(c), torch.zeros(c), torch.ones(c)]

    none = [None] * 4
    return [x, *norm(), training, 0.1, 1e-5, residual, second, *(norm() if second else none),
            training, 0.1, 1e-5, ACTS.index(act), save]  # fmt: skip


def backward_arguments(host, kind, training, act="relu", dtype=torch.bfloat16, shape=(3, 32, 4, 5)):
    """Of bn_act_bwd, from a forward call."""
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    forward = arguments(x, None if kind == "none" else residual, kind == "norm", training, act)
    _, mask, stats = host("bn_act_fwd", *forward)
    return [dy, x, forward[1], training, forward[8], forward[9], forward[10], training, stats, mask,
            ACTS.index(act), True, True, True]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=3)], ids=str)
def test_the_gradients_that_are_wanted(host, wanted, training, kind):
    """Each is what it is among all; others are empty, and memory that is not theirs stays."""
    args = backward_arguments(host, kind, training)
    every = host("bn_act_bwd", *args)
    host.launches.clear()
    some = host("bn_act_bwd", *args[:-3], *wanted)
    of = [wanted[i] for i in (0, 2, 2, 1, 2, 2)]
    for name, a, b in zip(of, some, every, strict=True):
        assert torch.equal(a, b) if name else a.numel() == 0
    assert bool(host.launches) == any(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_another_layout_than_x(host, layout, kind):
    """The residual and dy, at any address: the same bits, laid out as x."""
    x, residual, dy = (
        torch.randn(3, 24, 4, 5).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3)
    )
    (other,) = (f for name, f in LAYOUTS.items() if name != layout)
    args = arguments(x, None if kind == "none" else residual, kind == "norm")
    found = []
    for lay in (torch.clone, lambda t: t.contiguous(memory_format=other), spread):
        first = [*args[:3], None, None, *args[5:]]
        if kind != "none":
            first[8] = lay(residual)
        y, mask, stats = host("bn_act_fwd", *first)
        g = host("bn_act_bwd", lay(dy), x, args[1], True, first[8], first[9], first[10], True,
                 stats, mask, 1, True, True, True)  # fmt: skip
        assert y.stride() == x.stride() == g[0].stride() == g[3].stride()
        found.append((y, mask, stats, *g))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_what_is_made_again(host, dtype, layout):
    for shape in ((4, 24, 9, 8), (3, 5, 7, 11)):
        assert_statistics(lambda x: host("bn_act_statistics", x), shape, dtype, layout)
        x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        y, mask, stats = host("bn_act_fwd", *arguments(x))
        again = host("reapply", x, stats)
        assert all(torch.equal(a, b) for a, b in zip(again, (y, mask), strict=True))
        assert torch.equal(unpack_mask(mask, x), y > 0)


@pytest.mark.parametrize("kind", ["tensor", "norm"])
def test_sums_that_are_given(host, kind):
    args = backward_arguments(host, kind, True, dtype=torch.float32)
    found = host("bn_act_bwd", *args)
    dy, x, stats, mask = args[0], args[1], args[8], args[9]
    g = (dy * unpack_mask(mask, x)).double()
    sums = [g.sum((0, 2, 3)), (g * (x.double() - stats[0].view(-1, 1, 1))).sum((0, 2, 3))]
    if kind == "norm":
        shifted = args[4].double() - stats[2].view(-1, 1, 1)
        sums += [g.sum((0, 2, 3)), (g * shifted).sum((0, 2, 3))]
    host.launches.clear()
    again = host("bn_act_bwd", *args, torch.stack(sums))
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert host.kernels() == ["bn_act_bwd_merge", "bn_act_bwd_gradients"]


X = torch.randn(2, 16, 3, 3)
FORWARD_CHECKS = {
    "x must be a non-empty CUDA tensor": dict(x=X[:, 0]),
    "x must be a non-empty CUDA": dict(x=X[:0]),
    "x must be float32, bfloat16 or float16": dict(x=X.double()),
    "act must be 0, 1 or 2": dict(act=3),
    r"weight must have shape \(16,\)": dict(weight=torch.ones(15)),
    "bias must have x's dtype": dict(bias=torch.ones(16, dtype=torch.float16)),
    "weight and bias must both": dict(weight=None),
    "running_mean and running_var must both": dict(running_mean=None),
    "running_mean must be given when": dict(running_mean=None, running_var=None, training=False),
    "expected more than 1 value": dict(x=X[:1, :, :1, :1]),
    "eps must be positive during training, non-negative otherwise, got 0": dict(eps=0.0),
    "eps must be positive during training, non-negative otherwise, got -1": dict(
        eps=-1.0, training=False
    ),
    "residual must have x's shape": dict(residual=X[:1]),
    "residual must have x's shape, dtype": dict(residual=X.half()),
    "residual_norm needs a residual": dict(residual_norm=True),
    "residual_weight must have shape": dict(
        residual=X, residual_norm=True, residual_weight=torch.ones(3)
    ),
    "residual_weight and residual_bias": dict(
        residual=X, residual_norm=True, residual_bias=torch.ones(16)
    ),
}
NAMES = ["x", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
         "residual", "residual_norm", "residual_weight", "residual_bias"]  # fmt: skip


def refused(host, message, name, *args):
    host.launches.clear()
    with pytest.raises(RuntimeError, match=message):
        host(name, *args)
    assert not host.launches


@pytest.mark.parametrize("message", FORWARD_CHECKS)
def test_a_forward_call_that_is_refused(host, message):
    changed = dict(FORWARD_CHECKS[message])
    args = arguments(X)
    args[17] = changed.pop("act", args[17])
    for name, value in changed.items():
        args[NAMES.index(name)] = value
    refused(host, message, "bn_act_fwd", *args)


BACKWARD_CHECKS = {
    "act must be": {10: -1},
    "dy must have x's shape": {0: X},
    "weight must have shape": {2: torch.ones(3)},
    "residual_weight must have shape": {6: torch.ones(3)},
    "residual must have x's shape": {4: X},
    "residual_norm needs a residual": {4: None},
    "sums must be float64": {14: torch.ones(4, 32)},
    "sums must be float64 of": {14: torch.ones(2, 32, dtype=torch.float64)},
    "stats is not what bn_act_fwd": {8: torch.ones(5, 32)},
    "stats is not what": {8: torch.ones(32, 7).T},
    "mask is not what bn_act_fwd": {9: torch.ones(3, dtype=torch.uint8)},
    "mask is not what": {9: torch.empty(0, dtype=torch.uint8)},
}


@pytest.mark.parametrize("message", BACKWARD_CHECKS)
def test_a_backward_call_that_is_refused(host, message):
    args = [*backward_arguments(host, "norm", True), None]
    for place, value in BACKWARD_CHECKS[message].items():
        args[place] = value
    refused(host, message, "bn_act_bwd", *args)


def test_tensors_of_other_devices_are_refused(host):
    other = host.device(20)
    for name in ("weight", "running_var", "residual"):
        args = arguments(X, X + 1)
        host.place(args[NAMES.index(name)], other)
        message = "x's shape, dtype and device" if name == "residual" else "on x's device"
        refused(host, message, "bn_act_fwd", *args)
    args = backward_arguments(host, "norm", True)
    for place, message in ((0, "dy must"), (8, "stats is"), (9, "mask is")):
        t = args[place].clone()
        refused(host, message, "bn_act_bwd", *args[:place], host.place(t, other),
                *args[place + 1 :])  # fmt: skip
    x = X.clone()
    refused(host, "non-empty CUDA tensor", "bn_act_fwd", *arguments(host.place(x, -1)))
    refused(host, "stats is not", "reapply", X, host.place(torch.ones(5, 16), other))
    refused(host, "plan must be -1 to 3", "cuda_plan", 4)


@pytest.mark.parametrize("function", ["cudaDeviceGetAttribute", "cudaLaunchKernelEx"])
def test_an_error_of_the_runtime_is_said(host, function):
    host.use(host.device(number=3))
    host.refuse(function, 101)
    with pytest.raises(RuntimeError, match="CUDA error 101 in"):
        host("bn_act_fwd", *arguments(X))
    host.reset()
    host.use(host.device(number=3))  # which is asked again
    host("bn_act_fwd", *arguments(X))


HUGE = [(1025, 64, 181, 181), (2**31, 3, 1, 1), (1, 2**31 - 1, 2, 1), (3, 1, 2**16, 2**16),
        (2**20, 2**11, 1, 2)]  # fmt: skip


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(host, shape, channels_last):
    """Nothing overflows, and the grids are those that the sizes ask for."""
    host.set(runs=False, fakes=True)
    x = host.fake(shape, channels_last, torch.bfloat16)
    n, c, h, w = shape
    for plan in PLANS:
        host.plan(plan)
        host.launches.clear()
        none = [None] * 4
        y, mask, stats = host(
            "bn_act_fwd", x, *none, True, 0.1, 1e-5, x, False, *none, False, 0.1, 1e-5, 1, True
        )
        last = h * w == 1 or (channels_last and c > 1)  # one channel is in both orders
        runs, run = (n * h * w, c) if last else (n * c, h * w)
        assert (tuple(y.shape), tuple(mask.shape)) == (shape, (runs, -(-run // 8)))
        host("bn_act_bwd", x, x, None, True, None, False, None, False, stats, mask, 1, True, True,
             True)  # fmt: skip
        host("bn_act_statistics", x)
        host("reapply", x, stats)
        columns = -(-c // 8) if last else c
        for launch in host.launches:
            if launch.kernel.endswith("merge"):
                assert launch.blocks == -(-c // 8)
            if launch.kernel.endswith("whole"):
                assert launch.blocks == (-(-columns // 2) if last and columns > 1 else columns)


FAULTS = {
    "no guard": "on device 0, tensors are on",
    "default stream": "is not on the current stream",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_of_guards_and_streams(host, fault):
    args = backward_arguments(host, "norm", True)
    stats = host("bn_act_fwd", *arguments(X))[2]
    host.plant(fault)
    for call in (("bn_act_fwd", *arguments(X)), ("bn_act_bwd", *args),
                 ("bn_act_statistics", X), ("reapply", X, stats)):  # fmt: skip
        with pytest.raises(HostError, match=re.escape(FAULTS[fault])):
            host(*call)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_a_planted_grid_that_is_too_small(host, run, plan):
    host.plan(plan)
    host.plant("smaller grid")
    case = Case((8, 64, 8, 8), torch.float32, "channels_last", "relu", "tensor", True)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_rule([case], run)


def test_a_planted_launch_without_opt_in(host, run):
    """Is refused by the device, and so split."""
    host.use(host.device(number=4))
    host.plan("cooperative")
    host.plant("no opt-in")
    case = Case((64, 64, 28, 28), torch.float32, "channels_last", "relu", "tensor", True)
    host.set(runs=False)
    run(case)
    assert not any(launch.cooperative for launch in host.launches)
    host.reset()
    host.use(host.device(number=5))
    host.set(runs=False)
    host.plan("cooperative")
    run(case)
    assert host.launches[0].cooperative and host.launches[0].shared_bytes > 48 << 10
