"""What a candidate is built into, calls that are timed and a result; and how wrong a result may be.

All candidates of a workload get the same values.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CL = "channels_last"
STEP = "forward+backward"
HALVES = (torch.bfloat16, torch.float16)
Call = Callable[[], Tensor | tuple[Tensor, ...]]
Errors = dict[tuple[str, str], float]  # by tensor, and "largest" or "rms"


def same(module: nn.Module) -> nn.Module:
    return module


def outputs(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (returned,) if isinstance(returned, Tensor) else returned


def captured(call: Call) -> Call:
    """Replays of a CUDA graph of ``call``, which write to the same tensors and return them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    # a graph or an event that the collector destroyed during the capture would break it
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # without the autograd graph, which would keep what was saved for backward
        kept = tuple(t.detach() for t in outputs(call()))

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return kept

    return replay


class Program:
    """``calls``: what is timed, by direction. The last one is checked.

    ``inputs``: the tensors that every call is given, always the same.
    """

    def __init__(self, calls: dict[str, Call], inputs: tuple[Tensor, ...]) -> None:
        self.calls, self.inputs = calls, inputs

    def run(self) -> tuple[Tensor, ...]:
        *_, checked = self.calls.values()
        return outputs(checked())

    def capture(self, device: str) -> None:
        """From now on every call is a replay of a CUDA graph of it, where there is a GPU."""
        if torch.device(device).type == "cuda":
            self.calls = {name: captured(call) for name, call in self.calls.items()}

    def release(self) -> None:
        """Frees what a step leaves behind."""

    def result(self) -> dict[str, Tensor]:
        """The output ``y`` and whatever else a step computes, from the initial state."""
        return {"y": self.run()[0].clone()}


@dataclass
class TensorProgram(Program):
    """An op or a block: ``forward``, the tensors to differentiate and a gradient to start from.

    ``state``: running statistics, which a training step changes.
    """

    forward: Callable[[], Tensor]
    directions: tuple[str, ...]
    wrt: dict[str, Tensor]
    state: dict[str, Tensor]
    dy: Tensor
    inputs: tuple[Tensor, ...]
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        self.initial = {name: t.clone() for name, t in self.state.items()}
        known = {"forward": self.forward, STEP: self.step, "eval": self.evaluate}
        self.calls = {name: known[name] for name in self.directions}

    def step(self) -> tuple[Tensor, ...]:
        y = self.forward()
        return y, *torch.autograd.grad(y, tuple(self.wrt.values()), self.dy)

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def result(self) -> dict[str, Tensor]:
        """Output, and in training gradients and running statistics."""
        for name, t in self.state.items():
            t.copy_(self.initial[name])
        y, *grads = self.run()
        # clones: a CUDA graph overwrites its outputs
        result = {"y": y.detach().clone()}
        if "eval" in self.calls:
            return result
        result.update((f"d{k}", g.clone()) for k, g in zip(self.wrt, grads, strict=True))
        result.update((k, t.clone()) for k, t in self.state.items())
        return result

    def saved_bytes(self) -> int:
        """Bytes of the distinct storages saved for backward, parameters excluded."""
        own = {t.untyped_storage().data_ptr() for k, t in self.wrt.items() if k != "x"}
        storages = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()
        del y
        return sum(s.nbytes() for pointer, s in storages.items() if pointer not in own)


def double(v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in v.items()}


def place(v: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Copies for one candidate, what has four dimensions in ``layout``."""
    return {
        name: t.detach().to(memory_format=FORMATS[layout]) if t.dim() == 4 else t.detach().clone()
        for name, t in v.items()
    }


def separate(
    target: Tensor, v: dict[str, Tensor], relu_inputs: Callable[[dict], list[Tensor]]
) -> None:
    """Nudges ``target``, one of ``v``, until no ReLU's sign depends on rounding.

    A ReLU that rounds to the other side of zero is nobody's error, and moves every gradient by more
    than rounding does. In millions of elements a few always would.

    Raises:
        RuntimeError: after 20 rounds some inputs are still near zero.
    """
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        with torch.no_grad():
            exact, rounded = relu_inputs(double(v)), relu_inputs(v)
        near = torch.zeros_like(target[:, 0], dtype=torch.bool)
        for e, r in zip(exact, rounded, strict=True):
            near |= (e.abs() < 4 * (r - e).abs().max()).any(1)
        count = int(near.sum())
        if not count:
            return
        nudge = 1e-3 * torch.randn((count, target.size(1)), generator=generator)
        target.permute(0, 2, 3, 1)[near] += nudge.to(target.device)
    raise RuntimeError(f"{count} ReLU inputs stay near zero")


# --- the correctness rule: errors against float64, and how many times PyTorch's own they are


def errors(result: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    """Largest and RMS error of every tensor.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if set(result) != set(exact):
        raise ValueError(f"returned {sorted(result)} instead of {sorted(exact)}")
    out = {}
    for name, e in exact.items():
        if result[name].shape != e.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}, not {tuple(e.shape)}")
        off = result[name].double() - e
        out[name, "largest"] = float(off.abs().max())
        out[name, "rms"] = rms(off)
    return out


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def half_ulp(size: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of numbers of that size: rounding alone errs so."""
    if not 0 < size < math.inf:
        return 0.0
    return torch.finfo(dtype).eps / 2 * 2.0 ** math.floor(math.log2(size))


def compare(
    dtype: torch.dtype, result: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[Errors, dict[str, float]]:
    """The errors that count, and the least that each is taken for: half an ulp.

    In 16 bits only RMS errors do, with half an ulp of the RMS: of millions of ReLU inputs some
    round to the other side of zero, and the largest error tells of that chance alone.
    """
    found = errors(result, exact)
    size = rms if dtype in HALVES else lambda e: float(e.abs().max())
    floor = {name: half_ulp(size(e), dtype) for name, e in exact.items()}
    if dtype in HALVES:
        found = {key: error for key, error in found.items() if key[1] == "rms"}
    return found, floor


def compare_net(
    dtype: torch.dtype, result: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[Errors, dict[str, float]]:
    """As ``compare``; of a net's many gradients only the one with the median relative error."""
    found, floor = compare(dtype, result, exact)
    sizes = {name: rms(e) for name, e in exact.items() if name != "y"}
    relative = [found[name, "rms"] / size for name, size in sizes.items() if size]
    found = {("y", "rms"): found["y", "rms"]}
    if relative:
        found["gradients", "rms"] = statistics.median(relative)
        floor["gradients"] = torch.finfo(dtype).eps / 2
    return found, floor


def over_eager(found: Errors, eager: Errors, floor: dict[str, float]) -> tuple[float, str]:
    """The worst error over eager's own, which counts for half an ulp at least; and of what."""
    ratios = {
        key: error / max(eager.get(key, 0.0), floor[key[0]], 1e-300) for key, error in found.items()
    }
    worst = max(ratios, key=lambda key: (math.isnan(ratios[key]), ratios[key]))
    return ratios[worst], f"{worst[0]}, {worst[1]}"
