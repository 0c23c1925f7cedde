"""The CUDA kernels of bn_act, run on the CPU by tests/cuda_emulation: against fp64 by the 1.5 x
rule, bit by bit under shuffled thread orders, within bounds, and the bytes they move. And faults
planted in them, which these checks must catch."""

import functools
import os
import shutil

import pytest
import torch
from bn_act_cases import (
    LAYOUTS,
    NAMES,
    Case,
    assert_long_sums,
    assert_rule,
    assert_statistics,
    draws,
    draws_of_grid,
    gradients_by,
    grid,
    parameter_dtype,
)
from cuda_emulation import ELEMENTS, PLANS, Device, Emulation, EmulationError, Shape, at_offset
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import sweep

from fused_res import Norm, reference
from fused_res.ops.bn_act import unpack_mask
from fused_res.reference import ACTS, ConvNorm

COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]
KINDS = ("none", "tensor", "norm")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("emulation"), COMPILER)


def run(emulation, case, plan="automatic", offset=0, seed=0):
    """What ``Case.run`` gives, by the emulated kernels, forward and backward."""
    emulation.plan, emulation.seed = plan, seed
    x, residual, dy = (
        at_offset(t.to(case.dtype), offset) for t in (case.x, case.residual, case.dy)
    )
    p = parameter_dtype(case.dtype)
    channels = [None if t is None else t.to(p).clone() for t in case.channels]
    running = [t.to(p).clone() for t in case.running]
    norm = Norm(*running[:2], *channels[:2], case.training)
    second = Norm(*running[2:], *channels[2:], case.training) if case.kind == "norm" else None
    if case.kind == "none":
        residual = None
    y, mask, stats = emulation.forward(x, norm, residual, second, case.act)
    passes = case.kind == "none" or (second is None and case.act != "relu")
    g = emulation.backward(
        dy, x, norm, residual, second, stats, mask, case.act, need_residual=not passes
    )
    dresidual = None if case.kind == "none" else dy if passes else g.dresidual
    return [y, g.dx, dresidual, *g[2:], *running]


@pytest.mark.parametrize("examples", sweep([25, 100], quick=[25]))
def test_error_is_within_the_rule(emulation, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        arguments=grid(),
        plan=st.sampled_from(PLANS),
        offset=st.sampled_from([0, 0, 1, 4]),
        whole_eights=st.booleans(),
    )
    def check(arguments, plan, offset, whole_eights):
        (n, c, h, w), *rest = arguments
        if whole_eights:  # what the kernels read 16 bytes at a time
            c, w, offset = -(-c // 8) * 8, 8, 0
            n = n if n * h * w >= 32 else 32
        assert_rule(
            draws_of_grid(((n, c, h, w), *rest)),
            lambda case: run(emulation, case, plan, offset, seed=n),
        )

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode(emulation, layout, plan, act, kind):
    for i, training in enumerate((True, False)):
        dtype = ELEMENTS[(i + ACTS.index(act) + KINDS.index(kind)) % 3]
        for shape in ((5, 72, 8, 8), (4, 70, 7, 9)):
            assert_rule(
                draws(shape, dtype, layout, act, kind, training),
                lambda case: run(emulation, case, plan),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(16, 64, 28, 28), (2, 3, 65, 67), (300, 33, 1, 1), (4, 1, 40, 40), (8, 264, 8, 8)]
)
def test_real_sizes(emulation, shape, layout):
    for training in (True, False):
        case = Case(shape, torch.float32, layout, "relu", "norm", training)
        assert_rule([case], lambda case: run(emulation, case))


# A device on whose multiprocessors the tensors of the tests below fit, and one where none does.
ROOMY, TIGHT = Device(24, 228 << 10), Device(24, 2 * (1024 + (17 << 10)))


