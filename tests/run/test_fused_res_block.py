"""FusedResBlock against the plain block it stands for, under all that PyTorch does to a block."""

import contextlib
import copy
import math
import operator
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn as nn
from agreement import agree, outcome, randomise
from functorch.compile import make_boxed_func
from hypothesis import HealthCheck, given, settings
from model_libraries import torchvision
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fused_res
from fused_res import FusedResBlock
from fused_res.reference import KINDS, RELUS, SKIPS, ResBlock

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
needs_kernels = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)
BACKENDS = [pytest.param("cpu", marks=needs_kernels), "eager"]


pytestmark = pytest.mark.usefixtures("one_thread")


def pair(*args, backend=None, dtype=None, **kwargs):
    """(ours, theirs): the same parameters and statistics in both."""
    theirs = randomise(ResBlock(*args, **kwargs)).to(dtype or torch.float32)
    ours = FusedResBlock(*args, backend=backend, **kwargs).to(dtype or torch.float32)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def image(channels, size=11, batch=4, layout="nchw", dtype=torch.float32):
    return torch.randn(batch, channels, size, size + 2, dtype=dtype).to(
        memory_format=FORMATS[layout]
    )


def same_layout(a, b):
    for layout in FORMATS.values():
        assert a.is_contiguous(memory_format=layout) == b.is_contiguous(memory_format=layout)


def close(a: dict, b: dict, digits=9):
    """Equal to so many digits: for fp64, where only the dataflow can differ."""
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(
            a[name], b[name], rtol=10.0**-digits, atol=10.0**-digits, equal_nan=True, msg=name
        )


def equal(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)


def check(args, kwargs, layout="nchw", context=contextlib.nullcontext):
    """The rule, in training and eval, and the same shape, dtype and memory format out."""
    runs = {True: [], False: []}
    for _ in range(7):
        ours, theirs = pair(*args, **kwargs)
        exact = copy.deepcopy(theirs).double()
        x = image(args[0], layout=layout)
        for mode, found in runs.items():
            with context():
                a, b = outcome(ours, x, mode), outcome(theirs, x, mode)
            assert a["output"].dtype == b["output"].dtype
            same_layout(a["output"], b["output"])
            found.append((a, b, outcome(exact, x.double(), mode)))
    for mode, found in runs.items():
        agree(*map(list, zip(*found, strict=True)), what=f"train={mode}")


