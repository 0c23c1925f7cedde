"""Inputs of bn_act and the 1.5 x rule over all it gives: for the tests of every implementation."""

import torch
from errors import rule
from hypothesis import strategies as st

from fused_res import Norm
from fused_res.ops.bn_act import bn_act
from fused_res.reference import ACTS

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def parameter_dtype(dtype):
    return dtype if dtype == torch.float64 else torch.float32


class Case:
    """Fresh inputs of one call, in fp64 but exactly representable in ``dtype``."""

    def __init__(
        self, shape, dtype, layout, act, kind, training, mean=0.0, affine=True, device="cpu"
    ):
        self.dtype, self.act, self.kind, self.training = dtype, act, kind, training
        c = shape[1]

        def tensor(scale=1.0, offset=0.0):
            t = (torch.randn(shape, device=device) * scale + offset).to(dtype).double()
            return t.contiguous(memory_format=LAYOUTS[layout])

        def positive():
            return torch.rand(c, device=device) + 0.5

        def signed():
            return torch.randn(c, device=device)

        self.x, self.residual, self.dy = tensor(2.0, mean), tensor(), tensor()
        self.channels = [positive(), signed(), positive(), signed()] if affine else [None] * 4
        self.running = [signed() * 0.1, positive(), signed() * 0.1, positive()]
        self._spare_ties()

    def _spare_ties(self):
        # Where the pre-activation is 0 but for rounding, the ReLU's gradient is a coin toss in any
        # implementation; no gradient is sent there.
        if self.act == "none":
            return
        with torch.no_grad():
            act = "none"
            kind = "none" if self.act == "relu_before_add" else self.kind
            y = self._call(torch.float64, "eager", act, kind)[0].detach()
        eps = torch.finfo(self.dtype).eps
        largest = y.abs().max() + self.residual.abs().max()
        self.dy = torch.where(y.abs() <= 16 * eps * largest, torch.zeros_like(self.dy), self.dy)

    def _call(self, dtype, backend_name, act, kind):
        p = parameter_dtype(dtype)
        x = self.x.to(dtype).detach().clone().requires_grad_()
        residual = self.residual.to(dtype).detach().clone().requires_grad_()
        channels = [None if t is None else t.to(p).clone().requires_grad_() for t in self.channels]
        running = [t.to(p).clone() for t in self.running]
        second = Norm(*running[2:], *channels[2:], self.training)
        y = bn_act(
            x, *running[:2], *channels[:2], self.training,
            residual=None if kind == "none" else residual,
            residual_norm=second if kind == "norm" else None,
            act=act, backend=backend_name,
        )  # fmt: skip
        return y, x, residual, channels, running

    def run(self, dtype, backend_name):
        """Output, all gradients, running statistics."""
        y, x, residual, channels, running = self._call(dtype, backend_name, self.act, self.kind)
        y.backward(self.dy.to(dtype))
        grads = [x.grad, residual.grad, *(None if t is None else t.grad for t in channels)]
        return [y.detach(), *grads, *running]


NAMES = ["y", "dx", "dresidual", "dw", "db", "dw2", "db2", "rm", "rv", "rm2", "rv2"]


def on_cpu(case):
    return case.run(case.dtype, "cpu")


def on_triton(case):
    return case.run(case.dtype, "triton")


def on_cuda(case):
    return case.run(case.dtype, "cuda")


def assert_rule(cases, ours=on_cpu):
    """The rule over all cases at once: few channels make a few numbers, and a few numbers luck.

    ``ours`` gives what ``Case.run`` gives, of the implementation under test.
    """
    rows = [(ours(c), c.run(c.dtype, "eager"), c.run(torch.float64, "eager")) for c in cases]
    for i, name in enumerate(NAMES):
        columns = list(zip(*((row[0][i], row[1][i], row[2][i]) for row in rows), strict=True))
        if columns[0][0] is None:
            assert all(t is None for column in columns for t in column), name
            continue
        rule(*(torch.cat([t.flatten() for t in column]) for column in columns), what=name)


