"""The Triton kernels of bn_act, run by Triton's interpreter: the rule, masks, repeatability,
bounds, bytes; and that these checks catch planted faults."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from bn_act_cases import (
    LAYOUTS,
    Case,
    assert_long_sums,
    assert_rule,
    assert_statistics,
    draws_of_grid,
    gradients_by,
    grid,
    on_triton,
)
from hypothesis import HealthCheck, Phase, given, settings
from sweeps import sweep

from fused_res import FusedResBlock, Norm, backend, reference
from fused_res.dispatch import backends
from fused_res.ops.bn_act import bn_act, bn_act_norms, unpack_mask
from fused_res.reference import ACTS

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on a GPU here: make gpu", allow_module_level=True)

from triton.runtime.errors import InterpreterError
from triton_traffic import Traffic

from fused_res.kernels import bn_act as kernels
from fused_res.kernels import bn_act_bwd, bn_act_fwd, launch


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends.STATUS, "triton", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "triton", ("cpu",))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["one launch", "chunks"])
def plan(request, monkeypatch):
    """How a call is planned: as a small tensor, or in several chunks of a few rows."""
    if request.param == "chunks":
        monkeypatch.setattr(kernels, "SMALL_VALUES", 0)
        small = {name: c._replace(elements=512, unroll=2) for name, c in kernels.CONFIGS.items()}
        monkeypatch.setattr(kernels, "CONFIGS", small)
        monkeypatch.setattr(kernels, "PROGRAMS", 12)
        monkeypatch.setattr(kernels, "MERGE", {"K": 4, "B": 8})
    return request.param


# Of the grid, with every dtype, act and kind of residual, and enough channels for a few draws.
GRID = [
    ((4, 63, 10, 2), torch.bfloat16, "channels_last", "relu_before_add", "tensor", True, 0.0),
    ((3, 39, 7, 9), torch.float32, "channels_last", "relu", "norm", True, 3.0),
    ((2, 38, 3, 8), torch.float16, "nchw", "none", "none", False, 50.0),
]


@pytest.mark.parametrize("arguments", GRID, ids=lambda a: f"{a[3]}, {a[4]}")
def test_error_is_within_the_rule(plan, arguments):
    assert_rule(draws_of_grid(arguments), on_triton)


@pytest.mark.slow
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],  # the interpreter is too slow to look for a smaller example
)
@given(arguments=grid())
def test_error_of_random_calls_is_within_the_rule(plan, arguments):
    assert_rule(draws_of_grid(arguments), on_triton)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", sweep([(2, 260, 5, 4), (3, 16, 33, 31)], quick=[(3, 16, 33, 31)]))
def test_shapes_of_the_shipped_configurations(monkeypatch, shape, dtype, layout):
    monkeypatch.setattr(kernels, "SMALL_VALUES", 0)
    assert_rule([Case(shape, dtype, layout, "relu", "norm", True)], on_triton)


def call(x, residual, *, training=True, act="relu", affine=True, running=True):
    c = x.size(1)
    rm, rv = torch.zeros(c), torch.ones(c)
    w, b = (torch.linspace(0.5, 1.5, c), torch.linspace(-1, 1, c)) if affine else (None, None)
    if not running:
        rm = rv = None
    y, mask, stats = torch.ops.fused_res.bn_act_fwd_triton(
        x, w, b, rm, rv, training, 0.1, 1e-5, residual, False, None, None, None, None, False, 0.0,
        1.0, ACTS.index(act), True)  # fmt: skip
    return y, mask, stats, rm, rv, w


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 13, 7, 5), (2, 24, 8, 8), (4, 9, 1, 1)])
def test_mask_holds_the_relus_bits(plan, shape, layout):
    x, r = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    y, mask, *_ = call(x, r)
    assert torch.equal(unpack_mask(mask, x), y > 0)
    length = shape[1] if shape[2] == 1 or layout == "channels_last" else shape[2] * shape[3]
    if length % 8:
        assert not (mask[:, -1] >> (length % 8)).any(), "bits past the end of a run are zero"


def test_bitwise_the_same_on_every_run(plan):
    for layout in LAYOUTS.values():
        x = torch.randn(4, 19, 9, 7).contiguous(memory_format=layout)
        first, second = call(x, x), call(x, x)
        assert all(torch.equal(a, b) for a, b in zip(first[:5], second[:5], strict=True))


def test_statistics_do_not_cancel(plan):
    for layout, change in itertools.product(LAYOUTS.values(), ("offset", "outlier")):
        x = torch.randn(6, 9, 12, 12)
        if change == "offset":
            x += 10000
        else:
            x[0, :, 0, 0] = 1e5
        x = x.contiguous(memory_format=layout)
        rm, rv = torch.zeros(9), torch.ones(9)
        bn_act(x, rm, rv, training=True, momentum=1.0, backend="triton")
        var, mean = torch.var_mean(x.double(), dim=(0, 2, 3))
        torch.testing.assert_close(rm.double(), mean, rtol=3e-7, atol=1e-5)
        torch.testing.assert_close(rv.double(), var, rtol=3e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_alone(plan, layout):
    for shape in ((3, 37, 7, 5), (5, 6, 12, 13)):
        assert_statistics(
            torch.ops.fused_res.bn_act_statistics_triton, shape, torch.float32, layout
        )


MANY = {"nchw": 2**14, "channels_last": 2**12}  # values: 32 and 64 batches of a thread's


@pytest.fixture
def one_program(monkeypatch):
    """adds up a whole channel."""
    monkeypatch.setattr(kernels, "SMALL_VALUES", 0)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    narrow = {name: c._replace(elements=128) for name, c in kernels.CONFIGS.items()}
    monkeypatch.setattr(kernels, "CONFIGS", narrow)


def sums_of_gradients(dy, x):
    """dbias and dweight, where x's mean is 0 and its standard deviation 1."""
    stats, w = torch.tensor([0.0, 1, 0, 1, 0])[:, None].repeat(1, 2), torch.ones(2)
    geometry = kernels.Geometry.of(x)
    mask = torch.zeros(geometry.runs, geometry.mask_bytes, dtype=torch.uint8)
    args = dy, x, w, True, None, False, None, False, stats, mask, 0, False, False, True
    _, dw, db, *_ = torch.ops.fused_res.bn_act_bwd_triton(*args)
    return db, dw


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_values_are_added_up(one_program, layout):
    statistics, n = torch.ops.fused_res.bn_act_statistics_triton, MANY[layout]
    assert_long_sums(n, layout, statistics, sums_of_gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_that_are_given(layout):
    x, dy = (torch.randn(3, 13, 7, 5).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    y, mask, stats, _, _, w = call(x, None)
    sums = torch.randn(2, 13, dtype=torch.float64) * 30
    args = dy, x, w, True, None, False, None, False, stats, mask, 1, True, False, False
    dx, dw, *_ = torch.ops.fused_res.bn_act_bwd_triton(*args, sums)
    exact = gradients_by(sums, dy * (y > 0), x, w, stats)
    torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-5)
    assert dw.numel() == 0
    with pytest.raises(ValueError, match="sums must be float64"):
        torch.ops.fused_res.bn_act_bwd_triton(*args, sums.float())


def test_nan_and_infinity_travel_as_in_pytorch(plan):
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(4, 6, 5, 5)
        x[1, 2, 3, 4] = value
        for training in (True, False):
            rm, rv = torch.zeros(6), torch.ones(6)
            running = torch.zeros(6), torch.ones(6)
            ours = bn_act(x, rm, rv, training=training, backend="triton")
            theirs = reference.bn_act(x, Norm(*running, None, None, training, 0.1, 1e-5))
            assert torch.equal(ours.isnan(), theirs.isnan())
            torch.testing.assert_close((rm, rv), running, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_infinite_gradients_are_as_in_pytorch(plan, layout):
    inf = float("inf")
    dy = torch.randn(4, 4, 12, 12).contiguous(memory_format=LAYOUTS[layout])
    dy[1, 0, 3, 4], dy[1, 1, 3, 4], dy[1, 2, 3, 4], dy[2, 2, 1, 1] = inf, -inf, inf, -inf
    x, found = torch.randn_like(dy), []
    for name in ("triton", "eager"):
        w, b = (torch.ones(4, requires_grad=True) for _ in range(2))
        y = bn_act(x, None, None, w, b, True, act="none", backend=name)
        found.append(torch.autograd.grad(y, (w, b), dy))
    assert found[1][1].isinf().any() and found[1][1].isnan().any()
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("skip", ["identity", "projection"])
@pytest.mark.parametrize("kind", ["basic", "single"])
def test_a_block_trains_on_triton(kind, skip):
    block = FusedResBlock(6, 6, kind=kind, skip=skip).to(memory_format=torch.channels_last)
    twin = reference.ResBlock(6, 6, kind=kind, skip=skip)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 9, 7)
    with backend("triton"):
        block(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, p), q in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_without_affine_or_running_statistics_and_frozen(plan):
    x = torch.randn(3, 10, 6, 5)
    for affine, running, training in (
        (False, True, True),
        (True, False, True),
        (True, True, False),
    ):
        y, _, _, rm, rv, w = call(x, None, affine=affine, running=running, training=training)
        given = (torch.zeros(10), torch.ones(10)) if running else (None, None)
        b = torch.linspace(-1, 1, 10) if affine else None
        norm = Norm(*given, w, b, training, 0.1, 1e-5)
        torch.testing.assert_close(y, reference.bn_act(x, norm))
        if running:
            torch.testing.assert_close((rm, rv), given)


def test_running_statistics_that_are_not_contiguous():
    x, table = torch.randn(3, 10, 6, 5), torch.ones(10, 4)
    rm, rv = table[:, 1], table[:, 3]
    bn_act(x, rm, rv, training=True, backend="triton")
    expected = torch.ones(10), torch.ones(10)
    torch.nn.functional.batch_norm(x, *expected, training=True)
    torch.testing.assert_close((rm, rv), expected)
    assert torch.equal(table[:, ::2], torch.ones(10, 2))


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_one_of_two_norms_frozen(plan, trains):
    x, r, dy = (torch.randn(3, 10, 6, 5) for _ in range(3))
    results = []
    for name in ("triton", "eager"):
        leaves = [t.clone().requires_grad_() for t in (x, r)]
        running = [torch.full((10,), value) for value in (0.1, 1.2, -0.2, 0.8)]
        norm = Norm(*running[:2], None, None, trains[0], 0.1, 1e-5)
        second = Norm(*running[2:], None, None, trains[1], 0.1, 1e-5)
        y = bn_act_norms(leaves[0], norm, leaves[1], second, backend=name)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy), *running))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_errors_come_before_anything_is_done():
    x = torch.randn(2, 5, 4, 3)
    rm, rv, w = torch.zeros(5), torch.ones(5), torch.ones(5)
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\)"):
        bn_act(x, rm, rv, torch.ones(3), torch.ones(3), True, backend="triton")
    with pytest.raises(ValueError, match="residual must have x's shape"):
        bn_act(x, rm, rv, training=True, residual=x[:1], backend="triton")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn_act(x[:1, :, :1, :1], rm, rv, training=True, backend="triton")
    with pytest.raises(ValueError, match="eps=0.0 must be positive during training"):
        bn_act(x, rm, rv, training=True, eps=0.0, backend="triton")
    with pytest.raises(TypeError, match="got torch.float64"):
        call(x.double(), None, affine=False, running=False)
    _, mask, stats, *_ = call(x, None)
    backward = torch.ops.fused_res.bn_act_bwd_triton
    rest = (1, True, False, True)
    for wrong in ((stats[:1], mask), (stats, mask[:, :1])):
        with pytest.raises(ValueError, match="stats and mask must be what bn_act_fwd returned"):
            backward(x, x, w, True, None, False, None, False, *wrong, *rest)
    with pytest.raises(ValueError, match="dy must have x's shape"):
        backward(x[:1], x, w, True, None, False, None, False, stats, mask, *rest)
    assert torch.equal(rm, torch.zeros(5)) and torch.equal(rv, torch.ones(5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 70000, 8, 8), (1, 1, 2**14, 2**13), (2, 2**20, 2, 2)])
