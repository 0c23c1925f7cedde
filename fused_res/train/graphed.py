"""``--cuda-graph``: a step of training is captured as a CUDA graph once, then replayed.

A replay launches all kernels of the step at once. They read the batches and the learning rate from
tensors whose addresses stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..cli import CommandError, UsageError
from .place import Place
from .settings import Settings

Batches = list[tuple[Tensor, Tensor]]
# Steps that run eagerly before the capture, as PyTorch's documentation asks. In them all kernels
# are loaded, and calls are measured (``first_use``): each when it is seen for the second time.
WARM_UPS = 3


def check(settings: Settings, place: Place) -> None:
    """Checks that ``--cuda-graph``, if it is asked for, can be followed in this place.

    Raises:
        UsageError: the device is no GPU, or there are several processes.
    """
    if not settings.cuda_graph:
        return
    if place.device.type != "cuda":
        raise UsageError(
            f"--cuda-graph needs a GPU: --device {settings.device} is {place.device.type} here, "
            f"must be cuda"
        )
    if place.world > 1:
        raise UsageError(
            f"--cuda-graph runs in one process: torchrun started {place.world}, must be 1"
        )


class Graphed:
    """Trains a net step by step; most steps are replays of a CUDA graph.

    The first ``WARM_UPS`` steps run eagerly, on the stream of the capture: autograd's nodes of the
    parameters keep the stream that they were made on. A step of another size, as the last of an
    epoch may be, runs eagerly there too. The optimizer's learning rate is a number between the
    steps, and in them a tensor with that value.

    Args:
        name: of the net, for errors.
        model: its parameters and buffers are what a step changes.
        optimizer: it takes a learning rate that is a tensor, and a capture.
        learn: takes the batches of a step, each (images, classes), and their number, and trains by
            them. It waits for nothing on the device.
        count: batches of a step.
        cuda: ``torch.cuda``, or what has its ``CUDAGraph``, ``Stream``, ``current_stream``,
            ``graph`` and ``stream``.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        learn: Callable[[Batches, int], None],
        count: int,
        cuda: Any = torch.cuda,
    ) -> None:
        self._name, self._optimizer, self._learn = name, optimizer, learn
        self._count, self._cuda = count, cuda
        self._changed = [*model.parameters(), *model.buffers()]
        device = self._changed[0].device
        self._rates = [
            torch.empty((), dtype=torch.float32, device=device) for _ in optimizer.param_groups
        ]
        self._inputs: Batches | None = None
        self._warm_ups, self._stream, self._graph = 0, cuda.Stream(), None

    def __call__(self, batches: Batches) -> None:
        """Trains by the batches of a step.

        Raises:
            CommandError: the step cannot be captured.
        """
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if not self._fits(batches):
            self._run_aside(batches)
            return
        for mine, given in zip(self._inputs, batches, strict=True):
            for static, t in zip(mine, given, strict=True):
                static.copy_(t)
        if self._warm_ups < WARM_UPS:
            self._warm_ups += 1
            self._run_aside(self._inputs)
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()
        increment_version(self._changed)  # as the step's operations would have done

    def _fits(self, batches: Batches) -> bool:
        """Whether the batches have the sizes of the graph's inputs, which the first step of
        ``count`` batches decides."""
        if len(batches) != self._count:
            return False
        if self._inputs is None:
            self._inputs = [(torch.empty_like(x), torch.empty_like(y)) for x, y in batches]
        sizes, given = ([(x.shape, y.shape) for x, y in of] for of in (self._inputs, batches))
        return sizes == given

    def _run(self, batches: Batches) -> None:
        """Runs a step, eagerly or while it is captured, with learning rates in tensors."""
        with self._rates_as_tensors():
            self._learn(batches, len(batches))

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        groups = self._optimizer.param_groups
        before = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _run_aside(self, batches: Batches) -> None:
        """Runs a step eagerly on the stream of the capture."""
        self._stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(self._stream):
            self._run(batches)
        self._cuda.current_stream().wait_stream(self._stream)

    def _captured(self) -> Any:
        """The graph of a step; capturing it computes nothing."""
        graph, cause = self._cuda.CUDAGraph(), None
        try:
            with self._cuda.graph(graph, stream=self._stream):
                try:
                    self._run(self._inputs)
                except Exception as error:
                    cause = error  # the end of the capture raises another one
                    raise
        except Exception as error:
            raise CommandError(
                f"--cuda-graph: a step of the {self._name} net cannot be captured: "
                f"{cause or error}; train without --cuda-graph"
            ) from error
        return graph
