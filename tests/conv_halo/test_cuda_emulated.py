"""The CUDA kernel of convolutions of few channels, run on the CPU by tests/cuda_emulation: against
fp64 by the 1.5 x rule, bit by bit under shuffled thread orders, within bounds, without bank
conflicts; for inference and with both epilogues of training. And faults planted in it, which these
checks must catch."""

import os
import shutil
import types

import pytest
import torch
import torch.nn.functional as F
from conv_bn_act_cases import to
from cuda_emulation import EmulationError, at_offset, to_tf32
from cuda_emulation.conv_halo import FEW, LARGE, SMALL, HaloEmulation, device
from cuda_emulation.res_chain import KINDS as PRODUCTS
from errors import rule
from res_chain_cases import image, stage
from sweeps import sweep

from fused_res import reference
from fused_res.dispatch.inference_conv import IMPLEMENTATIONS
from fused_res.ops.conv_bn_act import Call
from fused_res.reference import ACTS, Norm

COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]
DTYPES = dict(
    zip(PRODUCTS, (torch.bfloat16, torch.float16, torch.float32, torch.float32), strict=True)
)
CHANNELS = (8, 16, 24, 40, 64)
MAPS = ((3, 7, 7), (2, 15, 15), (3, 8, 12), (1, 33, 17), (40, 1, 1), (2, 3, 70))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    emulation = HaloEmulation(tmp_path_factory.mktemp("emulation"), COMPILER)
    emulation.count_requests(True)
    return emulation


@pytest.fixture(autouse=True)
def defaults(emulation):
    emulation.device, emulation.tf32, emulation.seed = FEW, False, 0


def draw(products, shape, k, size=3, residual=True, act="relu", **of_stage):
    n, c, h, w = shape
    call = dict(x=image(*shape), conv=stage(c, k, size, **of_stage), act=act)
    if residual:
        call["residual"] = image(n, k, h, w)
    return to(call, DTYPES[products], torch.float32)


def convolved(products, x, weight):
    """What PyTorch's ops are given, as its convolutions on a GPU take float32 as TF32."""
    return (to_tf32(x), to_tf32(weight)) if products == "tf32" else (x, weight)


def results(emulation, products, call):
    """Ours, PyTorch's and the exact one."""
    emulation.tf32 = products == "tf32"
    y = emulation.forward(**call)
    assert not emulation.bank_conflicts()
    x, weight = convolved(products, call["x"], call["conv"].weight)
    theirs = reference.conv_bn_act(**call | dict(x=x, conv=call["conv"]._replace(weight=weight)))
    return y, theirs, reference.conv_bn_act(**to(call, torch.float64, torch.float64))


def check(emulation, products, call):
    y, *others = results(emulation, products, call)
    rule(y, *others)
    return y


def pooled(found):
    """The rule for all of some results: in a small one an error of PyTorch's can be tiny."""
    rule(*(torch.cat([t.flatten() for t in of]) for of in zip(*found, strict=True)))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("k", CHANNELS)