def test_grids_are_within_cudas_limits(monkeypatch, shape, layout):
    grids = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_, **__: grids.append(grid))
    x = torch.empty(shape, device="meta").to(memory_format=LAYOUTS[layout])
    w = torch.empty(shape[1], device="meta")
    norm, of_norm = Norm(w, w, w, w, True), bn_act_bwd.NormCall(w, True)
    _, mask, stats = bn_act_fwd.forward(bn_act_fwd.Call(x, norm, x, norm))
    wanted = bn_act_bwd.Wanted(True, True, True)
    call = bn_act_bwd.Call(x, x, of_norm, stats, mask, x, of_norm, wanted=wanted)
    bn_act_bwd.backward(call)
    bn_act_fwd.statistics(x)
    assert len(grids) == 8
    for first, *others in grids:
        assert first < 2**31 and all(n <= 65535 for n in others)


def test_opcheck():
    x = torch.randn(2, 5, 4, 3)
    rm, rv, w, b = torch.zeros(5), torch.ones(5), torch.rand(5), torch.randn(5)
    args = (x, w, b, rm, rv, True, 0.1, 1e-5, x.clone(), False, None, None, None, None, False, 0.0,
            1.0, 1, True)  # fmt: skip
    torch.library.opcheck(torch.ops.fused_res.bn_act_fwd_triton.default, args)
    _, mask, stats = torch.ops.fused_res.bn_act_fwd_triton(*args)
    args = (x, x, w, True, None, False, None, False, stats, mask, 1, True, True, True)
    torch.library.opcheck(torch.ops.fused_res.bn_act_bwd_triton.default, args)
    sums = torch.randn(2, 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fused_res.bn_act_bwd_triton.default, (*args, sums))
    torch.library.opcheck(torch.ops.fused_res.bn_act_statistics_triton.default, (x,))


