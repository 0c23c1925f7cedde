"""``fused-res check``: compares every available backend with float64, by the test suite's rule.

A result passes if its error, against the same computation in float64, is at most ``LIMIT`` times
the error of PyTorch's own ops in the same dtype. This applies to the largest error and to the root
mean square.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..dispatch import backends
from ..ops.bn_act import bn_act_norms
from ..reference import Act, Norm
from . import table, threads

LIMIT = 1.5
# float64 has no wider type for a comparison. There PyTorch's error counts as this share of the
# largest value.
FLOAT64_BOUND = 2.0**-40
# The first has tails everywhere (odd C, H and W), the second fills whole vectors.
SHAPES = ((3, 13, 9, 7), (4, 64, 8, 8))
BLOCKS = 20
RESIDUALS = ("no residual", "residual", "normalised residual")
BnAct = Callable[[Tensor, Norm, Tensor | None, Norm | None, Act], Tensor]


class Case(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    layout: torch.memory_format
    act: Act
    residual: str
    training: bool

    def __str__(self) -> str:
        layout = "NCHW" if self.layout == torch.contiguous_format else "channels_last"
        mode = "train" if self.training else "eval"
        return f"{'x'.join(map(str, self.shape))} {layout} {self.act}, {self.residual}, {mode}"


class Result(NamedTuple):
    """One row of the table.

    ratio: the worst error as a multiple of PyTorch's error.
    where: the quantity and case of this error.
    failure: the exception, if there is no result.
    """

    what: str
    backend: str
    dtype: torch.dtype
    cases: int
    ratio: float
    where: str
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.ratio <= LIMIT


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for choice in itertools.product(
        SHAPES,
        (torch.contiguous_format, torch.channels_last),
        reference.ACTS,
        RESIDUALS,
        (True, False),
    ):
        yield Case(dtype, *choice)


class Errors:
    """Errors of the fused ops and of PyTorch's ops against float64, pooled by quantity.

    The largest error is relative to the exact tensor's largest value, the root mean square of the
    error to its root mean square. Errors are pooled over cases: sums over a few channels have
    random errors, so the ratio in a single case is random too.
    """

    def __init__(self) -> None:
        # key -> largest error: fused, theirs, floor; squared errors: fused, theirs, floor
        self._pooled: dict[str, list[float]] = {}
        self._where: dict[str, str] = {}

    def add(
        self, key: str, where: str, fused: Tensor | None, theirs: Tensor, exact: Tensor
    ) -> None:
        """Adds a tensor that was computed three times.

        No error counts as less than the cost of correct rounding: half a unit in the last place of
        the largest exact value, and half an epsilon of the root mean square.

        Args:
            key: the quantity; errors are pooled by it.
            where: the case.
            fused, theirs: of the same dtype and shape. If ``fused`` is None or differs in dtype or
                shape, the error is infinite.
            exact: float64.
        """
        largest = max(exact.abs().max().item(), torch.finfo(torch.float64).tiny)
        mean_square = max(exact.square().mean().item(), torch.finfo(torch.float64).tiny)
        if theirs.dtype == torch.float64:
            floors = FLOAT64_BOUND, FLOAT64_BOUND
        else:
            eps = torch.finfo(theirs.dtype).eps
            floors = eps * 2.0 ** (math.frexp(largest)[1] - 2) / largest, eps / 2

        def errors(t: Tensor | None) -> tuple[float, float]:
            if t is None or t.dtype != theirs.dtype or t.shape != exact.shape:
                return math.inf, math.inf
            error = t.double() - exact
            if not error.isfinite().all():
                return math.inf, math.inf
            return error.abs().max().item() / largest, error.square().mean().item() / mean_square

        fused_max, fused_square = errors(fused)
        their_max, their_square = errors(theirs)
        pooled = self._pooled.setdefault(key, [0.0] * 6)
        if fused_max >= pooled[0]:
            self._where[key] = where
        pooled[:3] = map(max, pooled[:3], (fused_max, their_max, floors[0]))
        for i, square in enumerate((fused_square, their_square, floors[1] ** 2), 3):
            pooled[i] += square

    def worst(self) -> tuple[float, str]:
        """The largest ratio of a fused op's error to PyTorch's error (at least the floor), and
        where it is."""
        found = 0.0, ""
        for key, (fused_max, their_max, floor, *squares) in self._pooled.items():
            fused, theirs, floor_square = squares
            ratio = max(
                fused_max / max(their_max, floor), (fused / max(theirs, floor_square)) ** 0.5
            )
            if ratio > found[0]:
                found = ratio, f"{key}, {self._where[key]}"
        return found


def _inputs(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Random tensors of one case, in the dtypes that a model uses."""
    generator = torch.Generator().manual_seed(seed)
    channels = case.shape[1]
    dtype = case.dtype if case.dtype == torch.float64 else torch.float32

    def maps(dtype: torch.dtype, offset: float) -> Tensor:
        centres = offset * torch.randn((1, channels, 1, 1), generator=generator)
        values = torch.randn(case.shape, generator=generator) + centres
        return values.to(device, dtype).contiguous(memory_format=case.layout)

    def per_channel(centre: float, spread: float) -> Tensor:
        values = centre + spread * torch.rand(channels, generator=generator)
        return values.to(device, dtype)

    found = {"x": maps(case.dtype, 2.0), "dy": maps(case.dtype, 0.0)}
    if case.residual != "no residual":
        found["residual"] = maps(case.dtype, 1.0)
    for name in ("", "residual_") if case.residual == "normalised residual" else ("",):
        found[f"{name}weight"] = per_channel(0.5, 1.0)
        found[f"{name}bias"] = per_channel(-0.5, 1.0)
        found[f"{name}running_mean"] = per_channel(-1.0, 2.0)
        found[f"{name}running_var"] = per_channel(0.5, 1.0)
    return found