@pytest.mark.parametrize("c", CHANNELS)
def test_error_is_within_the_rule(emulation, c, k, products):
    found = []
    for i, (n, h, w) in enumerate(MAPS):
        size, kind = (1, 3)[(i + c // 8) % 4 > 0], (i + k // 8) % 3
        act, residual, norm = ACTS[(i + c // 8) % 3], kind < 2, kind > 0
        call = draw(products, (n, c, h, w), k, size, residual, act, bias=i % 2 == 0, norm=norm)
        found.append(results(emulation, products, call))
    pooled(found)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("size", [1, 3])
def test_what_follows(emulation, size, act, products):
    for residual in (False, True):
        for of_stage in (dict(norm=False), dict(bias=True), dict(norm=False, bias=True), {}):
            call = draw(products, (2, 16, 6, 5), 24, size, residual, act, **of_stage)
            check(emulation, products, call)
    bare = call["conv"]._replace(norm=None, bias=None)
    check(emulation, products, call | dict(conv=bare))


@pytest.mark.parametrize("products", PRODUCTS)
def test_channels_that_are_no_vectors(emulation, products):
    for c, k in ((3, 16), (13, 6), (1, 1), (20, 17), (16, 3)):
        check(emulation, products, draw(products, (2, c, 6, 9), k))


@pytest.mark.parametrize("products", PRODUCTS)
def test_addresses_that_are_not_aligned(emulation, products):
    call = draw(products, (2, 16, 6, 6), 16)
    expected = check(emulation, products, call)
    conv = call["conv"]
    for changed in (
        dict(x=at_offset(call["x"], 1)),
        dict(residual=at_offset(call["residual"], 3)),
        dict(conv=conv._replace(weight=at_offset(conv.weight, 1))),
        dict(conv=conv._replace(weight=conv.weight.contiguous())),
        dict(conv=conv._replace(weight=at_offset(conv.weight.transpose(2, 3).contiguous(), 5)
                                .transpose(2, 3))),
    ):  # fmt: skip
        assert torch.equal(emulation.forward(**call | changed), expected)


@pytest.mark.parametrize("products", sweep(PRODUCTS, quick=["bf16", "tf32"]))
def test_tiles_of_one_block_or_of_many(emulation, products):
    """And patches that are buffered once or twice give the same."""
    found, shapes = [], (((5, 24, 21, 30), 40, 3), ((2, 64, 20, 20), 64, 3), ((7, 16, 5, 5), 8, 1))
    for shape, k, size in shapes:
        call = draw(products, shape, k, size)
        emulation.device = LARGE
        expected = check(emulation, products, call)
        for emulation.device in (LARGE, SMALL, device(1, 227), device(1, 175)):
            plan = emulation.plan(call["x"], k, size, "affine", True)
            if plan is not None:
                assert torch.equal(emulation.forward(**call), expected)
                found.append(plan)
    assert {plan.stages for plan in found} == {1, 2}
    assert {plan.rows for plan in found} == ({2} if products == "exact" else {2, 4})
    assert {plan.blocks < plan.tiles for plan in found} == {False, True}


@pytest.mark.parametrize("products", PRODUCTS)
def test_bitwise_the_same_for_any_order_of_threads(emulation, products):
    call = draw(products, (3, 24, 17, 13), 40)
    emulation.tf32 = products == "tf32"
    x, weight = call["x"], call["conv"].weight
    first, *others = (
        (emulation.forward(**call), *emulation.statistics(x, weight)) for emulation.seed in range(5)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_half_precision_norms(emulation):
    for products in ("bf16", "fp16"):
        call = draw(products, (2, 16, 6, 6), 16)
        conv = call["conv"]

        def norm(dtype, conv=conv, half=call["x"].dtype):
            return conv._replace(norm=to(to(conv.norm, half, half), dtype, dtype))

        half, single = (
            emulation.forward(**call | dict(conv=norm(dtype)))
            for dtype in (call["x"].dtype, torch.float32)
        )
        assert torch.equal(half, single)


@pytest.mark.parametrize("products", PRODUCTS)
def test_not_finite_values_go_where_they_go_in_pytorch(emulation, products):
    """Also where channels are padded to 16."""
    call = draw(products, (2, 12, 6, 6), 12)
    x = call["x"]
    x[1, 3, 2, 2], x[1, 5, 4, 4] = float("nan"), float("inf")
    call["residual"][1, 7, 5, 0] = float("nan")
    emulation.tf32 = products == "tf32"
    y, expected = emulation.forward(**call), reference.conv_bn_act(**call)
    assert torch.equal(y.isfinite(), expected.isfinite()) and y[0].isfinite().all()
    assert torch.equal(y.isnan(), expected.isnan())


# --- traffic and plans


@pytest.mark.parametrize("products", PRODUCTS)
def test_what_is_read_and_written(emulation, products):
    """Every tensor once, but for what the patches share; weights once by each block."""
    call = draw(products, (4, 16, 20, 24), 24)
    x, y = call["x"], check(emulation, products, call)
    plan = emulation.plan(x, 24, 3, "affine", True)
    counts = {name: count for (_, name), count in emulation.counts().items()}
    assert counts["y"] == (0, y.nbytes) and counts["residual"] == (y.nbytes, 0)
    assert counts["weight"] == (plan.blocks * call["conv"].weight.nbytes, 0)
    down, across = -(-20 // plan.height), -(-24 // plan.width)
    rows, columns = 20 + 2 * (down - 1), 24 + 2 * (across - 1)
    assert counts["x"] == (4 * rows * columns * 16 * x.element_size(), 0)
    y, _ = emulation.statistics(x, call["conv"].weight)
    counts = {name: count for (_, name), count in emulation.counts().items()}
    assert counts["y"] == (0, y.nbytes)


def test_plans(emulation):
    emulation.device = LARGE

    def plan(*shape, k=64, size=3, dtype=torch.bfloat16):
        x = torch.empty(shape, dtype=dtype, device="meta")
        return emulation.plan(x, k, size)

    large = plan(256, 64, 56, 56)
    assert large.stages == 2 and large.blocks == 132 and large.shared_bytes <= 227 << 10
    assert large.height * large.width >= 192  # of 256 pixels
    small = plan(1000, 64, 7, 7)
    assert small.group > 1 and small.height == small.width == 7
    one = plan(1, 64, 56, 56)
    assert one.tiles > large.tiles / 256  # smaller tiles, so that more blocks have some
    assert plan(32, 16, 64, 64, k=16).group == 1
    assert plan(8, 64, 56, 56, size=1).patch_pixels >= 128
    emulation.device = device(84, 99)  # sm_86: all weights, and one patch at a time
    assert plan(8, 64, 56, 56).stages == 1
    assert plan(8, 64, 56, 56, dtype=torch.float32) is None
    assert plan(8, 65, 56, 56) is None and plan(8, 64, 56, 56, k=72) is None
    for emulation.device in (LARGE, SMALL, device(108, 163)):
        for c in range(1, 65, 9):
            for n, h, w in (*MAPS, (1, 2000, 3), (2, 1, 5000), (100000, 2, 2)):
                for size in (1, 3):
                    found = plan(n, c, h, w, k=65 - c, size=size)
                    assert found.shared_bytes <= emulation.device.shared_bytes
                    assert found.height < 1022 and found.width < 1022 and found.group < 1024


# --- training


def merged(partial):
    """Mean, sum of squared deviations and number of values of blocks, in float64."""
    mean, m2, n = partial.double().unbind(1)
    total = n.sum(0)
    of_all = (mean * n).sum(0) / total
    return of_all, (m2 + n * (mean - of_all) ** 2).sum(0), total


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("k", CHANNELS)
def test_statistics(emulation, k, products):
    """Of the output as it is rounded; also where a mean is far from 0."""
    emulation.tf32, found = products == "tf32", []
    for i, (n, h, w) in enumerate(MAPS):
        c = CHANNELS[(i + k // 8) % 5]
        call = draw(products, (n, c, h, w), k, (1, 3)[i % 4 > 0], norm=False)
        x, conv = call["x"], call["conv"]
        bias = (conv.bias + 30 if i % 2 else conv.bias) if i % 3 else None
        y, partial = emulation.statistics(x, conv.weight, bias)
        assert not emulation.bank_conflicts()
        pads = conv.padding
        theirs = F.conv2d(*convolved(products, x, conv.weight), bias, padding=pads)
        both = (None if t is None else t.double() for t in (conv.weight, bias))
        found.append((y, theirs, F.conv2d(x.double(), *both, padding=pads)))
        mean, m2, count = merged(partial)
        assert torch.equal(count, torch.full_like(count, n * h * w))
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        scale = exact_mean.abs() + exact_var.sqrt()
        assert ((mean - exact_mean).abs() <= torch.finfo(torch.float32).eps * scale).all()
        assert (m2 / count / exact_var - 1).abs().max() < 1e-6
    pooled(found)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("c", CHANNELS)
def test_input_gradients(emulation, c, products):
    """As bn_act's statistics and the ReLU before have it, and the sums of both."""
    emulation.tf32, found = products == "tf32", []
    for i, (n, h, w) in enumerate(MAPS):
        k, size = CHANNELS[(i + c // 8) % 5], (1, 3)[i % 4 > 0]
        dtype = DTYPES[products]
        weight = stage(c, k, size).weight.to(dtype)
        weight = weight.contiguous() if i % 2 else weight
        dy, a = image(n, k, h, w).to(dtype), image(n, c, h, w).to(dtype)
        mean, invstd, centre, shift = torch.randn(4, c) * 0.3
        stats = torch.stack((mean, invstd.abs(), centre * (torch.arange(c) % 2), invstd, shift))
        dx, partial = emulation.gradient(dy, weight, a, stats)
        assert not emulation.bank_conflicts()

        centre, scale, shift = stats[2:].view(3, -1, 1, 1)
        stopped = (a.float() - centre) * scale + shift <= 0
        assert 0.1 < stopped.float().mean() < 0.9 and (dx[stopped] == 0).all()
        pairs = convolved(products, dy, weight), (dy.double(), weight.double())
        of_input = (F.conv_transpose2d(*pair, padding=size // 2) for pair in pairs)
        found.append((dx, *(t.masked_fill(stopped, 0) for t in of_input)))
        deviation = a.double() - mean.view(-1, 1, 1)
        for sums, values in ((partial[:, 0], dx.double()), (partial[:, 1], dx * deviation)):
            exact, largest = values.sum((0, 2, 3)), values.abs().sum((0, 2, 3))
            assert ((sums.double().sum(0) - exact).abs() <= 1e-6 * largest).all()
    pooled(found)


# --- faults, planted


FAULTS = ["WRONG_TAP", "WRONG_FRAGMENT", "EVEN_PITCH"]


@pytest.mark.parametrize("fault", sweep(FAULTS, quick=["WRONG_TAP"]))
def test_a_fault_is_caught(tmp_path, fault):
    broken = HaloEmulation(tmp_path, COMPILER, (f"-DPLANT_{fault}",))
    call = draw("bf16", (3, 32, 20, 24), 32)
    with pytest.raises(AssertionError):
        check(broken, "bf16", call)


MISSING = {
    "CHUNK_SYNC": "race: .* shared memory",
    "WAIT": "race: .* with a copy that was not waited for",
    "WARP_SYNC": "lanes that went different ways",
    "SYNC": "race: .* shared memory",  # before the sums
}


@pytest.mark.parametrize("what", sweep(MISSING, quick=["CHUNK_SYNC", "SYNC"]))
def test_what_is_not_waited_for_is_caught_in_any_order(tmp_path, what):
    broken = HaloEmulation(tmp_path, COMPILER, (f"-DPLANT_MISSING_{what}",))
    call = draw("bf16", (3, 24, 20, 24), 32)
    for broken.seed in range(20):
        with pytest.raises(EmulationError, match=f"conv_halo: {MISSING[what]}"):
            broken.statistics(call["x"], call["conv"].weight)


@pytest.mark.parametrize("access", ["load", "store"])
def test_an_access_out_of_bounds_is_caught(emulation, access):
    """Of tensors shorter than the call says."""
    call = draw("bf16", (2, 16, 6, 6), 16)
    last = emulation._pointer

    def shorter(name, t, written=False):
        wrong = t is not None and name == {"load": "x", "store": "y"}[access]
        return last(name, t[:1] if wrong else t, written)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EmulationError) as caught:
        patch.setattr(emulation, "_pointer", shorter)
        emulation.forward(**call)
    assert f"conv_halo: {access} out of bounds" in str(caught.value)


# --- the ops


def test_what_cannot_be_taken_is_said(monkeypatch):
    asked = []
    ops = types.SimpleNamespace(conv_halo_fits=lambda *sizes: asked.append(sizes) or len(asked) > 1)
    monkeypatch.setattr(torch.ops, "fused_res", ops)
    why_not = IMPLEMENTATIONS["conv_halo"].why_not
    here, conv = image(2, 16, 6, 5), stage(16, 24, 3)
    x = types.SimpleNamespace(  # as it would be on a GPU
        is_cuda=True, device=torch.device("cuda", 0), shape=here.shape, size=here.size,
        element_size=here.element_size,
    )  # fmt: skip
    for call, reason in (
        (Call(here, conv), "not on a CUDA device"),
        (Call(x, conv._replace(stride=(2, 2))), "stride"),
        (Call(x, conv._replace(dilation=(2, 2), padding=(2, 2))), "dilation"),
        (Call(x, conv._replace(padding=(0, 0))), "not of the input's size"),
        (Call(x, stage(4, 24, 3)._replace(groups=4)), "one group"),
        (Call(x, stage(16, 24, 5)), "3x3"),
        (Call(x, stage(16, 72, 3)), "more than 64"),
        (Call(x, conv, x, concat=True), "concatenated"),
        (Call(x, conv, x, stage(16, 24, 1)), "convolved"),
        (Call(x, conv), "shared memory"),
    ):
        assert reason in why_not(call)
    assert why_not(Call(x, conv, image(2, 24, 6, 5))) is None
    assert asked == [(0, 4, 2, 6, 5, 16, 24, 3, 0)] * 2


def test_shapes_without_a_device():
    ops, x = torch.ops.fused_res, image(2, 16, 6, 5).to("meta")
    weight, none = torch.empty((24, 16, 3, 3), device="meta"), (None,) * 5
    y = ops.conv_halo(x, weight, *none, 0.0, None, 1, False)
    assert y.shape == (2, 24, 6, 5) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", [False, True])
def test_the_op_is_given_what_a_call_has(emulation, monkeypatch, norm):
    def default(x, weight, bias, mean, var, norm_weight, norm_bias, eps, residual, act, tf32):
        assert not tf32
        own = Norm(mean, var, norm_weight, norm_bias, False, 0.0, eps) if norm else None
        return emulation.forward(x, conv._replace(norm=own), residual, ACTS[act])

    ops = types.SimpleNamespace(conv_halo=types.SimpleNamespace(default=default))
    monkeypatch.setattr(torch.ops, "fused_res", ops)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    call = draw("exact", (2, 16, 6, 5), 24, act="relu_before_add", norm=norm)
    conv = call["conv"]
    run = IMPLEMENTATIONS["conv_halo"].prepare(Call(**call))
    plain = call["x"].contiguous(), call["residual"].contiguous()
    assert torch.equal(run(*plain), emulation.forward(**call))