def assert_statistics(statistics, shape, dtype, layout):
    """``statistics(x)`` where E[x^2] - E[x]^2 fails: mean >> std."""
    x = (torch.randn(shape) + 1000).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    found, exact = statistics(x), x.double().transpose(0, 1).flatten(1)
    assert found.dtype == torch.float64 and (found[2] == exact.size(1)).all()
    torch.testing.assert_close(found[0], exact.mean(1), rtol=1e-9, atol=0)
    m2 = exact.var(1, correction=0) * exact.size(1)
    torch.testing.assert_close(found[1], m2, rtol=1e-6, atol=0)


def long_sums(n, layout):
    """By name, n values of each of two channels that are hard to add up, (1, 2, 64, n / 64): all
    alike, so that roundings are of one sign (eight are added with none); of two signs, which
    cancel; one huge, then its negative. The first and some more are zero, and so is the shift that
    statistics take."""
    alike = torch.full((n,), 1 + 2**-20)
    signs = torch.ones(n)
    signs[::2] = -1
    huge = alike.clone()
    huge[n // 3 + 1], huge[-n // 3] = 1e8, -1e8
    found = {"alike": alike, "signs": 1000 * signs + torch.rand(n), "huge": huge}
    for values in found.values():
        values[:9] = values[n // 2 - 9 : n // 2 + 9] = values[-9:] = 0
    return {
        name: torch.stack([values, -values])
        .view(1, 2, 64, n // 64)
        .contiguous(memory_format=LAYOUTS[layout])
        for name, values in found.items()
    }


def assert_sums(found, values, what, rounded=1):
    """``found`` are the channels' sums of ``values``, in float64, but for rounding the sum of a few
    values now and then, and ``rounded`` results, to float32."""
    size, eps = values.abs(), torch.finfo(torch.float32).eps
    exact, total = (t.sum(dim=(0, 2, 3)) for t in (values, size))
    bound = 2e-9 * total + 4 * eps * size.amax(dim=(0, 2, 3)) + rounded * eps / 2 * exact.abs()
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), (what, found, exact, error / bound)


def assert_long_sums(n, layout, statistics, gradients):
    """``statistics(x)`` gives mean, sum of squared deviations and count; ``gradients(dy, x)`` the
    sums of dy and of dy * x."""
    for name, x in long_sums(n, layout).items():
        wide, other = x.double(), torch.full_like(x, 0.5)
        mean, m2, count = statistics(x)
        assert (count == n).all()
        assert_sums(mean * n, wide, f"{name}: mean")
        assert_sums(m2 + mean * mean * n, wide.square(), f"{name}: squares", rounded=3)
        of_dy, of_both = gradients(x, other)
        assert_sums(of_dy, wide, f"{name}: dy")
        assert_sums(of_both, wide * other.double(), f"{name}: dy * x")


def gradients_by(sums, g, x, weight, stats):
    """The gradient of a BatchNorm's input from given sums of g and g * (x - mean), in float64."""
    mean, invstd, weight, of_g, of_gx = (
        t.double().view(1, -1, 1, 1) for t in (*stats[:2], weight, *sums[:2])
    )
    of_g, of_gx = (t / (x.numel() // x.size(1)) for t in (of_g, of_gx))
    return weight * invstd * (g.double() - of_g - (x.double() - mean) * invstd.square() * of_gx)


@st.composite
def grid(draw):
    """Arguments of ``draws``: the randomised grid that every implementation is held to."""
    n, c, h, w = (draw(st.integers(1, most)) for most in (9, 70, 19, 19))
    if n * h * w < 32:  # statistics of a handful of values amplify every rounding
        n = 32
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    layout, act = draw(st.sampled_from(list(LAYOUTS))), draw(st.sampled_from(ACTS))
    kind = draw(st.sampled_from(["none", "tensor", "norm"]))
    training, mean = draw(st.booleans()), draw(st.sampled_from([0.0, 3.0, 50.0]))
    return (n, c, h, w), dtype, layout, act, kind, training, mean


def draws_of_grid(arguments):
    n, c, h, w = arguments[0]
    torch.manual_seed(n + 10 * c + 1000 * h + 20000 * w)
    return draws(*arguments)


def draws(shape, *args, **kwargs):
    return [Case(shape, *args, **kwargs) for _ in range(max(1, -(-256 // shape[1])))]