def _norms(case: Case, tensors: Mapping[str, Tensor]) -> tuple[Norm, Norm | None]:
    def norm(prefix: str) -> Norm:
        return Norm(*(tensors[prefix + field] for field in Norm._fields[:4]), case.training)

    return norm(""), norm("residual_") if "residual_weight" in tensors else None


def _evaluate(
    function: BnAct, case: Case, inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, gradients and running statistics of ``function``, computed in ``dtype``."""
    tensors = {name: t.to(dtype or t.dtype, copy=True) for name, t in inputs.items()}
    dy = tensors.pop("dy")
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if "running" not in name}
    norm, residual_norm = _norms(case, tensors)
    y = function(tensors["x"], norm, tensors.get("residual"), residual_norm, case.act)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    found = {"y": y.detach()}
    found |= {f"d{name}": t for name, t in zip(leaves, gradients, strict=True) if t is not None}
    return found | {name: t for name, t in tensors.items() if "running" in name}


def _clear_ties(case: Case, inputs: dict[str, Tensor]) -> None:
    """Sets dy to 0 where rounding may decide the ReLU: both gradients are right there."""
    if case.act == "none":
        return
    wide = {name: t.double() for name, t in inputs.items()}
    norm, residual_norm = _norms(case, wide)
    normalised = reference.bn_act(wide["x"], norm, act="none")
    # in training the first call has changed the running statistics; training does not read them
    total = normalised
    if case.act == "relu":
        total = reference.bn_act(wide["x"], norm, wide.get("residual"), residual_norm, "none")
    magnitude = normalised.abs() + (total - normalised).abs()
    margin = 2 * torch.finfo(case.dtype).eps * magnitude + 1e-4
    inputs["dy"].masked_fill_(total.abs() <= margin, 0)


def check_bn_act(
    function: BnAct, dtype: torch.dtype, backend: str = "", device: str = "cpu"
) -> Result:
    """Compares ``function`` with PyTorch's ops over layouts, ReLUs, residuals, train and eval.

    Args:
        function: called as ``reference.bn_act`` is, with tensors of ``dtype`` on ``device``.
        backend: its name in the result's row.
    """
    errors, count = Errors(), 0
    for case in cases(dtype):
        with threads(1):  # on such small maps threads cost time, on a busy machine much
            inputs = _inputs(case, device, count)
            _clear_ties(case, inputs)
            exact = _evaluate(reference.bn_act, case, inputs, torch.float64)
            theirs = _evaluate(reference.bn_act, case, inputs)
        count += 1
        try:
            fused = _evaluate(function, case, inputs)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            return Result("bn_act", backend, dtype, count, math.inf, str(case), failure)
        mode = "train" if case.training else "eval"
        with threads(1):
            for name, t in exact.items():
                errors.add(f"{name} in {mode}", f"worst: {case}", fused.get(name), theirs[name], t)
    return Result("bn_act", backend, dtype, count, *errors.worst())


def _evaluate_block(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | {name: b for name, b in block.named_buffers() if b.is_floating_point()}


def check_block(block_type: Callable[..., nn.Module], backend: str, device: str = "cpu") -> Result:
    """Compares training steps of a strided block with those of ``reference.ResBlock``.

    Args:
        block_type: called as ``reference.ResBlock`` is, and with ``backend``.
    """
    sizes, errors, count = (24, 40, 2), Errors(), 0
    for seed in itertools.count():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            plain = reference.ResBlock(*sizes).to(device)
            x = torch.randn(4, 24, 9, 9).to(device)
            dy = torch.randn(4, 40, 5, 5).to(device)
        exact_block, nearest = copy.deepcopy(plain).double(), []
        exact_block.relu.register_forward_pre_hook(
            lambda _, args, nearest=nearest: nearest.append(args[0].abs().min().item())
        )
        exact = _evaluate_block(exact_block, x.double(), dy.double())
        if min(nearest) < 5e-5:
            continue  # rounding may move a value across 0, and both gradients are right then
        try:
            block = block_type(*sizes, backend=backend).to(device)
            block.load_state_dict(plain.state_dict())
            fused = _evaluate_block(block, x, dy)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            return Result("FusedResBlock", backend, x.dtype, count, math.inf, "", failure)
        theirs = _evaluate_block(plain, x, dy)
        for name, t in exact.items():
            errors.add(name, f"seed {seed}", fused.get(name), theirs[name], t)
        count += 1
        if count == BLOCKS:
            return Result("FusedResBlock", backend, x.dtype, count, *errors.worst())


def check_inference(
    block_type: Callable[..., nn.Module], backend: str, device: str = "cpu"
) -> Result:
    """Compares blocks in eval mode, without gradients, with ``reference.ResBlock``, in both memory
    formats. These blocks are too narrow for Winograd's tiles of 4, which have another bound.

    Args:
        block_type: called as ``reference.ResBlock`` is, and with ``backend``.
    """
    kinds = (
        ((24, 24), {}),
        ((24, 40, 2), {"kind": "bottleneck"}),
        ((24, 16), {"skip": "concat", "groups": 4}),
    )
    errors, dtype = Errors(), torch.float32
    formats = (torch.contiguous_format, torch.channels_last)
    calls = [*itertools.product(kinds, range(BLOCKS), formats)]
    for count, ((sizes, kind), seed, memory_format) in enumerate(calls):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            plain = reference.ResBlock(*sizes, **kind).eval().to(device)
            for name, tensor in plain.state_dict().items():
                if tensor.is_floating_point() and ("bn" in name or "downsample.1" in name):
                    tensor.uniform_(0.5, 1.5)
            x = torch.randn(4, 24, 9, 9).to(device).contiguous(memory_format=memory_format)
            exact = copy.deepcopy(plain).double()(x.double())
            try:
                block = block_type(*sizes, backend=backend, **kind).eval().to(device)
                block.load_state_dict(plain.state_dict())
                fused = block(x)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                return Result("inference", backend, dtype, count, math.inf, "", failure)
            errors.add(f"{sizes}", f"seed {seed}, {memory_format}", fused, plain(x), exact)
    return Result("inference", backend, dtype, len(calls), *errors.worst())


def check_all() -> list[Result]:
    """Results of every backend that runs on this machine."""
    from .. import FusedResBlock

    results = []
    for name, reason in backends.STATUS.items():
        if reason is not None:
            continue
        device = backends.DEVICE_TYPES.get(name, ("cpu",))[0]
        for dtype in backends.DTYPES:
            if backends.why_not("bn_act", name, device, dtype) is not None:
                continue

            def bn_act(*args, name=name):
                return bn_act_norms(*args, backend=name)

            results.append(check_bn_act(bn_act, dtype, name, device))
        if name == "eager" or name in backends.SUPPORT["bn_act"]:
            with threads(1):  # both sides spend their time in PyTorch's convolutions
                results.append(check_block(FusedResBlock, name, device))
                results.append(check_inference(FusedResBlock, name, device))
    return results


def render(results: list[Result]) -> str:
    rows = [
        [
            r.what,
            r.backend,
            str(r.dtype).removeprefix("torch."),
            r.cases,
            f"{r.ratio:.2f}",
            "ok" if r.passed else "FAIL",
            r.failure or r.where,
        ]
        for r in results
    ]
    header = ["what", "backend", "dtype", "cases", "worst ratio", "", "where"]
    return table(header, rows, right="   rr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"An error against float64 may be at most {LIMIT} times that of PyTorch's own ops. "
        "Exits with 1 where one is larger."
    )


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    results = check_all()
    print(render(results))
    print(
        f"(worst ratio: error against float64 over that of PyTorch's own ops, at most {LIMIT}; "
        f"float64: over {FLOAT64_BOUND:.0e} of the largest value)"
    )
    for name, reason in backends.STATUS.items():
        if reason is not None:
            print(f"not checked: {name}: {reason}")
        elif name != "eager" and name not in backends.SUPPORT["bn_act"]:
            print(f"not checked: {name}: it has no bn_act kernel yet")
    failed = sum(not result.passed for result in results)
    verdict = f"{failed} of {len(results)} FAILED" if failed else f"all {len(results)} passed"
    print(f"{verdict} in {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0
