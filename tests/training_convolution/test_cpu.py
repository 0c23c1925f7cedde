"""The native convolutions of training on a CPU, in the op res_block: the rule for outputs and every
gradient, where they run, and that sums do not depend on the threads."""

import os
import random
import subprocess
import sys

import pytest
import torch
from errors import rule
from instruction_sets import instruction_set

from fused_res import Norm, reference
from fused_res.dispatch import cpu_rules
from fused_res.ops.res_block import res_block
from fused_res.reference import ConvNorm

pytestmark = pytest.mark.usefixtures("one_thread")


def stage(c, k, size, padding=None, bias=False, contiguous=False, shift=None, training=True):
    weight = torch.randn(k, c, size, size) * (2 / (c * size**2)) ** 0.5
    if not contiguous:
        weight = weight.contiguous(memory_format=torch.channels_last)
    shifts = torch.randn(k) if shift is None else shift * torch.randn(k).sign()
    norm = Norm(torch.zeros(k), torch.ones(k), torch.rand(k) + 0.5, shifts, training)
    padding = size // 2 if padding is None else padding
    extra = torch.randn(k) if bias else None
    return ConvNorm(weight, extra, (1, 1), (padding, padding), (1, 1), 1, norm)


# branch, shortcut, input
BLOCKS = {
    "single": lambda: ([stage(32, 32, 3)], None, (9, 32, 8, 8)),
    "basic, odd": lambda: ([stage(40, 40, 3), stage(40, 40, 3)], None, (3, 40, 13, 11)),
    "channels that fill no panel": lambda: (
        [stage(40, 24, 3), stage(24, 40, 3)], None, (5, 40, 11, 10)),
    "half a panel": lambda: ([stage(16, 16, 3), stage(16, 16, 3)], None, (6, 16, 19, 18)),
    # among so many values one is so near 0 that rounding turns its ReLU: not with such a shift
    "bottleneck": lambda: (
        [stage(203, 24, 1, shift=12), stage(24, 24, 3, shift=12), stage(24, 203, 1, shift=15)],
        None, (8, 203, 36, 36)),
    "projection": lambda: (
        [stage(32, 56, 3), stage(56, 56, 3)], stage(32, 56, 1), (16, 32, 16, 13)),
    "NCHW weights and biases": lambda: (
        [stage(32, 32, 3, bias=True, contiguous=True)], None, (7, 32, 10, 9)),
    "biases before frozen BatchNorms": lambda: (
        [stage(48, 32, 3, bias=True, training=False), stage(32, 48, 3, bias=True, training=False)],
        None, (5, 48, 17, 16)),
    "few pixels a part": lambda: ([stage(128, 128, 3)], None, (1, 128, 18, 16)),
    "many pixels": lambda: ([stage(24, 24, 3)], None, (20, 24, 17, 19)),
    # enough to be taken some at a time, through both gradients
    "many images": lambda: ([stage(32, 40, 3), stage(40, 32, 3)], None, (25, 32, 11, 12)),
    "many images, projection": lambda: (
        [stage(24, 32, 3), stage(32, 32, 3)], stage(24, 32, 1), (40, 24, 9, 10)),
    "weights too large for our gradient": lambda: (
        [stage(192, 176, 3, shift=12), stage(176, 192, 3, shift=15)], None, (4, 192, 17, 18)),
    "nothing added": lambda: ([stage(32, 40, 3), stage(40, 24, 3)], False, (9, 32, 12, 11)),
    "one convolution, nothing added": lambda: ([stage(40, 32, 3)], False, (25, 40, 11, 12)),
    "padding takes away and gives back": lambda: (
        [stage(32, 32, 3, 0), stage(32, 32, 3, 2)], None, (6, 32, 11, 12)),
}  # fmt: skip


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def cast(s, dtype):
    if not s:
        return s
    norm = Norm(*(t.to(dtype, copy=True) if isinstance(t, torch.Tensor) else t for t in s.norm))
    bias = None if s.bias is None else s.bias.to(dtype, copy=True)
    return s._replace(weight=s.weight.to(dtype, copy=True), bias=bias, norm=norm)


def step(run, branch, shortcut, x, dy, act, dtype, frozen=()):
    """Outputs, gradients and running statistics by name."""
    branch, shortcut = [cast(s, dtype) for s in branch], cast(shortcut, dtype)
    inputs = {"x": x.to(dtype, copy=True)}
    for i, s in enumerate([*branch, *([shortcut] if shortcut else [])]):
        named = {"weight": s.weight, "bias": s.bias, "scale": s.norm.weight, "shift": s.norm.bias}
        inputs |= {f"{name} {i}": t for name, t in named.items() if t is not None}
    wanted = {n: t.requires_grad_() for n, t in inputs.items() if n not in frozen}
    y = run(inputs["x"], branch, shortcut, act)
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(dtype))
    out = {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}
    for i, s in enumerate(branch):
        out |= {f"mean {i}": s.norm.running_mean, f"var {i}": s.norm.running_var}
    return out


def ours(x, branch, shortcut, act):
    return res_block(x, branch, shortcut, act, "cpu")


