"""A call captured in a CUDA graph: what is left of a step when launching costs nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor


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
