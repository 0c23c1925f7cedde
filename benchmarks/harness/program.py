"""What a candidate is built into: calls that are timed, and the result that is checked.

All candidates of a workload get the same values.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CL = "channels_last"
STEP = "forward+backward"


def same(module: nn.Module) -> nn.Module:
    return module


def outputs(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (returned,) if isinstance(returned, Tensor) else returned


class Graphed:
    """``call`` captured after three calls on a side stream; calling it replays the graph.

    Replays write to the same tensors, which are returned. Where there is no GPU nothing is captured
    and the call itself runs.
    """

    def __init__(self, call: Callable[[], Tensor | tuple[Tensor, ...]], device: str) -> None:
        self.call = call
        self.graph = None
        if torch.device(device).type != "cuda":
            return
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
            self.outputs = tuple(t.detach() for t in outputs(call()))
        self.graph = graph

    def __call__(self) -> Tensor | tuple[Tensor, ...]:
        if self.graph is None:
            return self.call()
        self.graph.replay()
        return self.outputs


class Program:
    """``calls``: what is timed, by direction. The last of ``directions`` is what is checked.

    ``inputs``: the tensors that every call is given, always the same.
    """

    directions: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    calls: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]

    def run(self) -> tuple[Tensor, ...]:
        return outputs(self.calls[self.directions[-1]]())

    def capture(self, device: str) -> None:
        """From now on every call is a replay of a CUDA graph of it."""
        self.calls = {name: Graphed(call, device) for name, call in self.calls.items()}

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
    initial: dict[str, Tensor] = field(init=False)

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
        if "eval" in self.directions:
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
