"""The op res_block: a whole block in one call each way, against the reference."""

import pytest
import torch
from errors import rule
from res_block_cases import PLANS, Case
from sweeps import sweep
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import FusedResBlock, reference
from fused_res.ops.res_block import _ResBlock, res_block
from fused_res.reference import ACTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_one_call(*args):
    y = res_block(*args, backend="cpu")
    assert type(y.grad_fn).__name__ == f"{_ResBlock.__name__}Backward"
    return y


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_error_is_within_the_rule(plan, dtype, act):
    """Pooled over several draws and over all that is of one kind: a ReLU that rounds to the other
    side of zero moves one value of a few by much."""
    mine, other = [], []
    for training in (True, False):
        for bias, groups in ((False, 1), (True, 4)):
            for _ in range(6):
                case = Case(plan, dtype, training=training, bias=bias, groups=groups)
                ours, theirs, exact = (
                    case.run(call, d, act)
                    for call, d in (
                        (in_one_call, dtype),
                        (reference.res_block, dtype),
                        (reference.res_block, torch.float64),
                    )
                )
                assert [t.dtype for t in ours] == [t.dtype for t in theirs]
                for row, found in ((mine, ours), (other, theirs)):
                    row += [(f.double() - e).flatten() for f, e in zip(found, exact, strict=True)]
    mine, other = torch.cat(mine), torch.cat(other)
    assert mine.isfinite().all()
    assert mine.square().mean() <= 1.5**2 * other.square().mean()


@pytest.mark.parametrize("plan", PLANS)
def test_without_a_relu_every_tensor_is_within_the_rule(plan):
    """Inner ReLUs get large positive biases, so that no sign depends on rounding."""
    cases = []
    for _ in range(24):
        case = Case(plan, torch.float32)
        case.branch = [
            s._replace(norm=s.norm._replace(bias=s.norm.bias.abs() + 8)) for s in case.branch
        ]
        cases.append(case)
    rows = [
        [case.run(call, d, "none")
         for call, d in ((in_one_call, torch.float32), (reference.res_block, torch.float32),
                         (reference.res_block, torch.float64))]
        for case in cases
    ]  # fmt: skip
    for i in range(len(rows[0][0])):
        ours, theirs, exact = (torch.cat([row[k][i].flatten() for row in rows]) for k in range(3))
        rule(ours, theirs, exact, what=f"result {i}")