@pytest.mark.parametrize("layout", sweep(LAYOUTS, quick=["nchw"]))
@pytest.mark.parametrize("kind", sweep(["tensor", "norm"], quick=["tensor"]))
def test_cooperative_launches(emulation, monkeypatch, layout, kind):
    dtype = torch.float32 if kind == "norm" else torch.bfloat16
    emulation.plan = "cooperative"
    for device, act in ((ROOMY, "relu"), (TIGHT, "relu_before_add")):
        monkeypatch.setattr(emulation, "device", device)
        assert_rule(
            draws((4, 16, 64, 64), dtype, layout, act, kind, True),
            lambda case: run(emulation, case, "cooperative"),
        )
        assert {kernel for kernel, _ in emulation.counts()} == {"bn_act_bwd_cooperative"}


def test_a_cooperative_launch_that_is_refused_is_split(emulation):
    emulation.library.set_most_together(1)
    try:
        for kind in ("tensor", "norm"):
            cases = draws((4, 32, 24, 24), torch.float32, "channels_last", "relu", kind, True)
            assert_rule(cases, lambda case: run(emulation, case, "cooperative"))
            assert ("bn_act_bwd_gradients", "dx") in emulation.counts()
    finally:
        emulation.library.set_most_together(2**31)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_affine(emulation, layout):
    cases = draws((4, 24, 7, 9), torch.float32, layout, "relu", "norm", True, affine=False)
    assert_rule(cases, lambda case: run(emulation, case))


