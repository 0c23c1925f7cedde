"""What a suite registers: workloads, the candidates that run them, and what is reported of them.

A file of ``suites`` has a tuple ``SUITES``; the harness and the reports know suites by this alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res.dispatch.backends import BACKENDS, why_not

from .program import CL, FORMATS, STEP, Program

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FUSED = "fused_res-"
OPTIMIZED = "fused_res-optimized"
# torch.compile and cuDNN's fused calls may reassociate sums and round where they like: they are
# timed with this much more error than eager
COMPILE_SLACK = 32.0
FUSED_SLACK = 1.5
# cuDNN's fused calls want BatchNorm in the weights, which 16 bits round twice. Pooling averages out
# what each pixel's rounding does, and not that: of 12 nets' logits the error was 1.0 to 1.9 times
# eager's. `auto` does not take them for 16 bits.
FOLDED_SLACK = 3.0
# or, for inference in float32, this relative RMS error in each convolution: Winograd's F(4x4, 3x3)
WINOGRAD_BOUND = 5e-6

Build = Callable[[Any], Program]  # of the workload's values


class Kernel(NamedTuple):
    """What a kernel of the roofline does at least."""

    flops: int
    bytes: int


class Options(NamedTuple):
    """``gpu``: the candidates that a GPU is asked, wherever they run: with CUDA graphs and cuDNN's
    fused calls, the most important first."""

    gpu: bool = False
    compile: bool = True
    max_autotune: bool = False


@dataclass(frozen=True)
class Candidate:
    """``slack``: how many times PyTorch's own error this candidate may have.

    ``bound``: the relative RMS error that it may have whatever PyTorch's is. ``config``: the
    configuration that Triton's kernel is given. ``why_not``: why it cannot run here.
    ``graphed``: its calls are captured in CUDA graphs. ``core``: without it the others say little.
    ``seconds``: what building it may take; it is not begun when less time is left.
    """

    name: str
    layout: str
    slack: float
    build: Build
    graphed: bool = False
    core: bool = False
    seconds: float = 2.0
    bound: float = 0.0
    config: NamedTuple | None = None
    why_not: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.layout}"

    @property
    def fused(self) -> bool:
        return self.name.startswith(FUSED)

    @property
    def compiled(self) -> bool:
        return "compile" in self.name


def graphed(candidate: Candidate) -> Candidate:
    # eager's own algorithms may differ from capture to capture, hence more slack than 1
    slack = max(candidate.slack, FUSED_SLACK)
    name = f"{candidate.name}-graphed"
    return replace(candidate, name=name, slack=slack, graphed=True, core=False)


def backends(
    device: str, dtype: torch.dtype = torch.float32, op: str = "bn_act"
) -> dict[str, str | None]:
    """Every backend with kernels, and why it cannot run such tensors: None where it can."""
    kind = torch.device(device).type
    names = [name for name in BACKENDS if name not in ("auto", "eager")]
    return {name: why_not(op, name, kind, dtype) for name in names}


def fused_backends(device: str, *args) -> list[str]:
    """Those that can run; arguments as of ``backends``."""
    return [name for name, why in backends(device, *args).items() if why is None]


def why_none(device: str, *args) -> str | None:
    """Why there is no fused kernel at all; arguments as of ``backends``."""
    found = backends(device, *args)
    if None in found.values():
        return None
    return "; ".join(f"{name}: {why}" for name, why in found.items())


@dataclass(frozen=True)
class Workload:
    """What candidates run. A subclass says what it computes.

    ``layout`` is that of x, or None where each candidate has its own. ``directions`` are the calls
    that are timed: ``forward`` and ``forward+backward`` in training, ``eval`` (no gradients,
    BatchNorm by its running statistics), ``train`` (an optimizer's whole step). The last one is
    checked.

    most_rounds: of those asked for, where one call takes a second.
    alone: candidates run one after the other, where all of them would not fit in the memory.
    modes: of torch.compile; default: those that are asked for.
    """

    suite: str
    name: str
    shape: tuple[int, int, int, int]
    layout: str | None = None
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("forward", STEP)
    most_rounds: int | None = None
    alone: bool = False
    modes: tuple[str, ...] | None = None

    net = None  # the name of a whole net
    settles = False  # a turn begins with a pause, for runtimes with threads of their own
    counts_saved = False  # what is saved for backward is counted
    whole_net = False  # images a second and, in training, the peak of memory are reported

    @property
    def training(self) -> bool:
        return "eval" not in self.directions

    def values(self, device: str = "cpu", seed: int = 0) -> Any:
        """Inputs and parameters, the same for every candidate."""
        raise NotImplementedError

    def exact(self, v: Any) -> dict[str, Tensor]:
        """What the reference computes of these values in float64."""
        raise NotImplementedError

    def candidates(self, device: str, options: Options) -> list[Candidate]:
        """All that could run it, those named ``eager`` first."""
        raise NotImplementedError

    def moved_bytes(self, direction: str) -> int | None:
        """What an ideal call reads and writes; None: no bandwidth is reported."""
        return sum(kernel.bytes for kernel in self.kernels()) or None

    def slack(self, backend: str) -> float:
        """How many times PyTorch's own error the fused kernels of a backend may have."""
        folded = self.net and not self.training and backend == "cuda"
        return FOLDED_SLACK if folded and self.dtype != torch.float32 else FUSED_SLACK

    def winograd(self) -> int:
        """How many convolutions the fused kernels may run by Winograd's algorithm."""
        return 0

    def bound(self) -> float:
        """The relative RMS error that they may have whatever PyTorch's is."""
        exact = self.training or self.dtype != torch.float32
        return 0.0 if exact else WINOGRAD_BOUND * self.winograd() ** 0.5

    def kernels(self) -> tuple[Kernel, ...]:
        """What the roofline is made of; none: no share of it is reported."""
        return ()

    def described(self, candidate: Candidate) -> dict[str, object]:
        """Fields of the candidate's rows that only this suite has."""
        return {}


class TrainingWorkload(Workload):
    """An op, a block or a net: eager, torch.compile, every fused backend, cuDNN's fused calls."""

    compile_s = 8.0  # torch.compile may take so long

    def eager(self, layout: str) -> Build:
        raise NotImplementedError

    def compiled(self, options: dict) -> Build:
        raise NotImplementedError

    def fused(self, backend: str) -> Build:
        raise NotImplementedError

    def folded(self) -> Build | None:
        """BatchNorm in the weights and cuDNN's fused calls, in eval mode."""
        return None

    def backends(self, device: str, options: Options) -> dict[str, str | None]:
        return backends(device, self.dtype)

    def compile_modes(self, options: Options) -> dict[str, dict]:
        """Options of torch.compile by the candidate's name.

        One fixed shape and no graph break: what torch.compile is best at.
        """
        fixed = {"fullgraph": True, "dynamic": False}
        modes = {} if self.modes else {"compile": fixed}
        names = [*["reduce-overhead"] * options.gpu, *["max-autotune"] * options.max_autotune]
        for name in self.modes or names:
            modes[f"compile-{name}"] = {**fixed, "mode": name}
        return modes if options.compile else {}

    def candidates(self, device: str, options: Options) -> list[Candidate]:
        layout = self.layout or CL
        eager = {
            name: Candidate("eager", name, 1.0, self.eager(name))
            for name in ([self.layout] if self.layout else FORMATS)
        }
        compiled = []
        for name, how in self.compile_modes(options).items():
            seconds = self.compile_s * (3 if "autotune" in name else 1)
            build = _static(self.compiled(how), how)
            compiled.append(Candidate(name, layout, COMPILE_SLACK, build, seconds=seconds))
        fused = [
            Candidate(FUSED + name, layout, self.slack(name), self.fused(name), bound=self.bound(),
                      why_not=why)
            for name, why in self.backends(device, options).items()
        ]  # fmt: skip
        if not options.gpu:
            return [*eager.values(), *compiled, *fused]
        first = [replace(one, core=True) for one in (eager.pop(layout), *fused)]
        folded = None if self.training else self.folded()
        if folded:
            first.append(Candidate("cudnn-fused", layout, COMPILE_SLACK, folded))
        return [*first, *compiled[:1], *map(graphed, first), *compiled[1:], *eager.values()]


def _static(build: Build, options: dict) -> Build:
    """``build``, its inputs declared to stay where they are.

    Modes with CUDA graphs would copy them in every call, or, where running statistics are inputs,
    leave the graphs alone. In a net they would be activations and buffers, which stay.
    """
    if "mode" not in options:
        return build

    def built(v: Any) -> Program:
        program = build(v)
        for t in program.inputs:
            torch._dynamo.mark_static_address(t, guard=False)
        return program

    return built


class Plot(NamedTuple):
    """A panel of speed.png: speed-up over eager PyTorch in ``directions``.

    bandwidth: a panel of the share of the copy bandwidth too.
    """

    title: str
    directions: tuple[str, ...]
    bandwidth: bool = False


Rows = list[dict]


@dataclass(frozen=True)
class Suite:
    """``workloads``: (gpu, quick) -> a GPU's or a CPU's, in full or tiny, the most important first.

    order: where it runs and is reported.
    named: on a GPU it takes minutes, and runs only when it is named.
    rows: (device, rounds, quick) -> rows without environment, of a suite without workloads.
    why_not: of a device, why the suite cannot run there.
    report, gpu_report: rows -> paragraphs of Markdown, of a CPU's and of a GPU's.
    targets, goals: a CPU's rows -> (met, what) of what is demanded, and of what is aimed at.
    timings: a GPU's rows -> timing rows, from which `auto` chooses.
    picture: (rows, path) -> the path of a picture of their own, written there.
    """

    name: str
    order: int = 1000
    workloads: Callable[[bool, bool], list[Workload]] | None = None
    named: bool = False
    rows: Callable[[str, int, bool], Rows] | None = None
    why_not: Callable[[str], str | None] = lambda device: None
    report: Callable[[Rows], list[str]] | None = None
    gpu_report: Callable[[Rows], list[str]] | None = None
    targets: Callable[[Rows], list[tuple[bool, str]]] = lambda rows: []
    goals: Callable[[Rows], list[tuple[bool, str]]] = lambda rows: []
    timings: Callable[[Rows], Rows] = lambda rows: []
    plot: Plot | None = None
    picture: Callable[[Rows, Path], Path | None] | None = None