SELECTION = {
    "basic": ((8, 8), {}),
    "basic stride": ((6, 10, 2), {}),
    "basic wide": ((6, 6), {"width": 9}),
    "basic projection where identity would do": ((6, 6), {"skip": "projection"}),
    "basic bias": ((6, 6), {"bias": True}),
    "basic groups": ((8, 8), {"groups": 2, "dilation": 2}),
    "basic relu before": ((6, 6), {"relu": "before"}),
    "basic relu none": ((6, 10, 2), {"relu": "none"}),
    "basic dropout": ((6, 6), {"dropout": 0.3}),
    "basic concat": ((6, 5), {"skip": "concat"}),
    "basic concat relu after": ((6, 5), {"skip": "concat", "relu": "after"}),
    "bottleneck": ((16, 16), {"kind": "bottleneck"}),
    "bottleneck stride": ((8, 16, 2), {"kind": "bottleneck", "width": 6}),
    "bottleneck groups": ((16, 16), {"kind": "bottleneck", "width": 8, "groups": 4}),
    "bottleneck relu before": ((8, 12), {"kind": "bottleneck", "relu": "before"}),
    "bottleneck concat dropout": ((8, 8), {"kind": "bottleneck", "skip": "concat", "dropout": 0.5}),
    "single": ((7, 7), {"kind": "single"}),
    "single projection": ((7, 9, 2), {"kind": "single", "bias": True}),
    "single relu after": ((7, 7), {"kind": "single", "relu": "after"}),
    "plain": ((6, 6), {"kind": "plain"}),
    "plain projection": ((6, 9, 2), {"kind": "plain", "relu": "none"}),
    "plain concat": ((6, 5), {"kind": "plain", "skip": "concat"}),
    "stride three": ((6, 6, 3), {}),
    "no affine": ((6, 10, 2), {"affine": False}),
    "cumulative statistics": ((6, 10, 2), {"momentum": None}),
    "no running statistics": ((6, 10, 2), {"track_running_stats": False}),
    "eps and momentum": ((6, 6), {"eps": 0.1, "momentum": 0.7}),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", SELECTION)
def test_within_the_rule(name, layout):
    check(*SELECTION[name], layout=layout)


@st.composite
def configurations(draw):
    kind, skip = draw(st.sampled_from(KINDS)), draw(st.sampled_from(SKIPS))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    c_in = groups * draw(st.integers(1, 4))
    stride = 1 if skip != "projection" else draw(st.integers(1, 3))
    c_out = c_in if skip == "identity" else groups * draw(st.integers(1, 4))
    return (c_in, c_out, stride), {
        "kind": kind,
        "skip": skip,
        "groups": groups,
        "dilation": draw(st.integers(1, 3)),
        "width": groups * draw(st.integers(1, 4)),
        "bias": draw(st.sampled_from((None, True, False))),
        "relu": draw(st.sampled_from(RELUS)),
        "dropout": draw(st.sampled_from((0.0, 0.0, 0.4))),
        "affine": draw(st.booleans()),
        "track_running_stats": draw(st.booleans()),
        "momentum": draw(st.sampled_from((0.1, None, 0.9))),
    }


@needs_kernels
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(configurations(), st.sampled_from(sorted(FORMATS)), st.booleans(), st.integers(1, 9))
def test_any_configuration(configuration, layout, train, size):
    """The kernels in fp64: every combination of arguments, to eight digits."""
    args, kwargs = configuration
    ours, theirs = pair(*args, backend="cpu", dtype=torch.float64, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = image(args[0], size, 3, layout, torch.float64)
    a, b = outcome(ours, x, train), outcome(theirs, x, train)
    close(a, b, 8)


# --- the arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs, args, kwargs",
    [
        (lambda B, D: B.BasicBlock(4, 4), (4, 4), {}),
        (lambda B, D: B.BasicBlock(4, 8, 2, D(4, 8, 2)), (4, 8, 2), {}),
        (lambda B, D: B.Bottleneck(16, 4), (16, 16), {"kind": "bottleneck"}),
        (lambda B, D: B.Bottleneck(8, 4, 2, D(8, 16, 2)), (8, 16, 2), {"kind": "bottleneck"}),
        (
            lambda B, D: B.Bottleneck(16, 4, groups=2, base_width=128),
            (16, 16),
            {"kind": "bottleneck", "groups": 2, "width": 16},
        ),
        (
            lambda B, D: B.Bottleneck(16, 4, dilation=2),
            (16, 16),
            {"kind": "bottleneck", "dilation": 2},
        ),
    ],
)
@pytest.mark.parametrize("cls", [FusedResBlock, ResBlock])
def test_torchvisions_blocks(theirs, args, kwargs, cls):
    """Keys, checkpoints both ways, and the same numbers: for the reference as well."""

    def downsample(c_in, c_out, stride):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    theirs = randomise(theirs(torchvision.models.resnet, downsample)).double()
    ours = cls(*args, **kwargs).double()
    # torchvision registers downsample among the last, which only the order of keys can tell
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = image(args[0], dtype=torch.float64)
    for train in (True, False):
        close(outcome(ours, x, train), outcome(theirs, x, train))
    types = {type(m) for m in ours.modules() if any(True for _ in m.parameters(recurse=False))}
    assert types == {nn.Conv2d, nn.BatchNorm2d}


@pytest.mark.parametrize(
    "args, kwargs, names",
    [
        ((0, 4), {}, ["in_channels"]),
        ((4, -1), {}, ["out_channels"]),
        ((4, 4.0), {}, ["out_channels"]),
        ((4, 4, 0), {}, ["stride"]),
        ((4, 4, 1.5), {}, ["stride"]),
        ((4, 4), {"groups": 0}, ["groups"]),
        ((4, 4), {"groups": 3}, ["groups"]),
        ((8, 8), {"kind": "bottleneck", "width": 5, "groups": 2}, ["groups"]),
        ((4, 4), {"dilation": 0}, ["dilation"]),
        ((4, 4), {"kind": "preact"}, ["kind"]),
        ((4, 4), {"skip": "conv"}, ["skip"]),
        ((4, 4), {"relu": "first"}, ["relu"]),
        ((4, 8), {"skip": "identity"}, ["skip", "in_channels", "out_channels"]),
        ((4, 4, 2), {"skip": "identity"}, ["skip", "stride"]),
        ((4, 4, 2), {"skip": "concat"}, ["skip", "stride"]),
        ((4, 4), {"dropout": 1.5}, ["dropout"]),
        ((4, 4), {"dropout": -0.1}, ["dropout"]),
        ((4, 4), {"width": 0}, ["width"]),
        ((4, 4), {"width": 4.5}, ["width"]),
        ((4, 4), {"backend": "gpu"}, ["backend"]),
    ],
)
def test_illegal_arguments_are_named(args, kwargs, names):
    with pytest.raises(ValueError) as caught:
        FusedResBlock(*args, **kwargs)
    assert all(name in str(caught.value) for name in names)


def unavailable():
    names = [n for n, reason in fused_res.dispatch.backends.STATUS.items() if reason]
    return names or [pytest.param("", marks=pytest.mark.skip(reason="every backend is available"))]


@pytest.mark.parametrize("name", unavailable())
def test_unavailable_backend_raises_with_the_reason(name):
    reason = fused_res.dispatch.backends.STATUS[name]
    with pytest.raises(fused_res.BackendUnavailable) as caught, fused_res.backend(name):
        pass
    assert name in str(caught.value) and reason in str(caught.value)
    with pytest.raises(fused_res.BackendUnavailable) as caught:
        FusedResBlock(4, 4, backend=name)(image(4))
    assert name in str(caught.value) and reason in str(caught.value)
    with pytest.raises(ValueError, match="abacus"), fused_res.backend("abacus"):
        pass


@pytest.mark.parametrize("name", SELECTION)
def test_kill_switch_is_the_reference_bit_for_bit(name):
    args, kwargs = SELECTION[name]
    ours, theirs = pair(*args, **kwargs)
    x = image(args[0])
    with fused_res.backend("eager"):
        for train in (True, False):
            equal(outcome(ours, x, train), outcome(theirs, x, train))


# --- training ------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("kind, skip", [("basic", "projection"), ("bottleneck", "identity")])
@pytest.mark.parametrize("trained", ["x", "convs", "norms", "bn1", "conv2", "all but x", "weights"])
def test_requires_grad_subsets(kind, skip, trained):
    ours, theirs = pair(8, 8, kind=kind, skip=skip, backend="cpu", dtype=torch.float64)
    wanted = {
        "x": lambda n: False,
        "convs": lambda n: "conv" in n or "downsample.0" in n,
        "norms": lambda n: "bn" in n or "downsample.1" in n,
        "bn1": lambda n: n.startswith("bn1"),
        "conv2": lambda n: n.startswith("conv2"),
        "all but x": lambda n: True,
        "weights": lambda n: n.endswith("weight"),
    }[trained]
    x = image(8, dtype=torch.float64).requires_grad_(trained == "x")
    for train in (True, False):
        found = []
        for block in (ours, theirs):
            block.train(train).zero_grad()
            for name, p in block.named_parameters():
                p.requires_grad_(wanted(name))
            x.grad = None
            block(x).square().sum().backward()
            grads = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
            found.append(grads if x.grad is None else grads | {"x": x.grad})
        close(*found)
        assert found[0]


@pytest.mark.parametrize("eager_norm", ["bn1", "bn2", "downsample.1"])
def test_one_frozen_norm(eager_norm):
    """A norm in eval mode inside a block that trains: running statistics, trainable weights."""
    ours, theirs = pair(6, 10, 2, dtype=torch.float64)
    x = image(6, dtype=torch.float64)
    for block in (ours, theirs):
        block.train().get_submodule(eager_norm).eval()
    before = theirs.get_submodule(eager_norm).running_mean.clone()
    close(outcome(ours, x, None), outcome(theirs, x, None))
    assert torch.equal(ours.get_submodule(eager_norm).running_mean, before)


@pytest.mark.parametrize(
    "name", ["basic", "basic stride", "bottleneck stride", "single", "basic concat"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_autocast(name, dtype, layout):
    """Same dtypes out as PyTorch's; error against fp64 by the rule under the same autocast."""
    context = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    check(*SELECTION[name], layout=layout, context=context)


def test_grad_scaler_skips_a_step_with_inf():
    pairs = pair(6, 10, 2)
    states = []
    numbers = [image(6), image(6), image(6)]
    for block in pairs:
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        states.append([])
        for i, x in enumerate(numbers):
            before = [p.detach().clone() for p in block.parameters()]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = block(x).float().square().mean() * (math.inf if i == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(p, q) for p, q in zip(before, block.parameters(), strict=True)]
            assert not any(moved) if i == 1 else any(moved)
            states[-1].append((scaler.get_scale(), block.bn1.num_batches_tracked.item()))
    assert states[0] == states[1] == [(2048.0, 1), (1024.0, 2), (2048.0, 3)]


@needs_kernels
@pytest.mark.parametrize("name", ["basic stride", "bottleneck", "single", "basic concat", "plain"])
def test_steps_track_the_reference(name):
    args, kwargs = SELECTION[name]
    blocks = pair(*args, backend="cpu", dtype=torch.float64, **kwargs)
    optimizers = [torch.optim.AdamW(b.parameters(), 1e-2) for b in blocks]
    for _ in range(6):
        x = image(args[0], dtype=torch.float64)
        for block, optimizer in zip(blocks, optimizers, strict=True):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            optimizer.step()
    close(*(dict(b.state_dict()) for b in blocks), digits=6)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "single"])
def test_one_value_per_channel_raises_as_pytorch(kind):
    ours, theirs = pair(4, 4, kind=kind)
    x = torch.randn(1, 4, 1, 1)
    messages = []
    for block in (ours, theirs):
        with pytest.raises(ValueError) as caught:
            block(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["basic stride", "bottleneck", "single", "basic concat", "plain"])
@pytest.mark.parametrize("train", [True, False])
def test_zero_size_batch(name, train):
    args, kwargs = SELECTION[name]
    ours, theirs = pair(*args, **kwargs)
    x = image(args[0], batch=0)
    equal(outcome(ours, x, train), outcome(theirs, x, train))


@needs_kernels
def test_saves_fewer_bytes_than_pytorch():
    """Saved for backward on a bottleneck: at least 15 % under PyTorch's own."""

    def saved(block):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = image(64, 16, 4, "channels_last").requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x).sum()
        return sum(kept.values())

    ours, theirs = pair(64, 64, kind="bottleneck", width=16)
    theirs.relu.inplace = True  # as torchvision has it
    assert saved(ours) <= 0.85 * saved(theirs)