def made(name):
    branch, shortcut, shape = BLOCKS[name]()
    x = image(*shape)
    y = reference.res_block(x, branch, shortcut, "none")
    return branch, shortcut, x, torch.randn_like(y)


# on a map of the bottleneck's size 1x1 convolutions are oneDNN's with AVX2
WITH_AVX2 = [(name, "avx2") for name in BLOCKS if name != "bottleneck"]


@pytest.mark.parametrize(
    ("name", "isa", "act"),
    [(name, "avx512", act) for name in BLOCKS for act in ("relu", "relu_before_add")]
    + [(*pair, "relu") for pair in WITH_AVX2],
)
def test_error_is_within_the_rule(name, isa, act):
    follows_the_rule(isa, *made(name), act)


def follows_the_rule(isa, *args):
    with instruction_set(isa):
        got = step(ours, *args, torch.float32)
    theirs = step(reference.res_block, *args, torch.float32)
    exact = step(reference.res_block, *args, torch.float64)
    kinds = {}
    # a bias before a BatchNorm that trains has no gradient but rounding errors
    nothing = [f"bias {i}" for i, s in enumerate(args[0]) if s.bias is not None and s.norm.training]
    for key in exact:
        if key not in nothing:
            kinds.setdefault(key.split()[0], []).append(key)
    for kind, keys in kinds.items():
        rule(*(torch.cat([r[k].flatten() for k in keys]) for r in (got, theirs, exact)), kind)
    for key in nothing:
        assert got[key].abs().max() < 1e-3 * args[3].numel() ** 0.5


