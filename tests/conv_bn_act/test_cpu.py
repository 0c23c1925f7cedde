"""The op conv_bn_act, eval mode: against fp64 by the 1.5 x rule on every way the CPU can run it,
under autograd and the compiler, its errors, and the blocks that run it."""

import contextlib
import copy
import statistics

import pytest
import torch
from errors import FACTOR, half_ulp, rms
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, instruction_set
from torch.utils._python_dispatch import TorchDispatchMode

from fused_res import BackendUnavailable, FusedResBlock, Norm, env, reference
from fused_res.dispatch import backends, inference_conv
from fused_res.ops import conv_bn_act as op
from fused_res.ops.conv_bn_act import Call, conv_bn_act, run_as
from fused_res.reference import ACTS, ConvNorm

pytestmark = pytest.mark.skipif(
    backends.STATUS["cpu"] is not None, reason=f"no CPU library: {backends.STATUS['cpu']}"
)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
HALVES = (torch.bfloat16, torch.float16)
SECONDS = ("none", "add", "concat", "shortcut")


def pair(n):
    return (n, n) if isinstance(n, int) else tuple(n)


class Case:
    """Fresh inputs of one call, in fp64 but exactly representable in ``dtype``.

    The activations are those after a ReLU, the weights He's, the BatchNorm as after training.

    Args:
        norm: ``affine``, ``plain`` (no weight and bias) or None.
        second: what is added or put beside the result: see SECONDS.
        layout: of all activations; ``strided``: every second pixel of a larger tensor.
        weights: memory format of the weights.
        mixed: 16-bit convolutions with float32 BatchNorms, else everything in ``dtype``.
    """

    def __init__(
        self, shape, k, kernel=3, dtype=torch.float32, *, stride=1, padding=None, dilation=1,
        groups=1, bias=False, norm="affine", second="none", act="relu", layout="nchw",
        weights="nchw", mixed=False,
    ):  # fmt: skip
        self.dtype, self.act, self.second, self.mixed = dtype, act, second, mixed
        self.layout, self.weights = layout, weights
        stride, kernel, dilation = pair(stride), pair(kernel), pair(dilation)
        padding = tuple(s // 2 for s in kernel) if padding is None else pair(padding)
        n, c = shape[:2]
        self.x = self._image(shape)
        self.conv = self._conv(c, k, kernel, stride, padding, dilation, groups, bias, norm)
        p, q = (
            (shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        self.outputs = n * k * p * q
        self.residual = self.shortcut = None
        if second == "shortcut":  # 1x1 with stride 2, as at the start of a stage
            self.residual = self._image((n, c + 5, 2 * p - 1, 2 * q - 1))
            self.shortcut = self._conv(
                c + 5, k, (1, 1), (2, 2), (0, 0), (1, 1), 1, not bias, norm if c % 3 else "affine"
            )
        elif second != "none":
            self.residual = self._image((n, k if second == "add" else c + 2, p, q))

    def _round(self, t):
        return t.to(self.dtype).double()

    def _image(self, shape):
        return self._round(torch.randn(shape).relu())

    def _conv(self, c, k, kernel, stride, padding, dilation, groups, bias, norm):
        fan_in = c // groups * kernel[0] * kernel[1]
        weight = self._round(torch.randn(k, c // groups, *kernel) * (2 / fan_in) ** 0.5)
        offset = self._round(torch.randn(k) * 0.3) if bias else None
        if norm is not None:
            channels = [torch.randn(k) * 0.3, torch.rand(k) * 1.5 + 0.5]
            affine = [torch.rand(k) + 0.5, torch.randn(k) * 0.3] if norm == "affine" else []
            channels = [self._round(t) for t in channels + affine]
            norm = Norm(*channels, *[None] * (4 - len(channels)))
        return ConvNorm(weight, offset, stride, padding, dilation, groups, norm)

    def arguments(self, dtype, layout=None):
        """Of ``conv_bn_act``: all tensors new ones of ``dtype``, the BatchNorms' as ``mixed``."""
        layout = layout or self.layout
        parameter = torch.float32 if self.mixed and dtype in HALVES else dtype

        def image(t):
            if t is None:
                return None
            t = t.to(dtype)
            if layout == "strided":
                n, c, h, w = t.shape
                wide = torch.full((n, c + 1, h, 2 * w), float("nan"), dtype=dtype)
                wide[:, 1:, :, ::2] = t
                return wide[:, 1:, :, ::2]
            return t.contiguous(memory_format=LAYOUTS[layout]).clone()

        def stage(conv):
            if conv is None:
                return None
            weight = conv.weight.to(dtype).contiguous(memory_format=LAYOUTS[self.weights]).clone()
            bias = None if conv.bias is None else conv.bias.to(dtype).clone()
            norm = conv.norm
            if norm is not None:
                channels = [None if t is None else t.to(parameter).clone() for t in norm[:4]]
                norm = norm._replace(**dict(zip(norm._fields, channels, strict=False)))
            return conv._replace(weight=weight, bias=bias, norm=norm)

        concat = self.second == "concat"
        images = image(self.x), image(self.residual)
        return images[0], stage(self.conv), images[1], stage(self.shortcut), concat, self.act

    @torch.no_grad()
    def run(self, dtype, how="eager", layout=None):
        """``how``: a backend, an implementation of the CPU backend, or ``reference``."""
        arguments = self.arguments(dtype, layout)
        if how == "reference":
            return reference.conv_bn_act(*arguments)
        poison(arguments[0], arguments[1].weight)
        if how in backends.STATUS or how == "auto":
            return conv_bn_act(*arguments, backend=how)
        return run_as(Call(*arguments), inference_conv.Candidate(how, "the test's"))

    def runs(self, implementation):
        """Whether an implementation of the CPU backend can run the call."""
        call = Call(*self.arguments(self.dtype))
        return inference_conv.why_not(call, "cpu")[implementation] is None


def poison(x, weight):
    """Leaves freed blocks full of NaN, which the next outputs and scratch are made of."""
    n, c, h, w = x.shape
    transformed = 36 * weight.numel() if weight.numel() < 20000 else 0
    sizes = (n * weight.size(0) * h * w, n * c * (h + 6) * (w + 6), transformed)
    junk = [torch.full((size,), float("nan"), dtype=x.dtype) for size in sizes for _ in range(2)]
    del junk


@contextlib.contextmanager
def winograd(limit):
    """As if FUSED_RES_WINOGRAD had been ``limit`` when fused_res was imported."""
    before, env.settings = env.settings, env.settings._replace(winograd=limit)
    inference_conv.forget()
    try:
        yield
    finally:
        env.settings = before
        inference_conv.forget()


PIECE = 512  # outputs: of fewer the largest error is luck


def assert_rule(cases, how="cpu"):
    """The rule, over all outputs of all cases: by RMS, and by the median of the largest errors of
    pieces.

    PyTorch's error is that of its worse memory format: of 512 channels its NCHW kernels sum in an
    order that is 4.5 times nearer than its channels_last ones, which backend ``cpu`` takes.
    """
    mine, theirs, floor = [], {layout: [] for layout in LAYOUTS}, 0.0
    for case in cases:
        exact = case.run(torch.float64, "reference")
        ours = case.run(case.dtype, how)
        assert ours.dtype == case.dtype and ours.shape == exact.shape
        assert ours.isfinite().all(), f"{how}: an output is not written"
        mine.append((ours.double() - exact).flatten())
        for layout, found in theirs.items():
            found.append((case.run(case.dtype, layout=layout).double() - exact).flatten())
        floor = max(floor, half_ulp(exact, case.dtype))
    mine, *theirs = (torch.cat(found) for found in (mine, *theirs.values()))
    a, b = rms(mine), max(floor, *map(rms, theirs))
    assert a <= FACTOR * b, f"{how}: rms error {a:.3g}, PyTorch's {b:.3g}"
    ratios = []
    if mine.numel() < 3 * PIECE:
        return
    for piece, *others in zip(*(t.split(PIECE) for t in (mine, *theirs)), strict=True):
        other = max(floor, *(t.abs().max().item() for t in others))
        ratios.append(piece.abs().max().item() / other if other else 0.0)
    assert statistics.median(ratios) <= FACTOR, f"{how}: largest errors by PyTorch's {ratios}"


def draws(*args, numbers=1500, **kwargs):
    """At least five cases, and so many that they make ``numbers`` outputs."""
    cases, made = [], 0
    while len(cases) < 5 or (made < numbers and len(cases) < 20):
        cases.append(Case(*args, **kwargs))
        made += cases[-1].outputs
    return cases


SELECTION = {
    "1x1": dict(shape=(2, 24, 9, 7), k=40, kernel=1),
    "1x1 stride 2": dict(shape=(2, 40, 9, 7), k=24, kernel=1, stride=2),
    "1x1 padded": dict(shape=(2, 7, 5, 6), k=7, kernel=1, padding=1),
    "3x3": dict(shape=(2, 24, 9, 7), k=40),
    "3x3 unpadded": dict(shape=(2, 24, 9, 7), k=40, padding=0),
    "3x3 padded by 2": dict(shape=(2, 8, 6, 7), k=8, padding=(2, 1)),
    "3x3 stride 2": dict(shape=(2, 24, 9, 8), k=40, stride=2),
    "3x3 stride (2, 1)": dict(shape=(2, 7, 9, 8), k=24, stride=(2, 1)),
    "3x3 dilated": dict(shape=(2, 24, 9, 11), k=8, dilation=2, padding=2),
    "3x3 groups": dict(shape=(2, 24, 7, 7), k=48, groups=3),
    "depthwise": dict(shape=(2, 40, 9, 7), k=40, groups=40),
    "depthwise multiplied": dict(shape=(2, 7, 9, 7), k=21, groups=7, stride=2),
    "odd channels": dict(shape=(2, 7, 9, 7), k=3),
    "one channel": dict(shape=(3, 1, 9, 7), k=1),
    "130 channels": dict(shape=(2, 130, 5, 6), k=7),
    "5x5": dict(shape=(2, 3, 9, 8), k=24, kernel=5),
    "7x7 stem": dict(shape=(2, 3, 17, 19), k=24, kernel=7, stride=2, padding=3),
    "1x3": dict(shape=(2, 24, 6, 9), k=8, kernel=(1, 3)),
    "5x3 dilated": dict(shape=(2, 8, 12, 9), k=8, kernel=(5, 3), dilation=(2, 1), padding=(3, 0)),
    "1x1 map": dict(shape=(5, 16, 1, 1), k=24),
    "map under a tile": dict(shape=(3, 16, 2, 3), k=24),
    "one row": dict(shape=(2, 16, 1, 13), k=8),
    "exact tiles": dict(shape=(2, 16, 8, 8), k=16),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", SELECTION)
def test_within_the_rule(name, dtype):
    """Each kind of convolution, with what varies beside it passing by in turn."""
    turn = list(SELECTION).index(name)
    with winograd(2):
        for i, second in enumerate(SECONDS):
            options = dict(
                second=second,
                act=ACTS[(turn + i) % 3],
                bias=(turn + i) % 2 == 0,
                norm=("affine", "affine", "plain", None)[(turn // 2 + i) % 4],
                layout=("nchw", "channels_last", "strided")[(turn + 2 * i) % 3],
                weights=("nchw", "channels_last")[(turn // 3 + i) % 2],
                mixed=i % 2 == 0,
            )
            how = ("cpu", "auto")[(turn + i // 2) % 2]
            assert_rule(draws(dtype=dtype, **SELECTION[name], **options), how)


@pytest.mark.parametrize("norm", ["affine", "plain", None])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("second", SECONDS)
def test_every_ending(second, act, norm):
    """What follows the convolution, for ATen's kernels and for the native ones."""
    for layout in LAYOUTS:
        for bias in (False, True):
            options = dict(layout=layout, bias=bias, norm=norm, act=act, second=second)
            cases = draws((2, 16, 6, 7), 24, **options)
            for how in ("onednn", "winograd2"):
                assert cases[0].runs(how)
                assert_rule(cases, how)


@st.composite
def grid(draw):
    """Arguments of ``Case``: the randomised grid that every way to run a call is held to."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.just((3, 3)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(2))
    extent = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    h, w = (max(1, e) + draw(st.integers(0, 9)) for e in extent)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c, k = (groups * draw(st.sampled_from([1, 2, 5, 8, 16])) for _ in range(2))
    return ((draw(st.integers(2, 3)), c, h, w), k, kernel), dict(
        stride=draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (1, 3)])),
        padding=padding,
        dilation=dilation,
        groups=groups,
        dtype=draw(st.sampled_from([torch.float32, *HALVES])),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["affine", "plain", None])),
        second=draw(st.sampled_from(SECONDS)),
        act=draw(st.sampled_from(ACTS)),
        layout=draw(st.sampled_from(["nchw", "channels_last", "strided"])),
        weights=draw(st.sampled_from(list(LAYOUTS))),
        mixed=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(arguments=grid(), isa=st.sampled_from(ISAS))
def test_any_call_within_the_rule(arguments, isa):
    torch.manual_seed(sum(arguments[0][0]))
    with instruction_set(isa), winograd(2):
        assert_rule(draws(*arguments[0], **arguments[1], numbers=500))


@st.composite
def winograd_grid(draw):
    n, h, w = (draw(st.integers(1, most)) for most in (3, 13, 13))
    c, k = (8 * draw(st.integers(1, 5)) for _ in range(2))
    padding = tuple(draw(st.integers(0 if size > 2 else 1, 3)) for size in (h, w))
    return ((n, c, h, w), k), dict(
        padding=padding,
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["affine", "plain", None])),
        second=draw(st.sampled_from(SECONDS)),
        act=draw(st.sampled_from(ACTS)),
        layout=draw(st.sampled_from(["nchw", "channels_last", "strided"])),
        weights=draw(st.sampled_from(list(LAYOUTS))),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(arguments=winograd_grid(), isa=st.sampled_from(ISAS))
def test_any_winograd_call(arguments, isa):
    """The small tile within the rule; the large one within a bound of its own."""
    torch.manual_seed(sum(arguments[0][0]))
    cases = draws(*arguments[0], **arguments[1], numbers=1600)
    with instruction_set(isa):
        assert_bound(cases, "winograd4")
        if min(arguments[0][0][2:]) > 2:  # of one row its largest error is up to 1.75 x PyTorch's
            assert_rule(cases, "winograd2")
        else:
            assert_bound(cases, "winograd2")


WINOGRAD4_BOUND = 5e-6  # RMS error by RMS of the output, a convolution


def assert_bound(cases, how):
    exact = [case.run(torch.float64, "reference") for case in cases]
    ours = [case.run(torch.float32, how).double() for case in cases]
    assert all(t.isfinite().all() for t in ours), f"{how}: an output is not written"
    a = rms(torch.cat([(t - e).flatten() for t, e in zip(ours, exact, strict=True)]))
    b = rms(torch.cat([e.flatten() for e in exact]))
    assert a <= WINOGRAD4_BOUND * b, f"{how}: relative rms error {a / b:.3g}"


@pytest.mark.parametrize("c, k, size", [(256, 256, 14), (512, 512, 7), (64, 128, 29), (8, 512, 5)])
def test_many_channels(c, k, size):
    cases = [Case((2, c, size, size), k, norm=None, act="none", layout="channels_last")]
    for how in ("winograd2", "onednn"):
        assert_rule(cases, how)
    assert_bound(cases, "winograd4")


def test_the_setting_limits_the_tile():
    case = Case((2, 64, 14, 14), 64)
    for limit, allowed in ((0, []), (2, ["winograd2"]), (4, ["winograd2", "winograd4"])):
        with winograd(limit):
            assert [how for how in ("winograd2", "winograd4") if case.runs(how)] == allowed
            call = Call(*case.arguments(torch.float32))
            chosen = {inference_conv.choose(call, name).implementation for name in ("auto", "cpu")}
            assert not chosen & ({"winograd2", "winograd4"} - set(allowed))
            why = inference_conv.why_not(call, "cpu")["winograd4"]
            assert limit == 4 or f"FUSED_RES_WINOGRAD={limit}" in why


@pytest.mark.parametrize(
    ("shape", "k", "kernel", "stride", "sets"),
    [
        ((1, 16, 32, 32), 32, 3, 2, {"avx2", "avx512"}),
        ((1, 64, 56, 56), 64, 3, 2, {"avx512"}),
        ((1, 96, 40, 40), 96, 1, 1, {"avx512"}),
        ((1, 8, 230, 230), 160, 1, 1, {"avx2", "avx512"}),
        ((1, 8, 230, 230), 160, 3, 2, set()),
        ((1, 8, 460, 460), 160, 3, 2, {"avx512"}),
    ],
    ids=["small", "3x3", "1x1", "large 1x1 output", "3x3 of much work", "large 3x3 output"],
)
def test_where_a_direct_convolution_is_expected_to_win(shape, k, kernel, stride, sets):
    options = dict(kernel=kernel, stride=stride, second="none", layout="channels_last")
    call = Call(*Case(shape, k, **options).arguments(torch.float32))
    for isa in ISAS:
        inference_conv.forget()
        with instruction_set(isa) as got:
            chosen = inference_conv.choose(call, "cpu").implementation
            assert chosen == ("direct" if got in sets else "onednn"), isa


def test_wrong_setting_is_named():
    assert env.read({}).winograd == 4 and env.read({"FUSED_RES_WINOGRAD": "0"}).winograd == 0
    with pytest.raises(ValueError, match="FUSED_RES_WINOGRAD='3' must be one of: 4, 2, 0"):
        env.read({"FUSED_RES_WINOGRAD": "3"})


WAYS = [name for name, way in op.IMPLEMENTATIONS.items() if way.backend == "cpu"]


@pytest.mark.parametrize("how", WAYS)
def test_bitwise_the_same_for_any_number_of_threads_and_from_run_to_run(how):
    before = torch.get_num_threads()
    try:
        for options in (dict(second="add"), dict(second="concat", layout="channels_last")):
            case = Case((3, 40, 13, 11), 72, **options)
            results = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append(case.run(torch.float32, how))
            for other in results[1:]:
                assert torch.equal(results[0], other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_not_changed_and_outputs_are_new(how, layout):
    for second in SECONDS:
        for norm, act in (("affine", "relu"), (None, "none")):
            case = Case((2, 16, 6, 5), 16, second=second, norm=norm, act=act, layout=layout)
            arguments = case.arguments(torch.float32)
            before = case.arguments(torch.float32)
            with torch.no_grad():
                y = run_as(Call(*arguments), inference_conv.Candidate(how, "the test's"))
                y.fill_(float("nan"))
            for a, b in zip(arguments[:4], before[:4], strict=True):
                torch.testing.assert_close(tensors_of(a), tensors_of(b), rtol=0, atol=0)


def tensors_of(argument):
    if isinstance(argument, torch.Tensor):
        return [argument]
    if not isinstance(argument, tuple):
        return []
    return [t for part in argument for t in tensors_of(part)]


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize("weights", LAYOUTS)
def test_strides_are_pytorchs(layout, weights):
    for c, kernel in ((16, 3), (16, 1), (7, 3)):
        for second in SECONDS:
            case = Case((2, c, 6, 5), 24, kernel, layout=layout, weights=weights, second=second)
            eager = case.run(torch.float32)
            for how in WAYS:
                if case.runs(how):
                    assert case.run(torch.float32, how).stride() == eager.stride(), (how, second)


def test_zero_size_batch():
    for dtype in (torch.float32, torch.bfloat16):
        for second in SECONDS:
            for kernel in (1, 3):
                case = Case((0, 16, 6, 5), 16, kernel, dtype, second=second)
                for how in ("cpu", "auto"):
                    eager, ours = case.run(dtype), case.run(dtype, how)
                    assert ours.shape == eager.shape and ours.dtype == dtype


@pytest.mark.parametrize("how", ["onednn", "winograd2"])
@pytest.mark.parametrize("act", ACTS)
def test_not_finite_values_reach_every_output_they_do_in_pytorch(how, act):
    """Winograd's tiles may carry them a little further: see the next test."""
    case = Case((2, 16, 12, 12), 16, second="add", act=act)
    case.x[0, 3, 5, 6] = float("nan")
    case.residual[1, 2, 3, 4] = float("nan")
    eager, ours = case.run(torch.float32), case.run(torch.float32, how)
    assert eager.isnan().sum() == 16 * 9 + 1
    assert ours[eager.isnan()].isnan().all()
    if how == "onednn":
        assert torch.equal(ours.isnan(), eager.isnan())
    case = Case((2, 16, 12, 12), 16, act="none")
    case.x[0, 3, 5, 6] = float("inf")
    eager, ours = case.run(torch.float32), case.run(torch.float32, how)
    assert not ours[~eager.isfinite()].isfinite().any()


@pytest.mark.parametrize("tile", [2, 4])
def test_not_finite_values_stay_in_the_tiles_that_read_them(tile):
    case = Case((2, 16, 16, 16), 16, act="none")
    case.x[0, 3, 5, 6] = float("nan")
    wrong = case.run(torch.float32, f"winograd{tile}").isnan()
    assert not wrong[1].any()
    rows, columns = wrong[0].any(0).any(1).nonzero(), wrong[0].any(0).any(0).nonzero()
    assert rows.min() >= 4 - tile and rows.max() <= 6 + tile
    assert columns.min() >= 5 - tile and columns.max() <= 7 + tile


def leaves_of(arguments, frozen=()):
    """The floating-point tensors of a call that may require grad, by name."""
    x, conv, residual, shortcut = arguments[:4]
    found = {"x": x, "residual": residual}
    for name, stage in (("conv", conv), ("shortcut", shortcut)):
        if stage is not None:
            found |= {f"{name}.weight": stage.weight, f"{name}.bias": stage.bias}
            if stage.norm is not None:
                found |= {f"{name}.gamma": stage.norm.weight, f"{name}.beta": stage.norm.bias}
    return {n: t for n, t in found.items() if t is not None and n not in frozen}


@pytest.mark.parametrize("second", SECONDS)
def test_gradients_are_the_references(second):
    for act, norm, name in (("relu", "affine", "cpu"), ("relu_before_add", "affine", "auto"),
                            ("none", None, "auto"), ("relu", "plain", "cpu")):  # fmt: skip
        case = Case((2, 8, 6, 5), 16, second=second, act=act, norm=norm, bias=True)
        outs = []
        for dtype, f in (
            (torch.float32, lambda *a, name=name: conv_bn_act(*a, backend=name)),
            (torch.float64, reference.conv_bn_act),
        ):
            arguments = case.arguments(dtype)
            leaves = [t.requires_grad_() for t in leaves_of(arguments).values()]
            y = f(*arguments)
            assert y.requires_grad
            outs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_only_the_gradients_that_are_needed():
    case = Case((2, 8, 6, 5), 16, second="shortcut", bias=True)
    for wanted in leaves_of(case.arguments(torch.float32)):
        grads = []
        for f in (lambda *a: conv_bn_act(*a, backend="cpu"), reference.conv_bn_act):
            arguments = case.arguments(torch.float32)
            leaf = leaves_of(arguments)[wanted].requires_grad_()
            grads.append(torch.autograd.grad(f(*arguments).sum(), leaf)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_gradgradcheck(second, act):
    case = Case((2, 2, 4, 3), 2, dtype=torch.float64, second=second, act=act, bias=True, stride=1)
    for stage in (case.conv, case.shortcut):  # no sum in reach of the ReLU's corner
        if stage is not None:
            stage.norm.bias.copy_(torch.tensor([9.0, -9.0]))
    if second == "concat":
        case.residual += 0.5
    arguments = case.arguments(torch.float64)
    leaves = [t.requires_grad_() for t in leaves_of(arguments).values()]

    def f(*_):
        return conv_bn_act(*arguments)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_no_grad_and_inference_mode_and_grad_mode_without_leaves():
    case = Case((2, 16, 6, 5), 24, second="add")
    outs = []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        arguments = case.arguments(torch.float32)
        with mode():
            outs.append(conv_bn_act(*arguments, backend="cpu"))
        assert not outs[-1].requires_grad and outs[-1].is_inference() == (
            mode is torch.inference_mode
        )
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("second, layout", [("concat", "nchw"), ("shortcut", "channels_last")])
def test_compile_agrees_with_eager_for_any_batch(second, layout, fresh_compiler):
    f = torch.compile(conv_bn_act, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        case = Case((batch, 16, 6, 5), 24, second=second, layout=layout)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=batch == 5):
            expected = conv_bn_act(*case.arguments(torch.float32))
            y = f(*case.arguments(torch.float32))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()


class OpCalls(TorchDispatchMode):
    """Collects the calls of our op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fused_res.conv_bn_act.default:
            self.calls.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "second, layout, c, dtype",
    [
        ("none", "strided", 1, torch.float32),
        ("add", "channels_last", 16, torch.bfloat16),
        ("concat", "nchw", 7, torch.float32),
        ("shortcut", "channels_last", 16, torch.float32),
    ],
)
def test_opcheck(second, layout, c, dtype, fresh_compiler):
    case = Case((2, c, 6, 5), c, dtype=dtype, second=second, layout=layout, bias=True)
    seen = OpCalls()

    def compiler(graph, _, seen=seen):
        def run(*arguments):
            with seen:
                return graph(*arguments)

        return run

    with torch.no_grad():
        compiled = torch.compile(conv_bn_act, fullgraph=True, backend=compiler)
        compiled(*case.arguments(dtype), backend="cpu")
    (args,) = seen.calls
    torch.library.opcheck(torch.ops.fused_res.conv_bn_act.default, args)


def test_autocast():
    for second in SECONDS:
        for dtype in HALVES:
            case = Case((2, 16, 6, 5), 24, dtype=dtype, second=second, bias=True)
            arguments = case.arguments(torch.float32)
            exact = case.run(torch.float64, "reference")
            with torch.no_grad(), torch.autocast("cpu", dtype):
                for name in ("cpu", "auto", "eager"):
                    ours = conv_bn_act(*arguments, backend=name)
                    theirs = reference.conv_bn_act(*arguments)
                    assert ours.dtype == theirs.dtype, name
                    a, b = (rms(t.double() - exact) for t in (ours, theirs))
                    assert a <= FACTOR * b, (name, second, dtype)


def test_transforms_run_the_reference():
    case = Case((2, 8, 6, 5), 16, second="shortcut")
    x, conv, residual, shortcut, *rest = case.arguments(torch.float32)
    xs, residuals = torch.randn(3, *x.shape), torch.randn(3, *residual.shape)
    with torch.no_grad():
        results = [
            torch.func.vmap(lambda a, b, f=f: f(a, conv, b, shortcut, *rest))(xs, residuals)
            for f in (conv_bn_act, reference.conv_bn_act)
        ]
        torch.testing.assert_close(*results)
        results = [
            torch.func.jvp(lambda a, f=f: f(a, conv, residual, shortcut, *rest), (x,), (xs[0],))
            for f in (conv_bn_act, reference.conv_bn_act)
        ]
        torch.testing.assert_close(*results)
    results = []
    with torch.autograd.forward_ad.dual_level():
        for f in (conv_bn_act, reference.conv_bn_act):
            for leaf in ("x", "weight"):
                dual = {"x": x, "weight": conv.weight}
                dual[leaf] = torch.autograd.forward_ad.make_dual(dual[leaf], dual[leaf].cos())
                with torch.no_grad() if leaf == "x" else contextlib.nullcontext():
                    y = f(dual["x"], conv._replace(weight=dual["weight"]), residual, shortcut,
                          *rest)  # fmt: skip
                results.append(torch.autograd.forward_ad.unpack_dual(y))
    for a, b in zip(results[:2], results[2:], strict=True):
        assert a.tangent is not None and b.tangent is not None
        torch.testing.assert_close(a.tangent, b.tangent)
    grads = [
        torch.func.grad(lambda a, f=f: f(a, conv, residual, shortcut, *rest).square().sum())(x)
        for f in (conv_bn_act, reference.conv_bn_act)
    ]
    torch.testing.assert_close(*grads)
    with pytest.raises(BackendUnavailable, match="cpu.*torch.func transform"):
        torch.func.vmap(lambda a: conv_bn_act(a, conv, residual, shortcut, *rest, "cpu"))(xs)


def test_fake_and_meta_tensors():
    for second in SECONDS:
        case = Case((2, 16, 6, 5), 24, second=second, layout="channels_last", stride=2)
        arguments = case.arguments(torch.float32)
        with torch.no_grad():
            y = conv_bn_act(*arguments)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = conv_bn_act(mode.from_tensor(arguments[0]), *arguments[1:])
            meta = conv_bn_act(*on_meta(arguments))
        for t in (fake, meta):
            assert t.shape == y.shape and t.stride() == y.stride() and t.dtype == y.dtype


def on_meta(argument):
    if isinstance(argument, torch.Tensor):
        return argument.to("meta")
    if isinstance(argument, tuple):
        parts = [on_meta(part) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return argument


def wrong_calls():
    """name -> (error, words, changed arguments), of a call with C 16, K 24, a 6 x 5 map."""
    case = Case((2, 16, 6, 5), 24, second="add", bias=True)
    x, conv, residual, _, _, _ = case.arguments(torch.float32)
    norm = conv.norm
    other = Case((2, 16, 6, 5), 24, second="shortcut").arguments(torch.float32)
    shape = r"\(2, 24, 6, 5\)"
    return {
        "3 dimensions": (ValueError, r"x must have 4 dimensions.*\(2, 16, 6\)", dict(x=x[..., 0])),
        "integers": (TypeError, "x must be float32.*got torch.int64", dict(x=x.long())),
        "channels": (ValueError, r"16.*\b7\b|\b7\b.*16", dict(x=x[:, :7])),
        "groups": (ValueError, "groups", dict(conv=conv._replace(groups=5))),
        "no groups": (ValueError, "groups", dict(conv=conv._replace(groups=0))),
        "weight's dimensions": (
            ValueError, r"weight.*\(24, 16, 3\)",
            dict(conv=conv._replace(weight=conv.weight[..., 0])),
        ),
        "weight's dtype": (
            TypeError, "weight.*float32.*got torch.float64",
            dict(conv=conv._replace(weight=conv.weight.double())),
        ),
        "weight's device": (
            ValueError, "weight.*cpu.*got meta",
            dict(conv=conv._replace(weight=conv.weight.to("meta"))),
        ),
        "bias's shape": (
            ValueError, r"bias.*\(24,\).*\(23,\)", dict(conv=conv._replace(bias=conv.bias[1:])),
        ),
        "negative padding": (
            ValueError, r"padding.*\(-1, 1\)", dict(conv=conv._replace(padding=(-1, 1))),
        ),
        "no stride": (ValueError, r"stride.*\(0, 1\)", dict(conv=conv._replace(stride=(0, 1)))),
        "kernel over the map": (
            ValueError, r"kernel|weight", dict(conv=conv._replace(dilation=(7, 7))),
        ),
        "running_mean's shape": (
            ValueError, r"running_mean.*\(24,\).*\(16,\)",
            dict(conv=conv._replace(norm=norm._replace(running_mean=norm.running_mean[:16]))),
        ),
        "norm's device": (
            ValueError, "running_var.*cpu.*got meta",
            dict(conv=conv._replace(norm=norm._replace(running_var=norm.running_var.to("meta")))),
        ),
        "no statistics": (
            ValueError, "running_mean and running_var must be given",
            dict(conv=conv._replace(norm=norm._replace(running_mean=None, running_var=None))),
        ),
        "training": (
            ValueError, "training", dict(conv=conv._replace(norm=norm._replace(training=True))),
        ),
        "shortcut in training": (
            ValueError, "shortcut.*training",
            dict(residual=other[2], shortcut=other[3]._replace(
                norm=other[3].norm._replace(training=True))),
        ),
        "residual's shape": (
            ValueError, rf"residual must have.*{shape}.*got \(2, 24, 6, 4\)",
            dict(residual=residual[..., 1:]),
        ),
        "residual to broadcast": (
            ValueError, rf"residual must have.*{shape}.*got \(24, 1, 1\)",
            dict(residual=residual[0, :, :1, :1]),
        ),
        "residual's device": (
            ValueError, "residual.*cpu.*got meta", dict(residual=residual.to("meta")),
        ),
        "concat's map": (
            ValueError, r"residual.*\(2, 24, 5, 5\)",
            dict(residual=residual[:, :, 1:], concat=True),
        ),
        "concat without residual": (
            ValueError, "residual must be given with concat", dict(residual=None, concat=True),
        ),
        "shortcut without residual": (
            ValueError, "residual must be given with shortcut",
            dict(residual=None, shortcut=other[3]),
        ),
        "shortcut and concat": (
            ValueError, "shortcut|concat",
            dict(residual=other[2], shortcut=other[3], concat=True),
        ),
        "shortcut's channels": (
            ValueError, "shortcut", dict(residual=other[2][:, :9], shortcut=other[3]),
        ),
        "shortcut's output": (
            ValueError, rf"shortcut.*{shape}|{shape}.*shortcut",
            dict(residual=other[2], shortcut=other[3]._replace(stride=(1, 1))),
        ),
        "act": (ValueError, "act='gelu' must be one of: none, relu", dict(act="gelu")),
        "backend": (ValueError, "backend='cpp' must be one of: auto, cpu", dict(backend="cpp")),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", wrong_calls())
def test_errors_name_the_argument(wrong):
    case = Case((2, 16, 6, 5), 24, second="add", bias=True)
    names = ("x", "conv", "residual", "shortcut", "concat", "act")
    error, words, changes = wrong_calls()[wrong]
    for name in ("cpu", "auto", "eager"):
        arguments = dict(zip(names, case.arguments(torch.float32), strict=True))
        arguments = arguments | dict(backend=name) | changes
        given = [t for a in arguments.values() for t in tensors_of(a) if not t.is_meta]
        before = [t.clone() for t in given]
        with pytest.raises(error, match=words), torch.no_grad():
            conv_bn_act(**arguments)
        assert all(map(torch.equal, given, before)), "nothing half-changed"


def test_dtypes_promote_as_in_pytorch():
    x, conv, residual, *rest = Case((2, 16, 6, 5), 24, second="add").arguments(torch.float32)
    for residual_ in (residual.double(), residual.bfloat16(), residual.int()):
        with torch.no_grad():
            y = conv_bn_act(x, conv, residual_, *rest)
            expected = reference.conv_bn_act(x, conv, residual_, *rest)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_named_backend_raises_with_the_reason():
    arguments = Case((2, 16, 6, 5), 24, dtype=torch.float64).arguments(torch.float64)
    with torch.no_grad():
        with pytest.raises(BackendUnavailable, match="'cpu'.*conv_bn_act.*float64"):
            conv_bn_act(*arguments, backend="cpu")
        torch.testing.assert_close(conv_bn_act(*arguments), reference.conv_bn_act(*arguments))
        if torch.version.cuda is None:
            with pytest.raises(BackendUnavailable, match="'cuda'.*built without CUDA"):
                conv_bn_act(*arguments, backend="cuda")


BLOCKS = {
    "basic": ((16, 16), {}),
    "basic stride": ((8, 16, 2), {}),
    "basic groups": ((8, 8), {"groups": 2, "dilation": 2}),
    "basic relu before": ((6, 6), {"relu": "before"}),
    "basic relu none": ((6, 10, 2), {"relu": "none"}),
    "basic dropout": ((8, 8), {"dropout": 0.3}),
    "basic concat": ((8, 16), {"skip": "concat"}),
    "basic concat relu after": ((6, 5), {"skip": "concat", "relu": "after"}),
    "bottleneck": ((32, 32), {"kind": "bottleneck"}),
    "bottleneck stride": ((8, 16, 2), {"kind": "bottleneck", "width": 6}),
    "bottleneck groups": ((16, 16), {"kind": "bottleneck", "width": 8, "groups": 4}),
    "bottleneck relu before": ((8, 12), {"kind": "bottleneck", "relu": "before"}),
    "bottleneck concat dropout": ((8, 8), {"kind": "bottleneck", "skip": "concat", "dropout": 0.5}),
    "single": ((7, 7), {"kind": "single"}),
    "single projection": ((7, 9, 2), {"kind": "single", "bias": True}),
    "single concat": ((8, 8), {"kind": "single", "skip": "concat", "relu": "before"}),
    "plain": ((8, 8), {"kind": "plain"}),
    "plain projection": ((6, 9, 2), {"kind": "plain", "relu": "none"}),
    "plain concat": ((6, 5), {"kind": "plain", "skip": "concat"}),
    "stride three": ((6, 6, 3), {}),
    "no affine": ((6, 10, 2), {"affine": False}),
    "eps": ((6, 6), {"eps": 0.1}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_eval_mode(name, layout):
    args, kwargs = BLOCKS[name]
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = [], []
        for _ in range(5):
            plain = randomise(reference.ResBlock(*args, **kwargs)).to(dtype).eval()
            block = FusedResBlock(*args, backend="cpu", **kwargs).to(dtype).eval()
            block.load_state_dict(plain.state_dict())
            x = torch.randn(3, args[0], 9, 7).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            with torch.no_grad(), winograd(2):
                y, expected = block(x), plain(x)
                exact = copy.deepcopy(plain).double()(x.double())
            assert y.stride() == expected.stride()
            mine.append((y.double() - exact).flatten())
            theirs.append((expected.double() - exact).flatten())
        assert rms(torch.cat(mine)) <= FACTOR * rms(torch.cat(theirs))


def randomise(model):
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for t, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.5, 0.5),
                                 (m.running_mean, -0.5, 0.5), (m.running_var, 0.5, 2)):  # fmt: skip
                if t is not None:
                    torch.nn.init.uniform_(t, low, high)
    return model


def test_blocks_backend_raises_instead_of_falling_back():
    block = FusedResBlock(8, 8, backend="cpu").eval()
    with torch.no_grad():
        if torch.version.cuda is None:
            block.backend = "cuda"
            with pytest.raises(BackendUnavailable, match="'cuda'.*built without CUDA"):
                block(torch.randn(2, 8, 6, 6))
        with pytest.raises(BackendUnavailable, match="vmap|transform"):
            block.backend = "cpu"
            torch.func.vmap(block)(torch.randn(2, 2, 8, 6, 6))