# --- what PyTorch does to a module ---------------------------------------------------------------


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["basic stride", "bottleneck", "basic dropout"])
def test_copies(copied, name):
    args, kwargs = SELECTION[name]
    ours, _ = pair(*args, backend="eager", **kwargs)
    other = copied(ours)
    assert type(other) is FusedResBlock and other.backend == "eager"
    assert not {id(p) for p in ours.parameters()} & {id(p) for p in other.parameters()}
    x = image(args[0])
    equal(outcome(other, x), outcome(ours, x))


def test_hooks_on_the_block():
    ours, theirs = pair(6, 6, dtype=torch.float64)
    found = []
    for block in (ours, theirs):
        calls = []
        block.register_forward_pre_hook(lambda m, a, c=calls: c.append("pre") or (a[0] * 2,))
        block.register_forward_hook(lambda m, a, out, c=calls: c.append("forward") or out * 3)
        block.register_full_backward_pre_hook(lambda m, g, c=calls: c.append("bpre") or (g[0] * 4,))
        block.register_full_backward_hook(
            lambda m, gi, go, c=calls: c.append("back") or (gi[0] * 5,)
        )
        torch.manual_seed(2)
        found.append((calls, outcome(block, image(6, dtype=torch.float64))))
    assert found[0][0] == found[1][0] == ["pre", "forward", "bpre", "back"]
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("where", ["bn2", "relu", "downsample", "downsample.1", "conv1"])
def test_hooks_on_a_child_fire(where):
    ours, theirs = pair(6, 10, 2, dtype=torch.float64)
    found = []
    for block in (ours, theirs):
        calls = []
        block.get_submodule(where).register_forward_hook(
            lambda m, a, out, c=calls: c.append(1) or out * 3
        )
        torch.manual_seed(2)
        found.append((calls, outcome(block, image(6, dtype=torch.float64))))
    assert found[0][0] == found[1][0] and found[0][0]
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["basic stride", "bottleneck", "basic dropout"])
def test_checkpoint(name, reentrant):
    """Bitwise the gradients without it; statistics move twice, as PyTorch's do."""
    args, kwargs = SELECTION[name]
    ours, theirs = pair(*args, **kwargs)
    x = image(args[0])
    without = outcome(copy.deepcopy(ours), x)
    a, b = (
        outcome(block, x, call=lambda t, block=block: checkpoint(block, t, use_reentrant=reentrant))
        if not reentrant
        else reentrant_outcome(block, x)
        for block in (ours, theirs)
    )
    for key in a:
        if key.startswith("gradient") or key == "output":
            assert torch.equal(a[key], without[key]), key
        elif "num_batches" in key:
            assert a[key] == b[key]
        else:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)