def drawn(draw):
    """A branch and an input of a size at which our convolutions run."""
    channels = [8 * draw.randint(3, 20) for _ in range(3)]
    options = dict(bias=draw.random() < 0.3, contiguous=draw.random() < 0.3)
    options |= dict(training=draw.random() < 0.8, shift=12)  # no ReLU turns by a rounding
    before, between = draw.choice([(1, 1), (1, 1), (0, 2), (2, 0)])
    branch = [
        stage(channels[0], channels[1], 3, before, **options),
        stage(channels[1], channels[2], 3, 1, **options),
        stage(channels[2], channels[0], 3, between, **options),
    ][:: draw.choice([1, 2])]
    if len(branch) == 2:
        branch[1] = stage(channels[1], channels[0], 3, between, **options)
    height, width = draw.randint(3, 30), draw.randint(3, 30)
    pixels = max(256, (4 << 20) // (9 * min(channels) ** 2))  # of the smallest map
    images = pixels // ((height - 2) * (width - 2)) + draw.randint(1, 3)
    return branch, image(images, channels[0], height, width)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    draw = random.Random(seed)
    branch, x = drawn(draw)
    act = draw.choice(["relu", "relu_before_add", "none"])
    args = branch, None, x, torch.randn_like(x), act
    isa = draw.choice(["avx512", "avx2"])
    follows_the_rule(isa, *args)
    with instruction_set(isa):
        assert library_calls(lambda: step(ours, *args, torch.float32)) == 0


def library_calls(run) -> int:
    """oneDNN's convolutions: forward passes, in which alone it calls ops."""
    with torch.profiler.profile() as profile:
        run()
    names = "mkldnn_convolution", "slow_conv2d"  # which of them depends on the threads
    return sum(e.count for e in profile.key_averages() if any(n in e.key for n in names))


@pytest.mark.parametrize(("name", "isa"), [*((name, "avx512") for name in BLOCKS), *WITH_AVX2])
def test_they_run(name, isa):
    args = (*made(name), "relu", torch.float32)
    assert library_calls(lambda: step(reference.res_block, *args)) > 0
    with instruction_set(isa):  # a shortcut of 1x1 on a small map is oneDNN's
        assert library_calls(lambda: step(ours, *args)) == ("projection" in name)


# branch, input
ELSEWHERE = {
    "strides": lambda: (
        [stage(32, 32, 3)._replace(stride=(1, 2)), stage(32, 32, 3)._replace(stride=(1, 2))],
        image(20, 32, 32, 1)),
    "NCHW": lambda: ([stage(32, 32, 3)], torch.randn(9, 32, 8, 8)),
    "few channels": lambda: ([stage(8, 8, 3)], image(32, 8, 16, 16)),
    "small": lambda: ([stage(32, 32, 3)], image(5, 32, 8, 8)),
    "few pixels": lambda: ([stage(128, 128, 3)], image(3, 128, 9, 9)),
    "5x5": lambda: ([stage(32, 32, 5)], image(9, 32, 8, 8)),
    "dilation": lambda: (
        [stage(32, 32, 3)._replace(dilation=(2, 2), padding=(2, 2))], image(9, 32, 8, 8)),
    "groups": lambda: ([stage(32, 64, 3)._replace(groups=2)], image(9, 64, 8, 8)),
    "padding of one dimension": lambda: (
        [stage(32, 32, 3)._replace(padding=(0, 1)), stage(32, 32, 3)._replace(padding=(2, 1))],
        image(9, 32, 8, 8)),
    "channels not by eight": lambda: ([stage(36, 36, 3)], image(9, 36, 12, 12)),
    "1x1 on a small map": lambda: ([stage(96, 24, 1), stage(24, 96, 1)], image(16, 96, 32, 32)),
    "large 1x1": lambda: ([stage(512, 512, 1)], image(4, 512, 32, 32)),
    "large, few pixels": lambda: ([stage(176, 176, 3)], image(5, 176, 14, 14)),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_onednn_runs(name):
    branch, x = ELSEWHERE[name]()
    args = branch, None, x, torch.randn_like(x), "relu", torch.float32
    calls = library_calls(lambda: step(reference.res_block, *args))
    assert library_calls(lambda: step(ours, *args)) == calls > 0
    for key, value in step(reference.res_block, *args).items():
        torch.testing.assert_close(step(ours, *args)[key], value, rtol=1e-3, atol=1e-3)


def test_onednn_runs_1x1_of_few_channels():
    x = image(32, 96, 32, 32)
    args = [stage(96, 16, 1), stage(16, 96, 1)], None, x, torch.randn_like(x), "relu", torch.float32
    calls = library_calls(lambda: step(reference.res_block, *args))
    assert library_calls(lambda: step(ours, *args)) == calls > 0


@pytest.mark.parametrize("name", ["single", "bottleneck"])
def test_in_plain_code_onednn_runs(name):
    args = (*made(name), "relu", torch.float32)
    calls = library_calls(lambda: step(reference.res_block, *args))
    with instruction_set("plain"):
        assert library_calls(lambda: step(ours, *args)) == calls


@pytest.mark.parametrize("name", [*BLOCKS, *ELSEWHERE, "few pixels after a stride"])
def test_large_maps_are_one_call_where_native_kernels_run(name, monkeypatch):
    monkeypatch.setattr(cpu_rules, "MOST_ELEMENTS_OF_BLOCK", 0)
    if name in BLOCKS:
        branch, shortcut, shape = BLOCKS[name]()
        x = image(*shape)
    elif name in ELSEWHERE:
        (branch, x), shortcut = ELSEWHERE[name](), None
    else:
        branch = [stage(32, 32, 3)._replace(stride=(2, 2)), stage(32, 32, 3), stage(32, 32, 3)]
        shortcut, x = stage(32, 32, 1)._replace(stride=(2, 2)), image(4, 32, 16, 16)
    y = res_block(x.requires_grad_(), branch, shortcut, backend="cpu")
    assert ("_ResBlock" in y.grad_fn.name()) == (name in BLOCKS)


@pytest.mark.parametrize(
    "name",
    [
        "bottleneck",
        "few pixels a part",
        "many pixels",
        "many images",
        "biases before frozen BatchNorms",
    ],
)
@pytest.mark.parametrize("act", ["relu", "relu_before_add"])
def test_the_same_for_any_number_of_threads(name, act):
    """With more of them than a weight's gradient has parts too."""
    args = (*made(name), act, torch.float32)
    args[3][0, :, 0, 0], args[3][-1, :, -1, -1] = 1e12, -1e12  # double's sums have an order too
    results = []
    for threads in (1, 2, 3, 40, 1):
        torch.set_num_threads(threads)
        results.append(step(ours, *args))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("name", ["basic, odd", "many images"])
@pytest.mark.parametrize("frozen", [{"x"}, {"weight 0"}, {"x", "weight 0", "scale 0", "shift 0"}])
def test_frozen_parts(name, frozen):
    args = (*made(name), "relu", torch.float32)
    whole, some = step(ours, *args), step(ours, *args, frozen=frozen)
    assert some.keys() == whole.keys() - frozen
    for key, value in some.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_are_not_lost():
    branch, shortcut, x, dy = made("single")
    x[2, 3, 4, 5] = float("nan")
    got = step(ours, branch, shortcut, x, dy, "relu", torch.float32)
    assert got["y"].isnan().any() and got["weight 0"].isnan().any()


INFINITIES = """
import torch
from fused_res import Norm
from fused_res.ops.res_block import res_block
from fused_res.reference import ConvNorm

torch.manual_seed(0)

def last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)

norm = Norm(torch.zeros(32), torch.ones(32), None, None, False)
weight = last(32, 32, 3, 3).requires_grad_()
x, dy = last(2, 32, 34, 34), last(2, 32, 34, 34)
x[0, 3, 4, 5] = dy[1, 5, 8, 9] = float("inf")
stage = ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, norm)
y = res_block(x.requires_grad_(), [stage], act="none", backend="cpu")
dx, dweight = torch.autograd.grad(y, (x, weight), dy)
print(*(bool(t.isnan().any()) for t in (y[:, 6:], dx[:, 6:], dweight[6])))
"""


@pytest.mark.parametrize(("limit", "some"), [("0", False), ("2", True)])
def test_the_setting_limits_winograd(limit, some):
    """Its sums and differences make NaN of an infinity; oneDNN's convolutions do not."""
    run = subprocess.run(
        [sys.executable, "-c", INFINITIES], capture_output=True, text=True,
        env={**os.environ, "FUSED_RES_WINOGRAD": limit},
    )  # fmt: skip
    assert run.stdout.split() == 3 * [str(some)], run.stderr
