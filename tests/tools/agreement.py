"""One step of any model as numbers, and whether two models agree on them."""

import math
import statistics

import torch
from errors import FACTOR, half_ulp, rms
from torch import nn


def randomise(model: nn.Module) -> nn.Module:
    """Gives norms and biases values as after training, so that no branch starts as zero or one."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
            if m.running_mean is not None:
                nn.init.normal_(m.running_mean, 0, 0.3)
                nn.init.uniform_(m.running_var, 0.5, 2)
    return model


def outcome(
    model: nn.Module, x, train: bool | None = True, backward: bool = True, call=None
) -> dict:
    """One step: name -> tensor, of outputs, gradients of input and parameters, and statistics.

    The gradient that goes in, and the masks of any dropout, are the same for equal shapes.
    ``call``: what to run instead of ``model(x)``.
    """
    if train is not None:
        model.train(train)
    x = x.detach().clone().requires_grad_(backward)
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(backward):
        torch.manual_seed(1234)
        out = model(x) if call is None else call(x)
    out = getattr(out, "last_hidden_state", out)
    result = {"output": out.detach()}
    if backward:
        numbers = torch.Generator().manual_seed(5678)
        dy = torch.randn(out.shape, generator=numbers, dtype=torch.float64).to(out)
        wanted = {"x": x} | {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out, list(wanted.values()), dy, allow_unused=True)
        result |= {
            f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True) if g is not None
        }
    result |= {n: b.clone() for n, b in model.named_buffers()}
    return result


def _group(name: str, t: torch.Tensor) -> str:
    if name == "gradient of x":
        return "gradient of the input"
    if name.startswith("gradient"):
        return "gradients of vectors" if t.dim() == 1 else "gradients"
    return "outputs" if name == "output" else "statistics"


def _pooled(draw: dict, exact: dict) -> dict[str, torch.Tensor]:
    """All numbers of a group in one vector, each tensor in units of its own size.

    The error of a small tensor is too few numbers to judge by. Units are powers of two, so nothing
    is rounded; a gradient that is zero but for rounding (a bias before a norm) takes the largest.
    """
    sizes = {
        n: t.double().square().mean().sqrt().item()
        for n, t in exact.items()
        if t.is_floating_point() and t.numel()
    }
    largest = max((s for n, s in sizes.items() if n.startswith("gradient")), default=0)
    groups: dict[str, list] = {}
    for name, size in sizes.items():
        if name.startswith("gradient") and size < 1e-9 * largest:
            size = largest
        unit = 2.0 ** round(math.log2(size)) if size and math.isfinite(size) else 1.0
        groups.setdefault(_group(name, exact[name]), []).append((draw[name] / unit).flatten())
    return {group: torch.cat(parts) for group, parts in groups.items()}


def _ratio(mine: float, other: float, floor: float) -> float:
    unit = max(other, floor)
    return mine / unit if unit else math.inf if mine else 0.0


def _largest(error: torch.Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0


def agree(ours, theirs, exact, what: str = "", largest: bool = True) -> None:
    """The 1.5 x rule on lists of outcomes, one a draw: by RMS and, unless a net's, largest error.

    Judged is the median over the draws of our error in units of PyTorch's. Where an activation is
    so near zero that rounding turns its ReLU over, that one sign moves gradients a thousand times
    further than all other rounding. It happens in some draws of a net, in both, in ours or in
    theirs; there the ratio says who was lucky, elsewhere what the arithmetic does.
    The largest of a few dozen errors scatters too much to say anything their RMS does not.
    """
    ratios: dict[tuple[str, str], list[float]] = {}
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.keys() == b.keys() == e.keys(), what
        for name, t in b.items():
            assert a[name].dtype == t.dtype and a[name].shape == t.shape == e[name].shape, name
            if not t.is_floating_point():
                assert torch.equal(a[name], t), name
        mine, other, truth = (_pooled(draw, e) for draw in (a, b, e))
        for group, t in truth.items():
            assert torch.equal(mine[group].isfinite(), other[group].isfinite()), group
            finite = other[group].isfinite()
            errors = [(v[group].double() - t)[finite] for v in (mine, other)]
            floor = half_ulp(t, other[group].dtype)
            for measure in (rms, _largest) if largest and t.numel() >= 256 else (rms,):
                ratio = _ratio(*map(measure, errors), floor)
                ratios.setdefault((group, measure.__name__.strip("_")), []).append(ratio)
    for (group, measure), draws in ratios.items():
        assert statistics.median(draws) <= FACTOR, f"{what} {group}, {measure} error: {draws}"