# --- bytes


def traffic_of_a_step(layout):
    """One training step with a residual, on a tensor large enough to be summed in chunks."""
    x, r, dy = (torch.randn(8, 64, 24, 32).contiguous(memory_format=layout) for _ in range(3))
    w = torch.ones(64)
    with Traffic(least=x.numel() // 8) as traffic:
        _, mask, stats = torch.ops.fused_res.bn_act_fwd_triton(
            x, w, w, w.clone(), w.clone(), True, 0.1, 1e-5, r, False, None, None, None, None, False,
            0.0, 1.0, 1, True)  # fmt: skip
        torch.ops.fused_res.bn_act_bwd_triton(
            dy, x, w, True, None, False, None, False, stats, mask, 1, True, True, True
        )
    return traffic, x.nbytes, x.numel() // 8


@pytest.mark.parametrize("layout", sweep(LAYOUTS, quick=["channels_last"]))
def test_bytes_are_those_of_the_plan(layout, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL_VALUES", 0)
    monkeypatch.setattr(kernels, "PROGRAMS", 8 if layout == "channels_last" else 64)
    traffic, tensor, mask = traffic_of_a_step(LAYOUTS[layout])
    plan = {  # read, written: tensors, masks
        "_bn_act_fwd_statistics_kernel": ((1, 0), (0, 0)),
        "_bn_act_fwd_apply_kernel": ((2, 0), (1, 1)),
        "_bn_act_bwd_sums_kernel": ((2, 1), (0, 0)),
        "_bn_act_bwd_gradients_kernel": ((2, 1), (2, 0)),
    }
    assert set(plan) <= set(traffic.launches)
    for kernel, (read, written) in plan.items():
        for what, counted, (tensors, masks) in (
            ("read", traffic.read, read),
            ("written", traffic.written, written),
        ):
            ideal = tensors * tensor + masks * mask
            assert abs(counted[kernel] - ideal) <= 0.02 * tensor, (kernel, what)
    total = sum(traffic.read.values()) + sum(traffic.written.values())
    assert abs(total / (10 * tensor + 3 * mask) - 1) <= 0.02  # L1: x x r y | dy x dy x dx dr


# --- the checks can fail


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(module, old, new): from here on the op runs kernels with one line changed."""

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
        monkeypatch.setattr(module.__name__, planted)

    return change


def test_a_wrong_mask_bit_is_caught(plant):
    plant(bn_act_fwd, "1, tl.int32) << tl.arange(0, 8)[", "1, tl.int32) << (7 - tl.arange(0, 8))[")
    x = torch.randn(3, 13, 7, 5)
    y, mask, *_ = call(x, x)
    assert not torch.equal(unpack_mask(mask, x), y > 0)


def test_rows_past_the_end_in_a_sum_are_caught(plant):
    line = "d = tl.where(ok, value.to(tl.float32) - shift, 0)\n            batch_s += d"
    plant(bn_act_fwd, line, "d = value.to(tl.float32) - shift\n            batch_s += d")
    with pytest.raises(AssertionError):
        case = Case((3, 40, 5, 7), torch.float32, "channels_last", "relu", "none", True, 3.0)
        assert_rule([case], on_triton)


@pytest.mark.parametrize("name", ["s", "q"])
def test_what_roundings_lost_is_missed(one_program, plant, name):
    plant(bn_act_fwd, f"tl.sum(in_float64({name}, lost_{name})", f"tl.sum({name}.to(tl.float64)")
    with pytest.raises(AssertionError, match="alike: " + {"s": "mean", "q": "squares"}[name]):
        statistics = torch.ops.fused_res.bn_act_statistics_triton
        assert_long_sums(MANY["channels_last"], "channels_last", statistics, sums_of_gradients)


@pytest.mark.parametrize("name, what", [("s, lost", "dy"), ("sx, lost_x", "dy . x")])
def test_what_roundings_lost_of_gradients_is_missed(one_program, plant, name, what):
    plant(bn_act_bwd, f"_over_rows({name}, CH", f"_over_rows({name[: name.index(',')]}, 0 * s, CH")
    with pytest.raises(AssertionError, match=f"(alike|huge): {what}"):
        statistics = torch.ops.fused_res.bn_act_statistics_triton
        assert_long_sums(MANY["channels_last"], "channels_last", statistics, sums_of_gradients)


def test_an_out_of_bounds_read_is_caught(plant):
    apply = "_apply(x, residual, y, mask, r, r {} rows,"
    plant(bn_act_fwd, apply.format("<"), apply.format("<="))
    x = torch.randn(3, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(InterpreterError, match="OutOfBounds.*_bn_act_fwd_small"), Traffic():
        call(x[:2], x[1:])


@pytest.mark.slow
def test_bytes_read_twice_are_caught(plant, monkeypatch):
    gradient = "    raw, g = _gradient(dy, mask, run, row_ok, i0, inner, at, ok, ACT, G)\n"
    again = "    g += 0 * tl.load(x + at, mask=ok, other=0).to(tl.float32)\n"
    plant(bn_act_bwd, f"{gradient}    if dx", f"{gradient}{again}    if dx")
    monkeypatch.setattr(kernels, "SMALL_VALUES", 0)
    traffic, tensor, mask = traffic_of_a_step(torch.channels_last)
    assert abs(traffic.read["_bn_act_bwd_gradients_kernel"] - (2 * tensor + mask)) > 0.02 * tensor