def norm_of(channels, training=True, momentum=0.1):
    w, b = torch.rand(channels) + 0.5, torch.randn(channels)
    return Norm(torch.zeros(channels), torch.ones(channels), w, b, training, momentum)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_statistics_do_not_cancel(emulation, layout, plan):
    """mean >> std, an outlier first, an image unlike the others: E[x^2] - E[x]^2 fails on each."""
    emulation.plan = plan
    for change in ("offset", "outlier", "image"):
        x = torch.randn(16, 20, 12, 12)
        if change == "offset":
            x += 10000
        elif change == "outlier":
            x[0, :, 0, 0] = 1e5
        else:
            x[0] = 0
            x[1:] += 3000
        norm = norm_of(20, momentum=1.0)
        emulation.forward(x.contiguous(memory_format=LAYOUTS[layout]), norm)
        exact = x.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(
            norm.running_mean.double(), exact.mean(1), rtol=3e-7, atol=1e-5, msg=change
        )
        torch.testing.assert_close(
            norm.running_var.double(), exact.var(1), rtol=3e-6, atol=0, msg=change
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_alone(emulation, layout, dtype):
    for shape in ((3, 37, 7, 5), (16, 64, 28, 28), (40, 200, 1, 1)):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        first, *others = (emulation.statistics(x) for emulation.seed in range(3))
        assert all(torch.equal(first, other) for other in others)
        assert_statistics(emulation.statistics, shape, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_values_are_added_up(emulation, layout):
    """By one block."""
    emulation.plan = "whole"

    def statistics(x):
        norm = Norm(torch.zeros(2), torch.ones(2), None, None, True, 1.0)
        emulation.forward(x, norm, act="none")
        n = x.numel() // 2
        mean, var = norm.running_mean.double(), norm.running_var.double()
        return torch.stack([mean, var * (n - 1), torch.tensor([n, n])])

    assert_long_sums(2**18, layout, statistics, functools.partial(sums_of_gradients, emulation))


def sums_of_gradients(emulation, dy, x):
    """dbias and dweight, where x's mean is 0 and its standard deviation 1."""
    norm, stats = norm_of(2), torch.tensor([0.0, 1, 0, 1, 0])[:, None].repeat(1, 2)
    found = emulation.backward(
        dy, x, norm, None, None, stats, None, "none", need_x=False, need_residual=False
    )
    return found.dbias, found.dweight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("second", [True, False])
def test_sums_that_are_given(emulation, layout, plan, second):
    emulation.plan = plan
    x, residual, dy = (
        torch.randn(3, 21, 9, 8).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3)
    )
    norm = norm_of(21)
    y, mask, stats = emulation.forward(x, norm, residual, norm if second else None)
    sums = torch.randn(4 if second else 2, 21, dtype=torch.float64) * 30
    found = emulation.backward(
        dy, x, norm, residual, norm if second else None, stats, mask, "relu",
        need_parameters=False, sums=sums,
    )  # fmt: skip
    g = dy * (y > 0)
    gradients = [(found.dx, x, slice(0, 2)), (found.dresidual, residual, slice(2, 4))]
    for dx, of, rows in gradients[: 1 + second]:
        exact = gradients_by(sums[rows], g, of, norm.weight, stats[rows])
        torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-5)
    if not second:
        assert torch.equal(found.dresidual, g)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_bitwise_the_same_for_any_order_of_threads(emulation, layout, plan):
    for shape in ((8, 48, 16, 16), (5, 37, 7, 7)):
        case = Case(shape, torch.bfloat16, layout, "relu", "norm", True)
        first, *others = (run(emulation, case, plan, seed=seed) for seed in range(4))
        for other in others:
            for name, a, b in zip(NAMES, first, other, strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_what_is_applied_again_is_the_same_bit_by_bit(emulation, layout, plan):
    emulation.plan = plan
    for shape in ((8, 48, 16, 16), (5, 37, 7, 7)):
        x = torch.randn(shape).to(torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
        y, mask, stats = emulation.forward(3 * x + 2, norm_of(shape[1]))
        for a, b in zip(emulation.reapply(3 * x + 2, stats), (y, mask), strict=True):
            assert torch.equal(a, b)


def check_mask(emulation, shape, layout, act):
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    residual = torch.randn_like(x)
    norm = norm_of(shape[1])
    y, mask, stats = emulation.forward(x, norm, residual, None, act)
    assert stats.shape == (5, shape[1])
    if act == "relu_before_add":  # y does not show where the ReLU was open
        y, _, _ = emulation.forward(x, norm, None, None, "relu")
    assert torch.equal(unpack_mask(mask, x), y > 0)
    set_bits = sum(bin(v).count("1") for v in mask.flatten().tolist())
    assert set_bits == (y > 0).sum()  # those past the end are zero


@pytest.mark.parametrize("act", ["relu", "relu_before_add"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 9), (2, 16, 4, 4), (2, 8, 1, 1), (3, 1, 5, 5), (2, 37, 3, 3)]
)
def test_mask_is_one_bit_an_element(emulation, layout, shape, act):
    for emulation.plan in PLANS[1:]:
        check_mask(emulation, shape, layout, act)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("training", [True, False])
def test_only_what_is_wanted(emulation, layout, plan, training):
    """Each gradient is the same, bit by bit, whatever else is wanted."""
    emulation.plan = plan
    for second, act in ((True, "relu"), (True, "relu_before_add"), (False, "relu")):
        x, residual, dy = (
            torch.randn(3, 16, 9, 8).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3)
        )
        norm = norm_of(16, training)
        residual_norm = norm_of(16, not training) if second else None
        y, mask, stats = emulation.forward(x, norm, residual, residual_norm, act)
        unmasked = emulation.forward(x, norm._replace(training=False), act=act, save_mask=False)
        assert unmasked[1] is None and y.isfinite().all()
        arguments = (dy, x, norm, residual, residual_norm, stats, mask, act)
        everything = emulation.backward(*arguments)
        for wanted in range(8):
            need = [bool(wanted >> i & 1) for i in range(3)]
            got = emulation.backward(*arguments, *need)
            for name, a, b, asked in zip(
                got._fields, got, everything, [*need[:2], *need[2:] * 4], strict=True
            ):
                assert (a is not None) == (asked and b is not None), name
                assert a is None or torch.equal(a, b), name


def test_half_precision_and_strided_parameters(emulation):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(8, 16, 6, 6).to(dtype)
        norm = norm_of(16)
        narrow = Norm(*(t.to(dtype).repeat_interleave(3)[::3] for t in norm[:4]), True)
        wide = Norm(*(t.float() for t in narrow[:4]), True)
        y, mask, stats = emulation.forward(x, narrow)
        expected, _, _ = emulation.forward(x, wide)
        assert torch.equal(y, expected)
        for a, b in zip(narrow[:4], wide[:4], strict=True):
            assert torch.equal(a, b.to(dtype))
        g, h = (emulation.backward(x, x, n, None, None, stats, mask, "relu", need_residual=False)
                for n in (narrow, wide))  # fmt: skip
        assert torch.equal(g.dx, h.dx) and torch.equal(g.dweight, h.dweight.to(dtype))


