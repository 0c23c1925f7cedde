"""The op bn_act: against fp64 by the 1.5 x rule, under autograd and the compiler, and its
errors."""

import pytest
import torch
import torch.nn.functional as F
from bn_act_cases import (
    LAYOUTS,
    NAMES,
    Case,
    assert_rule,
    assert_statistics,
    draws,
    draws_of_grid,
    gradients_by,
    grid,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, instruction_set

from fused_res import BackendUnavailable, Norm, backend
from fused_res.dispatch import backends
from fused_res.ops import bn_act as op
from fused_res.ops.bn_act import bn_act, unpack_mask
from fused_res.reference import ACTS

pytestmark = pytest.mark.skipif(
    backends.STATUS["cpu"] is not None, reason=f"no CPU library: {backends.STATUS['cpu']}"
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(arguments=grid(), isa=st.sampled_from(ISAS))
def test_error_is_within_the_rule(arguments, isa):
    with instruction_set(isa):
        assert_rule(draws_of_grid(arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (32, 64, 28, 28),
        (8, 200, 14, 14),
        (64, 32, 8, 8),
        (2, 3, 65, 67),
        (300, 33, 1, 1),
        (4, 1, 40, 40),
    ],
)
def test_real_sizes(shape, layout):
    for training in (True, False):
        assert_rule([Case(shape, torch.float32, layout, "relu", "norm", training)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(4, 600, 9, 7), (2, 2057, 8, 8), (2, 2057, 17, 17)])
def test_more_channels_than_are_summed_at_a_time(shape, isa):
    """In a cache, and (the last) from memory, where rows are read in another order."""
    with instruction_set(isa):
        for kind in ("none", "norm"):
            assert_rule([Case(shape, torch.float32, "channels_last", "relu", kind, True)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["none", "tensor", "norm"])
def test_float64(layout, kind):  # there is no finer reference: PyTorch's own result, to rounding
    case = Case((4, 19, 7, 9), torch.float64, layout, "relu", kind, True)
    for name, a, b in zip(NAMES, case.run(torch.float64, "cpu"), case.run(torch.float64, "eager"),
                          strict=True):  # fmt: skip
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_affine(layout):
    assert_rule(draws((4, 24, 7, 9), torch.float32, layout, "relu", "norm", True, affine=False))


def simple(shape=(4, 24, 7, 5), layout="nchw", dtype=torch.float32, requires_grad=True):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    w, b = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    if requires_grad:
        x, w, b = (t.requires_grad_() for t in (x, w, b))
    return x, torch.zeros(shape[1]), torch.ones(shape[1]), w, b


def exact_statistics(x):
    x = x.double().transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1, unbiased=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("isa", ISAS)
def test_statistics_do_not_cancel(layout, isa):
    """mean >> std, an outlier first, an image unlike the others: E[x^2] - E[x]^2 fails on each."""
    for change in ("offset", "outlier", "image"):
        x = torch.randn(16, 20, 12, 12)
        if change == "offset":
            x += 10000
        elif change == "outlier":
            x[0, :, 0, 0] = 1e5
        else:
            x[0] = 0
            x[1:] += 3000
        x = x.contiguous(memory_format=LAYOUTS[layout])
        rm, rv = torch.zeros(20), torch.zeros(20)
        with instruction_set(isa):
            bn_act(x, rm, rv, training=True, momentum=1.0, backend="cpu")
        mean, var = exact_statistics(x)
        assert torch.allclose(rm.double(), mean, rtol=3e-7, atol=1e-5), change
        assert torch.allclose(rv.double(), var, rtol=3e-6), change


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(16, 48, 14, 14), (1, 64, 40, 40), (33, 5, 23, 21), (8, 64, 48, 48)]
)
def test_bitwise_the_same_for_any_number_of_threads(layout, shape):
    case = Case(shape, torch.float32, layout, "relu", "norm", True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results.append(case.run(torch.float32, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 9), (2, 16, 4, 4), (2, 8, 1, 1), (3, 1, 5, 5), (2, 37, 3, 3)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_mask_is_one_bit_an_element(layout, shape, isa):
    x, rm, rv, w, b = simple(shape, layout, requires_grad=False)
    with instruction_set(isa):
        y, mask, stats = op._fwd(
            x, Norm(rm, rv, w, b, False, 0.1, 1e-5), None, None, "relu", True, "cpu"
        )
    assert mask.dtype == torch.uint8 and stats.shape == (5, shape[1])
    assert torch.equal(unpack_mask(mask, x), y > 0)
    padding_bits = mask.numel() * 8 - x.numel()
    assert sum(bin(v).count("1") for v in mask.flatten().tolist()) == (y > 0).sum()
    assert 0 <= padding_bits < 8 * mask.size(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_is_written(layout):
    """Freed blocks are left full of NaN, and they are what the next outputs are made of."""
    for shape in [(3, 5, 7, 9), (2, 19, 6, 6), (5, 130, 3, 1)]:
        case = Case(shape, torch.float32, layout, "relu", "norm", True)
        for _ in range(4):
            junk = [torch.full((case.x.numel(),), float("nan")) for _ in range(8)]
            del junk
            for name, t in zip(NAMES, case.run(torch.float32, "cpu"), strict=True):
                assert t.isfinite().all(), name


def test_strided_offset_and_expanded_inputs():
    base = torch.randn(6, 20, 9, 18)
    views = [
        base[1:5, 3:17, :, ::2],
        base[1:5, 3:17, 1:, 1:].transpose(2, 3),
        base[:, :14].permute(3, 1, 0, 2),
    ]
    for x in views:
        x = x.requires_grad_()
        n, c, h, w = x.shape
        residual = torch.randn(1, c, 1, 1).expand(n, c, h, w)
        outs = []
        for name in ("cpu", "eager"):
            rm, rv = torch.zeros(c), torch.ones(c)
            y = bn_act(x, rm, rv, None, None, True, residual=residual, backend=name)
            (grad,) = torch.autograd.grad(y.sum() + (y * y).sum(), x)
            outs.append((y, grad, rm, rv))
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_is_kept(layout):
    x, *rest = simple(layout=layout)
    y = bn_act(x, *rest, training=True, backend="cpu")
    y.sum().backward()
    for t in (y, x.grad):
        assert t.is_contiguous(memory_format=LAYOUTS[layout])


def test_zero_size_batch():
    for training in (True, False):
        x = torch.empty(0, 6, 4, 4, requires_grad=True)
        rm, rv = torch.zeros(6), torch.ones(6)
        y = bn_act(x, rm, rv, training=training, residual=torch.empty(0, 6, 4, 4))
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape


def test_not_finite_values_pass_as_in_pytorch():
    x, rm, rv, w, b = simple((2, 3, 4, 4))
    with torch.no_grad():
        x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    for training in (True, False):
        outs = []
        for name in ("cpu", "eager"):
            y = bn_act(x, rm.clone(), rv.clone(), w, b, training, backend=name)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
            outs.append((y, grad))
        for a, b_ in zip(*outs, strict=True):
            torch.testing.assert_close(a, b_, equal_nan=True)


def test_no_running_statistics_uses_the_batch():
    x, _, _, w, b = simple()
    y = bn_act(x, None, None, w, b, training=True, backend="cpu")
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, None, None, w, b, training=True)))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["none", "tensor", "norm"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_gradgradcheck(act, kind, training):
    c = 3
    x, r = (torch.randn(2, c, 3, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    channels = [(torch.rand(c, dtype=torch.double) + 0.5).requires_grad_() for _ in range(4)]

    def f(x, r, w, b, w2, b2):
        running = [torch.full((c,), v, dtype=torch.double) for v in (0.1, 1.2, -0.2, 0.8)]
        second = Norm(running[2], running[3], w2, b2, training)
        return bn_act(
            x, *running[:2], w, b, training, backend="cpu", act=act,
            residual=r if kind != "none" else None,
            residual_norm=second if kind == "norm" else None,
        )  # fmt: skip

    inputs = (x, r, *channels)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, rm, rv, w, b = simple((3, 10, 5, 4), layout, requires_grad=False)
    for second in (False, True):
        for x_ in (x, x[:, :, :, ::2], x.transpose(2, 3)):
            r_ = torch.randn_like(x_)
            args = (x_, w, b, rm.clone(), rv.clone(), True, 0.1, 1e-5, r_, second, w, b,
                    rm.clone(), rv.clone(), True, 0.1, 1e-5, 1, True)  # fmt: skip
            torch.library.opcheck(torch.ops.fused_res.bn_act_fwd.default, args)
            _, mask, stats = torch.ops.fused_res.bn_act_fwd(*args)
            args = (
                torch.randn_like(x_),
                x_,
                w,
                True,
                r_,
                second,
                w,
                True,
                stats,
                mask,
                1,
                True,
                True,
                True,
            )
            torch.library.opcheck(torch.ops.fused_res.bn_act_bwd.default, args)
            sums = torch.randn(4 if second else 2, 10, dtype=torch.float64)
            torch.library.opcheck(torch.ops.fused_res.bn_act_bwd.default, (*args, sums))
            torch.library.opcheck(torch.ops.fused_res.bn_act_statistics.default, (x_,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_statistics_alone(layout, dtype):
    for shape in ((3, 37, 7, 5), (2, 3, 65, 67), (40, 200, 1, 1), (1, 70, 130, 130)):
        assert_statistics(torch.ops.fused_res.bn_act_statistics, shape, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_that_are_given(layout):
    """They are taken for those of x."""
    x, r, dy = (simple((3, 37, 9, 5), layout, requires_grad=False)[0] for _ in range(3))
    w = torch.rand(37) + 0.5
    args = (x, w, torch.zeros(37), None, None, True, 0.1, 1e-5, r, True, w, w, None, None, True,
            0.1, 1e-5, ACTS.index("relu"), True)  # fmt: skip
    y, mask, stats = torch.ops.fused_res.bn_act_fwd(*args)
    sums = torch.randn(4, 37, dtype=torch.float64) * 30
    dx, dw, db, dr, *_ = torch.ops.fused_res.bn_act_bwd(
        dy, x, w, True, r, True, w, True, stats, mask, 1, True, True, False, sums
    )
    g = dy * (y > 0)
    for found, of, rows in ((dx, x, slice(0, 2)), (dr, r, slice(2, 4))):
        exact = gradients_by(sums[rows], g, of, w, stats[rows])
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert dw.numel() == db.numel() == 0


def test_compile_agrees_with_eager():
    x, rm, rv, w, b = simple((4, 16, 6, 6), "channels_last")

    def f(x, w, b, rm, rv):
        return bn_act(x, rm, rv, w, b, True, residual=x * 2).sin()

    outs = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        running = rm.clone(), rv.clone()
        y = run(x, w, b, *running)
        outs.append((y, *torch.autograd.grad(y.sum(), (x, w, b)), *running))
    for a, b_ in zip(*outs, strict=True):
        torch.testing.assert_close(a, b_)


def test_only_the_gradients_that_are_needed():
    x, rm, rv, w, b = simple()
    residual = torch.randn_like(x).requires_grad_()
    for wanted in ([x], [w], [b], [residual], [x, b], [w, residual]):
        everything = [x, w, b, residual]
        for t in everything:
            t.requires_grad_(any(t is v for v in wanted))
        grads = []
        for name in ("cpu", "eager"):
            y = bn_act(x, rm.clone(), rv.clone(), w, b, True, residual=residual, backend=name)
            grads.append(torch.autograd.grad(y, wanted, torch.ones_like(y)))
        for a, b_ in zip(*grads, strict=True):
            torch.testing.assert_close(a, b_, rtol=1e-4, atol=1e-4)


def test_half_precision_parameters():
    """model.bfloat16() makes weights and running statistics bfloat16 too."""
    for dtype in (torch.bfloat16, torch.float16):
        x, rm, rv, w, b = (t.detach().to(dtype) for t in simple((8, 16, 6, 6)))
        outs = []
        for name in ("cpu", "eager"):
            running = rm.clone(), rv.clone()
            w_ = w.clone().requires_grad_()
            y = bn_act(x, *running, w_, b, True, backend=name)
            y.sum().backward()
            assert y.dtype == w_.grad.dtype == running[0].dtype == dtype
            outs.append((y, w_.grad, *running))
        for a, b_ in zip(*outs, strict=True):
            torch.testing.assert_close(a.float(), b_.float(), rtol=4e-2, atol=8e-2)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_channel_mismatch_names_both_numbers(name):
    arguments = dict(
        zip(["x", "running_mean", "running_var", "weight", "bias"], simple(), strict=True)
    )
    arguments[name] = torch.ones(7)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(24,\).*24 channels.*\(7,\)"):
        bn_act(**arguments, training=True)


def test_errors_name_the_argument():
    x, rm, rv, w, b = simple()
    cases = [
        (ValueError, r"residual must have x's shape \(4, 24, 7, 5\), got \(4, 24, 7, 6\)",
         dict(residual=torch.zeros(4, 24, 7, 6))),
        (TypeError, "residual must have x's dtype torch.float32, got torch.float64",
         dict(residual=x.detach().double())),
        (ValueError, "residual must be on x's device, cpu, got meta",
         dict(residual=torch.zeros(4, 24, 7, 5, device="meta"))),
        (ValueError, "residual must be given with residual_norm", dict(residual_norm=Norm(rm, rv))),
        (ValueError, r"residual_norm.weight must have shape \(24,\)",
         dict(residual=x, residual_norm=Norm(rm, rv, torch.ones(3), torch.ones(3), True))),
        (ValueError, "act='gelu' must be one of: none, relu", dict(act="gelu")),
        (ValueError, "backend='cpp' must be one of: auto, cpu", dict(backend="cpp")),
    ]  # fmt: skip
    for error, words, more in cases:
        with pytest.raises(error, match=words):
            bn_act(x, rm, rv, w, b, True, **more)
    with pytest.raises(
        TypeError, match="x must be float32, bfloat16, float16 or float64, got torch.int64"
    ):
        bn_act(x.long(), rm, rv)
    with pytest.raises(
        TypeError, match="weight must be torch.float32 with x of torch.float32, got torch.float64"
    ):
        bn_act(x, rm, rv, w.double(), b.double())
    with pytest.raises(ValueError, match="weight must be on x's device, cpu, got meta"):
        bn_act(x, rm, rv, w.to("meta"), b.to("meta"))
    with pytest.raises(
        ValueError, match=r"x must have 4 dimensions \(N, C, H, W\), got shape \(4, 24, 7\)"
    ):
        bn_act(x[..., 0], rm, rv)
    with pytest.raises(
        ValueError, match="running_mean and running_var must be given when training=False"
    ):
        bn_act(x, None, None, w, b, False)
    with pytest.raises(ValueError, match="weight and bias must both be given or both be None"):
        bn_act(x, rm, rv, w, None)
    assert torch.equal(rm, torch.zeros(24)) and torch.equal(rv, torch.ones(24)), (
        "nothing half-changed"
    )


def test_one_value_per_channel_raises_what_pytorch_raises():
    x = torch.randn(1, 5, 1, 1)
    with pytest.raises(ValueError) as theirs:
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError) as ours:
        bn_act(x, None, None, training=True)
    assert str(ours.value) == str(theirs.value)


def test_raw_op_never_reads_out_of_bounds():
    x, rm, rv, w, b = simple(requires_grad=False)
    rest = (None, False, None, None, None, None, False, 0.1, 1e-5, 1, True)
    with pytest.raises(RuntimeError, match=r"weight must have shape"):
        torch.ops.fused_res.bn_act_fwd(x, w[:3], b, rm, rv, True, 0.1, 1e-5, *rest)
    stats, mask = torch.zeros(5, 24), torch.zeros(3, dtype=torch.uint8)
    rest = (None, False, None, False, stats, mask, 1, True, False, True)
    with pytest.raises(RuntimeError, match="mask is not what"):
        torch.ops.fused_res.bn_act_bwd(x, x, w, True, *rest)
    rest = (None, False, None, False, stats, mask, 0, True, False, True)
    for wrong in (torch.zeros(2, 24), torch.zeros(4, 24).double(), torch.zeros(2, 23).double()):
        with pytest.raises(RuntimeError, match="sums must be float64 of shape"):
            torch.ops.fused_res.bn_act_bwd(x, x, w, True, *rest, wrong)


def test_named_backend_raises_with_the_reason():
    x, rm, rv, w, b = simple()
    if torch.version.cuda is None:
        with pytest.raises(BackendUnavailable, match="'cuda'.*built without CUDA"):
            bn_act(x, rm, rv, w, b, backend="cuda")
        with pytest.raises(BackendUnavailable, match="'cuda'.*built without CUDA"), backend("cuda"):
            pass
    with pytest.raises(ValueError, match="backend='gpu' must be one of"), backend("gpu"):
        pass
    with pytest.raises(BackendUnavailable, match="cpu.*torch.func transform"):
        torch.func.vmap(lambda v: bn_act(v, rm, rv, w, b, backend="cpu"))(
            torch.randn(2, 4, 24, 3, 3)
        )


def test_backends_nest_and_the_inner_one_wins(monkeypatch):
    x, rm, rv, w, b = simple()

    def ran():
        y = bn_act(x, rm, rv, w, b)
        return "fused" if "BnAct" in type(y.grad_fn).__name__ else "eager"

    assert ran() == "fused"
    with backend("eager"):
        assert ran() == "eager"
        with backend("cpu"):
            assert ran() == "fused"
        assert ran() == "eager"
    assert ran() == "fused"
    monkeypatch.setattr(backends, "current", "eager")
    assert ran() == "eager"


def test_saved_for_backward_is_x_and_a_bit_an_element():
    x, rm, rv, w, b = simple((8, 64, 16, 16))
    residual = torch.randn_like(x).requires_grad_()
    saved = []

    def pack(t):
        saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bn_act(x, rm, rv, w, b, True, residual=residual)
    n = x.numel()
    assert sum(saved) == n * 4 + n // 8 + 64 * 4 + 5 * 64 * 4


def test_more_than_two_billion_elements():
    """64-bit addressing, in bytes of float16: 2^31 elements are 4 GB a tensor."""
    if torch.tensor([]).device.type != "cpu" or free_memory() < 11e9:
        pytest.skip("needs 11 GB of free memory")
    n, c = 2**31 // (64 * 64) + 1, 1
    x = torch.zeros(n, c, 64, 64, dtype=torch.float16)
    x.view(-1)[-3:] = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float16)
    with torch.no_grad():
        y = bn_act(x, torch.zeros(1), torch.ones(1), eps=0.0, backend="cpu")
    assert y.view(-1)[-3:].tolist() == [1.0, 0.0, 3.0]


def free_memory():
    try:
        with open("/proc/meminfo") as f:
            return next(
                int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return 0


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (3, 8, 5, 7)])
def test_saved_tensors_may_lose_their_strides(shape):
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    w, b = torch.rand(8) + 0.5, torch.randn(8)
    grads = []
    for dense in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        pack = (lambda t: t.clone(memory_format=torch.contiguous_format)) if dense else lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = bn_act(leaves[0], torch.zeros(8), torch.ones(8), *leaves[1:], True, backend="cpu")
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("channels", [64, 256])
def test_auto_leaves_a_bare_norm_of_many_channels_to_pytorch(channels):
    """In training in channels_last, where nothing follows it and it is small: there the kernel was
    not faster."""
    last = torch.channels_last
    x = torch.randn(4, channels, 7, 7).contiguous(memory_format=last).requires_grad_()
    weight, bias = torch.rand(channels).requires_grad_(), torch.rand(channels).requires_grad_()

    def is_ours(t, **how):
        y = bn_act(t, None, None, weight, bias, training=True, **how)
        return "BnAct" in y.grad_fn.name()

    assert is_ours(x, act="none") == (channels == 64)
    large = torch.randn(4, channels, 32, 32)  # a million elements with 256 channels
    assert is_ours(large.contiguous(memory_format=last).requires_grad_(), act="none")
    assert is_ours(x) and is_ours(x, act="none", residual=torch.ones_like(x))
    assert is_ours(x.detach().contiguous(), act="none")
    assert is_ours(x, act="none", backend="cpu")
    with backend("cpu"):
        assert is_ours(x, act="none")