@pytest.mark.parametrize("plan", PLANS)
def test_only_what_is_wanted(plan):
    """Every gradient is the same, bit by bit, whichever others are wanted."""
    case = Case(plan, torch.float32, bias=True)
    stages, leaves, _ = case.stages(torch.float32)
    x = case.x.float().requires_grad_()
    every = [x, *leaves]
    dy = case.dy.float()
    full = torch.autograd.grad(in_one_call(x, *stages, "relu"), every, dy)
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(12, len(every), generator=generator) < 0.4
    choices = [*choices.tolist(), *torch.eye(len(every), dtype=torch.bool).tolist()]
    for wanted in choices:
        if not any(wanted):
            continue
        for t, flag in zip(every, wanted, strict=True):
            t.requires_grad_(flag)
        y = in_one_call(x, *stages, "relu")
        grads = torch.autograd.grad(y, [t for t in every if t.requires_grad], dy)
        kept = [g for g, flag in zip(full, wanted, strict=True) if flag]
        for a, b in zip(grads, kept, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_recompute_changes_no_bit(plan, dtype, layout):
    case = Case(plan, dtype, bias=True)
    case.x, case.dy = (t.contiguous(memory_format=layout) for t in (case.x, case.dy))

    def again(*args):
        return res_block(*args, backend="cpu", recompute="last")

    for a, b in zip(*(case.run(f, dtype, "relu") for f in (in_one_call, again)), strict=True):
        assert torch.equal(a, b)


def saved_bytes(model, x):
    """Of the tensors that the backward pass keeps, parameters and x left out."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(kept.values()), y


@pytest.mark.parametrize(("recompute", "most"), [(None, 0.85), ("last", 0.6)])
def test_what_a_stage_of_resnet50_keeps(recompute, most):
    """Its blocks at a quarter of their size, of 2 images."""

    def stage(make):
        blocks = [make(64, 256, kind="bottleneck"), *(make(256, 256, kind="bottleneck"),) * 2]
        return nn.Sequential(*blocks).to(memory_format=torch.channels_last)

    x = torch.randn(2, 64, 28, 28).to(memory_format=torch.channels_last).requires_grad_()
    fused = stage(lambda *a, **k: FusedResBlock(*a, **k, backend="cpu", recompute=recompute))
    ours, _ = saved_bytes(fused, x)
    theirs, _ = saved_bytes(stage(reference.ResBlock), x)
    assert ours <= most * theirs


@pytest.mark.parametrize("plan", sweep(PLANS, quick=PLANS.keys() - {"projection"}))
@pytest.mark.parametrize("training", [True, False])
def test_gradgradcheck(plan, training):
    case = Case(plan, torch.float64, shape=(2, 4, 4, 3), training=training, groups=2)
    stages, leaves, _ = case.stages(torch.float64)
    x = case.x.clone().requires_grad_()

    def call(x, *_):
        return in_one_call(x, *stages, "relu_before_add")

    torch.autograd.gradcheck(call, (x, *leaves))
    torch.autograd.gradgradcheck(call, (x, *leaves), atol=1e-4)


def flat(case, dtype=torch.float32):
    """The op's arguments."""
    stages, _, _ = case.stages(dtype)
    found = {}

    def record(x, parameters, *rest):
        found["args"] = (x.detach(), [None if t is None else t.detach() for t in parameters], *rest)
        return torch.ops.fused_res.res_block_fwd(*found["args"])

    module = fused_res.ops.res_block
    before, module._forward = module._forward, record
    try:
        res_block(case.x.to(dtype), *stages, backend="cpu")
    finally:
        module._forward = before
    return found["args"]


@pytest.mark.parametrize("plan", PLANS)
def test_opcheck(plan):
    x, parameters, running, _, *rest, _, _ = flat(Case(plan, torch.float32))
    counters = [torch.zeros((), dtype=torch.long) for _ in range(len(running) // 2)]
    forward = torch.ops.fused_res.res_block_fwd.default
    # Not through AOTAutograd, which cannot functionalise an op that changes its inputs and returns
    # a list: a compiled block is run stage by stage.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for again in (False, True):
        arguments = (x, parameters, running, counters, *rest, True, again)
        torch.library.opcheck(forward, arguments, test_utils=utils)
    y, *saved = forward(x, parameters, running, counters, *rest, True, False)
    integers, _, shortcut, act = rest
    for needs in (1, 2 ** (1 + 3 * (len(running) // 2)) - 1, 0b1000):
        needs &= ~sum(2 << 3 * i + 1 for i in range(4))  # these convolutions have no bias
        torch.library.opcheck(
            torch.ops.fused_res.res_block_bwd.default,
            (torch.randn_like(y), x, parameters, saved, integers, shortcut, act, False, needs),
        )


def test_counts_batches_and_updates_running_statistics():
    block, twin = FusedResBlock(8, 12, 2), reference.ResBlock(8, 12, 2)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(4, 8, 9, 9)
    for train in (True, True, False):
        for m in (block.train(train), twin.train(train)):
            m(x)
    for (name, a), b in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert block.bn1.num_batches_tracked == 2


def runs_whole(block, x):
    y = block(x)
    return type(y.grad_fn).__name__ == "_ResBlockBackward"


def test_a_block_takes_one_call_where_nothing_is_in_the_way():
    x = torch.randn(2, 8, 6, 6)
    assert runs_whole(FusedResBlock(8, 8, backend="cpu"), x)
    assert runs_whole(FusedResBlock(8, 16, 2, kind="bottleneck", backend="cpu").eval(), x)
    assert not runs_whole(FusedResBlock(8, 8, backend="eager"), x)
    assert not runs_whole(FusedResBlock(8, 8, backend="cpu"), torch.randn(129, 8, 64, 64))  # large
    assert not runs_whole(FusedResBlock(8, 8, dropout=0.5, backend="cpu"), x)
    assert not runs_whole(FusedResBlock(8, 8, skip="concat", backend="cpu"), x)
    assert not runs_whole(FusedResBlock(8, 8, momentum=None, backend="cpu"), x)
    assert not runs_whole(FusedResBlock(8, 8, track_running_stats=False, backend="cpu"), x)


@pytest.mark.parametrize(
    "change", ["hook", "class", "padding", "same", "parametrization", "circular"]
)
def test_a_changed_convolution_is_called_as_a_module(change):
    block, twin = FusedResBlock(8, 8, backend="cpu"), reference.ResBlock(8, 8)
    twin.load_state_dict(block.state_dict())
    seen = []
    for m in (block, twin):
        if change == "hook":
            m.conv2.register_forward_hook(lambda *_: seen.append(1))
        elif change == "class":
            m.conv2.__class__ = type("Scaled", (nn.Conv2d,), {
                "forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)})  # fmt: skip
        elif change == "padding":
            m.conv1.padding, m.conv2.padding = (0, 0), (2, 2)
        elif change == "same":
            m.conv1.padding = "same"
        elif change == "circular":
            m.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False, padding_mode="circular")
            m.conv1.weight.data = twin.conv2.weight.data.clone()
        else:
            torch.nn.utils.parametrizations.weight_norm(m.conv1)
    x = torch.randn(2, 8, 6, 6)
    assert runs_whole(block, x) == (change == "padding")
    twin(x)
    torch.testing.assert_close(block(x), twin(x))
    assert len(seen) == (4 if change == "hook" else 0)


def test_shapes_that_broadcast_follow_pytorch():
    block, twin = FusedResBlock(8, 8, backend="cpu"), reference.ResBlock(8, 8)
    twin.load_state_dict(block.state_dict())
    for m in (block, twin):
        m.conv1.stride = (6, 6)  # the branch ends in one pixel, which is added to every one of x
    x = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(block(x), twin(x))
    torch.testing.assert_close(block.bn1.running_mean, twin.bn1.running_mean)
    assert block.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("no_grad", [False, True])
def test_eps_is_what_pytorch_takes(dtype, no_grad):
    block = FusedResBlock(8, 8, backend="cpu").to(dtype)
    twin = reference.ResBlock(8, 8).to(dtype)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 5, 5, dtype=dtype)
    for eps, training in ((0.0, True), (-1.0, True), (-1.0, False)):
        for net in (block, twin):
            net.train(training).bn2.eps = eps
            with torch.set_grad_enabled(not no_grad), pytest.raises(ValueError, match="eps.* must"):
                net(x)
    for net in (block, twin):
        net.eval().bn2.eps = 0.0
    with torch.set_grad_enabled(not no_grad):
        agree = {"rtol": 0.05, "atol": 0.05} if dtype != torch.float32 else {}
        torch.testing.assert_close(block(x), twin(x), **agree)


def test_errors_are_pytorchs_and_nothing_is_done():
    block = FusedResBlock(8, 8, backend="cpu")
    state = {k: v.clone() for k, v in block.state_dict().items()}
    with pytest.raises(RuntimeError, match="expected input.* to have 8 channels, but got 6"):
        block(torch.randn(2, 6, 5, 5))
    with pytest.raises(RuntimeError, match="expected scalar type Double but found Float"):
        block(torch.randn(2, 8, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 8, 1, 1))
    for name, t in block.state_dict().items():
        if "bn2" in name or not name.endswith("num_batches_tracked"):
            assert torch.equal(t, state[name]), name
    stage = Case("single", torch.float32).stages(torch.float32)[0][0][0]
    with pytest.raises(ValueError, match="at least one stage"):
        res_block(torch.randn(2, 12, 5, 5), [])
    with pytest.raises(ValueError, match="recompute='all' must be None or 'last'"):
        res_block(torch.randn(2, 12, 5, 5), [stage], recompute="all")
    with pytest.raises(ValueError, match="recompute=True must be None or 'last'"):
        FusedResBlock(8, 8, recompute=True)
    with pytest.raises(ValueError, match="act='gelu' must be one of"):
        res_block(torch.randn(2, 12, 5, 5), [stage], act="gelu")
    with pytest.raises(ValueError, match=r"weight must have shape \(12,\)"):
        narrow = stage.norm._replace(weight=torch.ones(3), bias=torch.ones(3))
        res_block(torch.randn(2, 12, 5, 5), [stage._replace(norm=narrow)], backend="cpu")


class Seen(TorchDispatchMode):
    """What PyTorch's counters of operations, and selective checkpointing, are made of."""

    def __init__(self):
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_modes_that_look_at_operations_see_the_convolutions():
    block = FusedResBlock(8, 8, backend="cpu")
    with Seen() as seen:
        block(torch.randn(2, 8, 6, 6))
    assert seen.convolutions == 2


@pytest.mark.parametrize("plan", ["basic", "projection"])
def test_autocast_as_in_pytorch(plan):
    args = (8, 8) if plan == "basic" else (8, 16, 2)
    block, twin = FusedResBlock(*args, backend="cpu"), reference.ResBlock(*args)
    twin.load_state_dict(block.state_dict())
    for x in (torch.randn(4, 8, 8, 8), torch.randn(4, 8, 8, 8).bfloat16()):
        results = []
        for m in (block, twin):
            m.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = m(leaf)
            y.float().square().mean().backward()
            results.append((y, leaf.grad, *(p.grad for p in m.parameters())))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert (a - b).float().norm() <= 0.05 * b.float().norm() + 1e-6


def test_saved_tensors_that_change_are_noticed():
    block = FusedResBlock(8, 8, backend="cpu")
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    y = block(x)
    with torch.no_grad():
        block.conv2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- what else PyTorch's blocks do


def doubles(kind="basic"):
    block, twin = (f(4, 4, kind=kind).double() for f in (FusedResBlock, reference.ResBlock))
    block.backend = "cpu"
    twin.load_state_dict(block.state_dict())
    return block, twin


def second_derivatives(m, y):
    (g,) = torch.autograd.grad(y.square().sum(), m.conv1.weight, create_graph=True)
    return torch.autograd.grad(g.square().sum(), list(m.parameters()), allow_unused=True)


def test_second_derivatives_of_a_block_used_twice():
    x = torch.randn(2, 4, 5, 5).double()
    block, twin = doubles()
    for a, b in zip(*(second_derivatives(m, m(m(x))) for m in (block, twin)), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_of_tied_weights():
    x = torch.randn(2, 4, 5, 5).double()
    results = []
    for m in doubles():
        w = m.conv1.weight.detach().clone().requires_grad_()
        weights = {"conv1.weight": w, "conv2.weight": 2 * w}
        y = torch.func.functional_call(m, weights, (x,))
        (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        results.append((g, *torch.autograd.grad(g.square().sum(), w)))
        w = w.detach().clone().requires_grad_()
    torch.testing.assert_close(*results)


def test_second_derivatives_ignore_an_autocast_around_backward():
    x = torch.randn(2, 4, 5, 5)
    results = []
    for m in doubles():
        m.float()
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(torch.autograd.grad(y.square().sum(), leaf, create_graph=True)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (3, 8, 5, 7)])
def test_saved_tensors_may_lose_their_strides(shape):
    block = FusedResBlock(8, 8, backend="cpu").to(memory_format=torch.channels_last)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    grads = []
    for dense in (False, True):
        leaf = x.clone().requires_grad_()
        pack = (lambda t: t.clone(memory_format=torch.contiguous_format)) if dense else lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(leaf)
        grads.append(torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)  # convolutions in another layout


def test_forward_mode_tangents_of_a_parameter():
    fad = torch.autograd.forward_ad
    x = torch.randn(2, 4, 5, 5)
    tangents = []
    for m in doubles():
        m.float().backend = None  # auto: a named one cannot run this
        with fad.dual_level(), torch.no_grad():
            w = fad.make_dual(m.conv1.weight.detach(), torch.ones_like(m.conv1.weight))
            y = torch.func.functional_call(m, {"conv1.weight": w}, (x,))
            tangents.append(fad.unpack_dual(y).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


def test_batches_of_gradients():
    x = torch.randn(2, 4, 5, 5).double()
    dy = torch.randn(3, 2, 4, 5, 5).double()
    results = []
    for m in doubles():
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(m(leaf), leaf, dy, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


class Scaled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out.as_subclass(torch.Tensor) if func is torch.nn.functional.conv2d else out


@pytest.mark.parametrize("change", ["subclass", "no bias", "no counter", "int stride", "deep"])
def test_unusual_modules_are_run_stage_by_stage(change):
    """All but sizes as numbers, which are as usual as pairs."""
    block, twin = doubles("single")
    x = torch.randn(2, 4, 5, 5).double()
    for m in (block, twin):
        if change == "subclass":
            m.conv1.weight = nn.Parameter(m.conv1.weight.detach().as_subclass(Scaled))
        elif change == "no bias":
            del m.conv1._parameters["bias"]
            m.conv1.bias = None
        elif change == "no counter":
            del m.bn1.num_batches_tracked
            m.bn1.num_batches_tracked = None
        elif change == "int stride":
            m.conv1.stride = 1
    if change == "deep":
        stages = Case("single", torch.float64).stages(torch.float64)[0][0] * 24
        x = torch.randn(2, 12, 5, 5).double()
        y = res_block(x, stages, backend="cpu")
        assert type(y.grad_fn).__name__ != "_ResBlockBackward"
        torch.testing.assert_close(y, reference.res_block(x, stages))
        return
    assert runs_whole(block, x) == (change == "int stride")
    twin(x)
    torch.testing.assert_close(block(x), twin(x))


def test_running_out_of_memory_is_an_out_of_memory_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail] CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(fused_res.ops.res_block, "_forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2.00 GiB"):
        FusedResBlock(8, 8, backend="cpu")(torch.randn(2, 8, 6, 6))