def test_not_finite_values_pass_as_in_pytorch(emulation):
    for training in (True, False):
        x = torch.randn(2, 3, 4, 4)
        x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
        norm = norm_of(3, training)
        y, _, _ = emulation.forward(x, norm)
        running = torch.zeros(3), torch.ones(3)
        theirs = torch.nn.functional.batch_norm(x, *running, norm.weight, norm.bias, training)
        torch.testing.assert_close(y, theirs.relu(), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", sweep([torch.float32, torch.bfloat16], quick=[torch.bfloat16]))
def test_bytes_are_as_planned(emulation, layout, dtype):
    """Forward: x twice, the residual once, y and mask written; backward: dy, x and mask twice."""
    # large enough for long chunks: their sums are what a smaller tensor has more of
    shape = (64, 64, 56, 56) if layout == "channels_last" else (32, 64, 28, 28)
    case = Case(shape, dtype, layout, "relu", "tensor", True)
    tensor, mask = case.x.numel() * dtype.itemsize, case.x.numel() // 8
    x, residual, dy = (t.to(dtype) for t in (case.x, case.residual, case.dy))
    norm = norm_of(64)
    emulation.plan = "split"
    _, bits, stats = emulation.forward(x, norm, residual)
    read = {"x": 2 * tensor, "residual": tensor}
    check_bytes(emulation.counts(), read, {"y": tensor, "mask": mask})
    emulation.backward(dy, x, norm, residual, None, stats, bits, "relu")
    read = {"dy": 2 * tensor, "x": 2 * tensor, "mask": 2 * mask}
    check_bytes(emulation.counts(), read, {"dx": tensor, "dresidual": tensor})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tensor", "norm"])
def test_a_tensor_that_fits_on_chip_is_read_once(emulation, monkeypatch, layout, dtype, kind):
    monkeypatch.setattr(emulation, "device", ROOMY)
    emulation.plan = "automatic"
    case = Case((5, 8, 96, 96), dtype, layout, "relu", kind, True)
    tensor, mask = case.x.numel() * dtype.itemsize, case.x.numel() // 8
    x, residual, dy = (t.to(dtype) for t in (case.x, case.residual, case.dy))
    norm = norm_of(8)
    second = norm_of(8) if kind == "norm" else None
    _, bits, stats = emulation.forward(x, norm, residual, second)
    counts = emulation.counts()
    assert {kernel for kernel, _ in counts} == {"bn_act_fwd_cooperative"}
    assert counts["bn_act_fwd_cooperative", "x"] == (pytest.approx(tensor, rel=0.02), 0)
    assert counts["bn_act_fwd_cooperative", "residual"] == (pytest.approx(tensor, rel=0.02), 0)
    assert counts["bn_act_fwd_cooperative", "y"] == (0, tensor)
    assert counts["bn_act_fwd_cooperative", "mask"] == (0, mask)
    emulation.backward(dy, x, norm, residual, second, stats, bits, "relu")
    counts = emulation.counts()
    assert {kernel for kernel, _ in counts} == {"bn_act_bwd_cooperative"}
    for name in ("dy", "x", *(["residual"] if second else [])):
        assert counts["bn_act_bwd_cooperative", name] == (tensor, 0), name
    assert counts["bn_act_bwd_cooperative", "dx"] == (0, tensor)
    assert counts["bn_act_bwd_cooperative", "dresidual"] == (0, tensor)


def test_the_plan_follows_the_size(emulation, monkeypatch):
    monkeypatch.setattr(emulation, "device", ROOMY)
    emulation.plan = "automatic"
    plans = {(2, 64, 4, 4): "whole", (6, 64, 20, 20): "cooperative", (60, 64, 30, 30): "statistics",
             (7, 63, 20, 20): "statistics"}  # fmt: skip
    for shape, plan in plans.items():
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        emulation.forward(x, norm_of(shape[1]))
        assert f"bn_act_fwd_{plan}" in {kernel for kernel, _ in emulation.counts()}, shape
    emulation.forward(torch.randn(6, 64, 20, 20).contiguous(memory_format=torch.channels_last),
                      norm_of(64, training=False))  # fmt: skip
    assert "bn_act_fwd_apply" in {kernel for kernel, _ in emulation.counts()}


def check_bytes(counts, read, written):
    for name in {*read, *written}:
        rows = [row for (_, tensor), row in counts.items() if tensor == name]
        r, w = map(sum, zip(*rows, strict=True))
        planned = read.get(name, 0)
        assert planned <= r <= 1.02 * planned, (name, r, planned)
        assert w == written.get(name, 0), (name, w)
    # The sums of chunks cross memory once each way. What threads read of the tables and statistics
    # does not: a block's threads read the same few lines.
    total = sum(read.values()) + sum(written.values())
    sums = sum(w for (_, name), (_, w) in counts.items() if name in ("scratch", "stats"))
    assert 2 * sums < 0.02 * total, (sums, total)


def test_addresses_past_two_billion(emulation):
    """Too large to run; where the kernels would go is arithmetic."""
    for images, channels, pixels in ((2, 3, 3 * 2**31), (2**20, 4099, 9), (3 * 2**31, 8, 1)):
        rows = images * pixels
        last = channels - 1
        assert emulation.place(Shape(images, channels, pixels, True), last // 8, rows - 1) == [
            (rows - 1) * channels + last // 8 * 8,
            (rows - 1) * -(-channels // 8) + last // 8,
            last % 8 + 1,
        ]
        eights = -(-pixels // 8)
        assert emulation.place(
            Shape(images, channels, pixels, False), last, images * eights - 1
        ) == [
            (images * channels - 1) * pixels + (eights - 1) * 8,
            images * channels * eights - 1,
            (pixels - 1) % 8 + 1,
        ]
        for channels_last in (True, False):
            shape = Shape(images, channels, pixels, channels_last)
            items = rows if channels_last else images * eights
            blocks = emulation.part(shape, 0)[3]
            assert emulation.part(shape, 0)[::2] == [0, 0]
            first, end, column, _ = emulation.part(shape, blocks - 1)
            assert end == items and end > first
            assert column < (-(-channels // 8) if channels_last else channels)


# --- faults, planted


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    @functools.cache
    def build(fault):
        return Emulation(tmp_path_factory.mktemp(fault), COMPILER, (f"-DPLANT_{fault}",))

    return build


def test_a_missing_barrier_is_caught(planted):
    broken = planted("MISSING_SYNC")
    case = Case((8, 48, 16, 16), torch.float32, "channels_last", "relu", "norm", True)
    for seed in range(20):
        with pytest.raises(EmulationError, match="race: .* shared memory"):
            run(broken, case, "split", seed=seed)


@pytest.mark.parametrize("layout", sweep(LAYOUTS, quick=["channels_last"]))
def test_a_missing_barrier_of_the_grid_is_caught(planted, layout):
    broken = planted("MISSING_GRID_BARRIER")
    broken.device = ROOMY
    case = Case((8, 8, 64, 64), torch.float32, layout, "relu", "norm", True)
    for seed in range(20):
        with pytest.raises(EmulationError, match="race: .* of scratch"):
            run(broken, case, "cooperative", seed=seed)


def test_a_wrong_mask_bit_is_caught(planted):
    broken = planted("WRONG_MASK_BIT")
    for layout in LAYOUTS:
        with pytest.raises(AssertionError):
            check_mask(broken, (3, 16, 8, 8), layout, "relu")


@pytest.mark.parametrize("access", sweep(["load", "store"], quick=["store"]))
def test_an_access_out_of_bounds_is_caught(planted, access):
    broken = planted(f"{access.upper()}_OUT_OF_BOUNDS")
    for layout in LAYOUTS:
        x = torch.randn(3, 5, 7, 9).contiguous(memory_format=LAYOUTS[layout])
        with pytest.raises(EmulationError, match=rf"bn_act_fwd_\w+: {access} out of bounds at 0x"):
            broken.forward(x, norm_of(5))
        x = torch.randn(3, 8, 8, 8).contiguous(memory_format=LAYOUTS[layout])
        with pytest.raises(EmulationError, match=rf"bn_act_fwd_\w+: misaligned {access} at 0x"):
            broken.forward(x, norm_of(8))


def block_step(emulation, x, stages, dy, act):
    """Output and gradients of a projection block, as csrc/res_block.h walks it: convolutions of
    PyTorch's, the rest by the emulated kernels."""

    def convolve(stage, x):
        return torch.nn.functional.conv2d(x, *stage[:-1])

    def convolve_backward(stage, dy, x):
        args = dy, x, stage.weight, None, *stage[2:5], False, (0, 0), stage.groups
        return torch.ops.aten.convolution_backward(*args, (True, True, False))[:2]

    *branch, shortcut = stages
    outputs, kept, z = [], [], x
    for stage in branch[:-1]:
        outputs.append(convolve(stage, z))
        z, _, stats = emulation.forward(outputs[-1], stage.norm, act="relu", save_mask=False)
        kept.append(stats)
    a, b, last = convolve(branch[-1], z), convolve(shortcut, x), branch[-1].norm
    y, mask, stats = emulation.forward(a, last, b, shortcut.norm, act)
    g = emulation.backward(dy, a, last, b, shortcut.norm, stats, mask, act)
    found, (dx, dweight) = [], convolve_backward(shortcut, g.dresidual, x)
    found += [dweight, *g[4:]]
    for i in reversed(range(len(branch))):
        z, mask = emulation.reapply(outputs[i - 1], kept[i - 1]) if i else (x, None)
        dz, dweight = convolve_backward(branch[i], g.dx, z)
        found += [dweight, *g[2:4]]
        if i:
            norm = branch[i - 1].norm
            g = emulation.backward(
                dz, outputs[i - 1], norm, None, None, kept[i - 1], mask, "relu",
                need_residual=False)  # fmt: skip
    return [y, dx + dz, *found]


@pytest.mark.parametrize("act", ["relu", "relu_before_add"])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_whole_block_is_within_the_rule(emulation, dtype, act):
    """Pooled over draws, for the ReLUs that rounding turns."""
    emulation.plan, emulation.seed = "automatic", 0
    mine, other = [], []
    for _ in range(6):

        def stage(c, k, size, stride):
            weight = (torch.randn(k, c, size, size) * (2 / (c * size**2)) ** 0.5).to(dtype)
            pad = (size // 2,) * 2
            return ConvNorm(weight, None, (stride,) * 2, pad, (1, 1), 1, norm_of(k))

        stages = [stage(24, 16, 1, 1), stage(16, 16, 3, 2), stage(16, 40, 1, 1)]
        stages.append(stage(24, 40, 1, 2))
        x = torch.randn(4, 24, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
        dy = torch.randn(4, 40, 5, 4).to(dtype).contiguous(memory_format=torch.channels_last)

        def theirs(wide, x=x, dy=dy, stages=stages):
            leaves, again = [x.to(wide).requires_grad_()], []
            for s in stages:
                kind = torch.float64 if wide == torch.float64 else torch.float32
                tensors = s.weight.to(wide), s.norm.weight.to(kind), s.norm.bias.to(kind)
                tensors = [t.detach().clone().requires_grad_() for t in tensors]
                norm = Norm(None, None, *tensors[1:], True)
                again.append(s._replace(weight=tensors[0], norm=norm))
                leaves.append(tensors)
            y = reference.res_block(leaves[0], again[:-1], again[-1], act)
            order = [leaves[0], *leaves[4], *leaves[3], *leaves[2], *leaves[1]]
            return [y, *torch.autograd.grad(y, order, dy.to(wide))]

        exact = theirs(torch.float64)
        for row, found in (
            (mine, block_step(emulation, x, stages, dy, act)),
            (other, theirs(dtype)),
        ):
            row += [(f.double() - e).flatten() for f, e in zip(found, exact, strict=True)]
    mine, other = torch.cat(mine), torch.cat(other)
    assert mine.square().mean() <= 1.5**2 * other.square().mean()