def reentrant_outcome(block, x):
    """As ``outcome``, by ``backward()``: reentrant checkpoints need that."""
    block.train().zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        out = checkpoint(block, x, use_reentrant=True)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(5678), dtype=torch.float64)
    out.backward(dy.to(out))
    grads = {"x": x.grad} | {n: p.grad for n, p in block.named_parameters()}
    result = {"output": out.detach()} | {f"gradient of {n}": g for n, g in grads.items()}
    return result | dict(block.named_buffers())


def of_everything(block, x):
    """``block`` as a function of input and parameters; buffers are copied each time."""
    names = [n for n, _ in block.named_parameters()]

    def f(x, *values):
        buffers = {n: b.clone() for n, b in block.named_buffers()}
        return functional_call(block, dict(zip(names, values, strict=True)) | buffers, (x,))

    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    return f, (x.clone().requires_grad_(), *values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((2, 2), {}),
        ((2, 3, 2), {"bias": True}),
        ((4, 4), {"kind": "bottleneck", "width": 2}),
        ((3, 3), {"kind": "single"}),
        ((2, 2), {"skip": "concat"}),
        ((2, 3), {"relu": "none"}),
        ((2, 3), {"relu": "before"}),
        ((2, 3, 2), {"affine": False}),
    ],
    ids=str,
)
def test_first_and_second_derivatives(args, kwargs, train, backend):
    ours, _ = pair(*args, backend=backend, dtype=torch.float64, **kwargs)
    ours.train(train)
    f, values = of_everything(ours, torch.randn(2, args[0], 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(f, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, values, fast_mode=True)


@needs_kernels
@pytest.mark.parametrize("train", [True, False])
def test_gradcheck_in_full(train):
    ours, _ = pair(2, 3, 2, backend="cpu", dtype=torch.float64)
    f, values = of_everything(ours.train(train), torch.randn(2, 2, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(f, values)
    assert torch.autograd.gradgradcheck(f, values)


def test_gradient_penalty_within_the_rule():
    """A second derivative in fp32, through auto: the gradient of the gradient's norm."""
    runs = []
    for _ in range(6):
        ours, theirs = pair(6, 10, 2)
        x = image(6)
        draw = []
        for block in (ours, theirs, copy.deepcopy(theirs).double()):
            inputs = x.to(block.conv1.weight.dtype).requires_grad_()
            out = block(inputs)
            (gx,) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            parameters = dict(block.named_parameters())
            grads = torch.autograd.grad(gx.square().sum(), list(parameters.values()))
            named = {f"gradient of {n}": g for n, g in zip(parameters, grads, strict=True)}
            draw.append({"output": out.detach()} | named)
        runs.append(draw)
    agree(*map(list, zip(*runs, strict=True)))


def test_functional_call():
    _, theirs = pair(6, 10, 2, dtype=torch.float64)
    other, _ = pair(6, 10, 2, dtype=torch.float64)
    x = image(6, dtype=torch.float64)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    before = {k: v.clone() for k, v in other.state_dict().items()}
    expected = theirs(x)
    torch.testing.assert_close(functional_call(other, state, (x,)), expected, rtol=1e-9, atol=1e-9)
    equal(dict(other.state_dict()), before)  # its own statistics stay; those handed over move
    close(state, dict(theirs.state_dict()))


# --- torch.func and forward AD: what cannot be served runs the reference -------------------------


def both(f, **kwargs):
    """``f`` of ours and of the reference gives the same numbers, in fp32, which has kernels."""
    ours, theirs = pair(4, 6, 2, **kwargs)
    a, b = f(ours), f(theirs)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("train", [True, False])
def test_vmap(train):
    x = torch.randn(3, 2, 4, 5, 5)
    both(lambda block: torch.func.vmap(block.train(train))(x), track_running_stats=not train)


@pytest.mark.parametrize("train", [True, False])
def test_jvp(train):
    x, v = torch.randn(2, 2, 4, 5, 5).unbind()
    stats = {"track_running_stats": not train}
    both(lambda block: torch.func.jvp(block.train(train), (x,), (v,)), **stats)


@pytest.mark.parametrize("train", [True, False])
def test_forward_ad(train):
    x, v = torch.randn(2, 2, 4, 5, 5).unbind()

    def f(block):
        with torch.autograd.forward_ad.dual_level():
            out = block.train(train)(torch.autograd.forward_ad.make_dual(x, v))
            return tuple(torch.autograd.forward_ad.unpack_dual(out))

    both(f, track_running_stats=not train)


def test_forward_ad_of_a_parameter():
    x = torch.randn(2, 4, 5, 5)

    def f(block):
        block.eval()
        with torch.autograd.forward_ad.dual_level():
            for name in ("bn1.weight", "downsample.1.bias"):
                p = block.get_parameter(name)
                dual = torch.autograd.forward_ad.make_dual(p.detach(), torch.ones_like(p))
                owner = block.get_submodule(name.rpartition(".")[0])
                delattr(owner, name.rpartition(".")[2])
                setattr(owner, name.rpartition(".")[2], dual)
            return tuple(torch.autograd.forward_ad.unpack_dual(block(x)))

    both(f)


@pytest.mark.parametrize("transform", ["grad", "per sample", "hessian of a norm"])
def test_func(transform):
    x = torch.randn(3, 4, 5, 5)

    def f(block):
        block.eval()
        parameters = {n: p.detach() for n, p in block.named_parameters()}

        def loss(parameters, x):
            return functional_call(block, parameters, (x,)).square().sum()

        if transform == "grad":
            return torch.func.grad(loss)(parameters, x)
        if transform == "per sample":
            each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
            return each(parameters, x.unsqueeze(1))
        return torch.func.hessian(lambda w: loss(parameters | {"bn1.weight": w}, x))(
            parameters["bn1.weight"]
        )

    both(f)


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["basic stride", "bottleneck", "single", "basic concat", "no affine"]
)
@pytest.mark.parametrize("layout", FORMATS)
def test_compile(name, layout, fresh_compiler):
    args, kwargs = SELECTION[name]
    ours, _ = pair(*args, **kwargs)
    plain = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = image(args[0], layout=layout)
    for train in (True, False):
        close(outcome(ours.train(train), x, train, call=compiled), outcome(plain, x, train), 4)
    for key, b in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], b, msg=key)


@needs_kernels
def test_compile_keeps_the_fused_op(fresh_compiler):
    seen = []

    def look(graph, inputs):
        # the forward is an argument of auto_functionalized, since it updates running statistics
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        seen.extend(f"{n.target} {n.args[:1]}" for n in calls if n.target is not operator.getitem)
        return make_boxed_func(graph.forward)

    ours, _ = pair(6, 10, 2)
    compiled = torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    compiled(image(6)).sum().backward()
    for op in ("bn_act_fwd", "bn_act_bwd"):
        assert sum(op in call for call in seen) == 2  # one a norm, the projection's with the last
    assert not any("batch_norm" in call for call in seen)


def test_no_recompiles(fresh_compiler):
    """Steps of one shape compile once; after the second batch size no other compiles again."""
    ours, _ = pair(6, 10, 2)
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def step(batch):
        optimizer.zero_grad()
        compiled(image(6, batch=batch)).square().mean().backward()
        optimizer.step()

    step(4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            step(4)
    step(6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (5, 8, 3, 4):
            step(batch)


@needs_kernels
def test_compile_with_inductor(fresh_compiler):
    runs = []
    ours, theirs = pair(6, 10, 2)
    exact = copy.deepcopy(theirs).double()
    compiled = torch.compile(ours, fullgraph=True)
    for _ in range(6):
        x = image(6)
        a = outcome(ours, x, call=compiled)
        runs.append((a, outcome(theirs, x), outcome(exact, x.double())))
    agree(*map(list, zip(*runs, strict=True)))


def test_compiled_graphs_on_disk_are_of_these_ops(tmp_path):
    """The key of torch.compile's caches changes with the ops' files and keeps a user's tag."""
    show = "import fused_res, torch.compiler.config as c; print(c.cache_key_tag)"
    package = Path(fused_res.__file__).parent
    shutil.copytree(package, tmp_path / "fused_res", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "kernels", tmp_path / "kernels")

    def tag(folder):
        run = [sys.executable, "-c", show]
        environ = dict(os.environ, TORCH_COMPILE_CACHE_KEY_TAG="mine", PYTHONPATH=str(folder))
        return subprocess.run(
            run, cwd=folder, env=environ, check=True, capture_output=True, text=True
        ).stdout.strip()

    first = tag(tmp_path)
    assert first.startswith("mine+fused_res-") and first == tag(package.parent)
    with open(tmp_path / "fused_res" / "ops" / "bn_act.py", "a") as file:
        file.write("# another\n")
    assert tag(tmp_path) not in ("mine", first)


def test_meta_and_fake_tensors():
    block = FusedResBlock(6, 10, 2, device="meta")
    assert block(torch.empty(2, 6, 9, 9, device="meta")).shape == (2, 10, 5, 5)
    ours, _ = pair(6, 10, 2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ours(mode.from_tensor(image(6, 9))).shape == (4, 10, 5, 6)
