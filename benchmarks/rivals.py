"""Who runs a workload: PyTorch, torch.compile, in eval mode cuDNN's fused calls and other
runtimes, and fused_res."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import convs
import inference
import roofline
import torch
import training_convs
from convs import ConvProgram
from folding import FoldedBlock
from inference import InferenceProgram
from nets import NETS, NetProgram, folded, fused
from programs import Program, block_program, op_program, plain_block
from torch import Tensor
from workloads import CL, FORMATS, Workload, convolutions

from fused_res import FusedResBlock, reference
from fused_res.dispatch.backends import BACKENDS, why_not
from fused_res.ops.bn_act import bn_act

# torch.compile and cuDNN's fused calls may reassociate sums and round where they like: they are
# timed with this much more error than eager
COMPILE_SLACK = 32.0
OUR_SLACK = 1.5
# or, for inference in float32, this relative RMS error in each convolution: Winograd's F(4x4, 3x3)
WINOGRAD_BOUND = 5e-6
# cuDNN's fused calls want BatchNorm in the weights, which 16 bits round twice. Pooling averages out
# what each pixel's rounding does, and not that: of 12 nets' logits the error was 1.0 to 1.9 times
# eager's. `auto` does not take them for 16 bits.
FOLDED_SLACK = 3.0

Build = Callable[[Workload, dict], Program]


@dataclass(frozen=True)
class Rival:
    """``slack``: how many times PyTorch's own error this rival may have.

    ``bound``: the relative RMS error that it may have whatever PyTorch's is. ``config``: the
    configuration that Triton's kernel is given.
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

    @property
    def label(self) -> str:
        return f"{self.name} {self.layout}"

    @property
    def ours(self) -> bool:
        return self.name.startswith("fused_res")

    @property
    def compiled(self) -> bool:
        return "compile" in self.name


def graphed(rival: Rival) -> Rival:
    # eager's own algorithms may differ from capture to capture, hence more slack than 1
    slack = max(rival.slack, OUR_SLACK)
    name = f"{rival.name}-graphed"
    return replace(rival, name=name, slack=slack, graphed=True, core=False)


def fused_backends(
    device: str, dtype: torch.dtype = torch.float32, op: str = "bn_act"
) -> list[str]:
    return [
        name
        for name in BACKENDS
        if name not in ("auto", "eager")
        and why_not(op, name, torch.device(device).type, dtype) is None
    ]


def compile_modes(*names: str) -> dict[str, dict]:
    """Options of torch.compile by the rival's name, for the modes named.

    One fixed shape and no graph break: what torch.compile is best at.
    """
    fixed = {"fullgraph": True, "dynamic": False}
    modes = {f"compile-{name}": {**fixed, "mode": name} for name in names if name != "default"}
    return {"compile": fixed, **modes} if "default" in names else modes


def inference_modes(suite: str, gpu: bool) -> dict[str, dict]:
    """Arguments of ``inference.compiled`` by the rival's name: frozen, on a CPU not frozen too."""
    if suite == "inference-all":
        return {"compile-max-autotune-freezing": {"mode": "max-autotune", "freezing": True}}
    frozen = {"compile-freezing": {"freezing": True}}
    if suite == "chains" and gpu:
        modes = ("reduce-overhead", "max-autotune")
        return {f"compile-{mode}-freezing": {"mode": mode, "freezing": True} for mode in modes}
    return frozen if gpu else {"compile": {"freezing": False}, **frozen}


def _static(build: Build, options: dict) -> Build:
    """``build``, its inputs declared to stay where they are.

    Modes with CUDA graphs would copy them in every call, or, where running statistics are inputs,
    leave the graphs alone. In a net they would be activations and buffers, which stay.
    """
    if "mode" not in options:
        return build

    def built(workload: Workload, v: dict) -> Program:
        program = build(workload, v)
        for t in program.inputs:
            torch._dynamo.mark_static_address(t, guard=False)
        return program

    return built


def _fused_op(backend: str, x: Tensor, norm: reference.Norm, residual: Tensor) -> Tensor:
    return bn_act(x, *norm, residual=residual, backend=backend)


class _Ops:
    """Builds of the rivals of bn_act."""

    compile_s = 8.0

    def eager(self, layout: str) -> Build:
        return partial(op_program, reference.bn_act)

    def compiled(self, options: dict) -> Build:
        return lambda w, v: op_program(torch.compile(reference.bn_act, **options), w, v)

    def ours(self, backend: str) -> Build:
        return partial(op_program, partial(_fused_op, backend))


class _Blocks:
    """Builds of the rivals of a block."""

    compile_s = 20.0

    def __init__(self, workload: Workload) -> None:
        self.plain = plain_block(workload)

    def eager(self, layout: str) -> Build:
        return partial(block_program, self.plain, layout=layout)

    def compiled(self, options: dict) -> Build:
        wrap = partial(torch.compile, **options)
        return partial(block_program, self.plain, layout=CL, wrap=wrap)

    def ours(self, backend: str) -> Build:
        return partial(block_program, partial(FusedResBlock, backend=backend), layout=CL)

    def folded(self, dtype: torch.dtype) -> Build:
        wrap = partial(FoldedBlock, dtype=dtype)
        return partial(block_program, reference.ResBlock, layout=CL, wrap=wrap)


class _Parts(_Blocks):
    """Builds of the rivals of a block that ``fuse_`` runs in parts."""

    def ours(self, backend: str) -> Build:
        return partial(block_program, self.plain, layout=CL, wrap=partial(fused, backend=backend))


class _Nets:
    """Builds of the rivals of a net."""

    def __init__(self, workload: Workload) -> None:
        self.compile_s = NETS[workload.net].compile_s * (1.0 if workload.training else 0.6)

    def eager(self, layout: str) -> Build:
        return partial(NetProgram, layout=layout)

    def compiled(self, options: dict, backend: str | None = None) -> Build:
        swap = partial(fused, backend=backend) if backend else lambda net: net
        return partial(NetProgram, swap=swap, wrap=partial(torch.compile, **options))

    def ours(self, backend: str) -> Build:
        return partial(NetProgram, swap=partial(fused, backend=backend))

    def folded(self, dtype: torch.dtype) -> Build:
        return partial(NetProgram, swap=partial(folded, dtype=dtype), autocast=None)


def winograd_bound(workload: Workload) -> float:
    """What a result of inference may be off by, whatever PyTorch's is; 0 where Winograd is not."""
    if workload.training or workload.dtype != torch.float32:
        return 0.0
    if workload.suite == "parts":  # those of its branch: what else it has is PyTorch's
        count = len(convolutions(workload))
    else:
        count = sum(kernel.flops > 0 for kernel in roofline.kernels(workload))
    return WINOGRAD_BOUND * count**0.5


def _inference(workload: Workload, device: str, modes: dict[str, dict], gpu: bool) -> list[Rival]:
    seconds = NETS[workload.net].compile_s * 0.6 if workload.net else 20.0
    found = {}

    def rival(name: str, slack: float, prepare: inference.Prepare, layout: str = CL, **fields):
        build = partial(InferenceProgram, prepare, layout=layout)
        found[f"{name} {layout}"] = Rival(name, layout, slack, build, **fields)

    rival("eager", 1.0, inference.eager, core=True)
    if not gpu:
        rival("eager", 1.0, inference.eager, "NCHW")
    bound = winograd_bound(workload)
    rival("fused_res-optimized", OUR_SLACK, inference.optimized, core=True, bound=bound)
    if workload.suite == "chains" and not gpu:
        frozen = partial(inference.optimized, freeze=True)
        rival("fused_res-frozen", OUR_SLACK, frozen, bound=bound)
        by_fuse = partial(inference.with_backend, backend="cpu")
        rival("fused_res-cpu", OUR_SLACK, by_fuse, bound=bound)
    if gpu:
        rival("cudnn-fused", COMPILE_SLACK, inference.cudnn_fused, core=True)
        for backend in fused_backends(device, workload.dtype, "conv_bn_act"):
            prepare = partial(inference.with_backend, backend=backend)
            folds = workload.net and backend == "cuda" and workload.dtype != torch.float32
            slack = FOLDED_SLACK if folds else OUR_SLACK
            rival(f"fused_res-{backend}", slack, prepare, bound=bound)
        for each in list(found.values()):
            found[f"{each.name}-graphed {each.layout}"] = graphed(each)
    else:
        for name, prepare in inference.RUNTIMES.items():
            rival(name, COMPILE_SLACK, prepare, "NCHW")
    for name, options in modes.items():
        if workload.net and name == "compile":
            continue  # frozen is what it is at its best, and a net compiles for long
        prepare = partial(inference.compiled, **options)
        times = 3 if "autotune" in name else 1
        rival(name, COMPILE_SLACK, prepare, seconds=seconds * times)
    return list(found.values())


def _convs(workload: Workload, device: str) -> list[Rival]:
    """PyTorch's ops, and every implementation of ``conv_bn_act``."""
    out = [Rival("eager", CL, 1.0, partial(ConvProgram, convs.eager), core=True)]
    for name, config, run in convs.implementations(workload, device):
        full = "-".join(map(str, (f"fused_res-{name}", *(config or ()))))
        out.append(Rival(full, CL, OUR_SLACK, partial(ConvProgram, run), config=config))
    return out


def _training_convs(workload: Workload, device: str) -> list[Rival]:
    """The library's convolution, and ours in each configuration."""
    out = []
    for name, config, build in training_convs.implementations(workload, device):
        if name == "eager":
            out.append(Rival(name, CL, 1.0, build, core=True))
            continue
        full = "-".join(map(str, (f"fused_res-{name}", *(config or ()))))
        out.append(Rival(full, CL, OUR_SLACK, build, config=config))
    return out


def rivals(
    workload: Workload, device: str, modes: dict[str, dict], gpu: bool = False
) -> list[Rival]:
    """Who runs ``workload``, torch.compile in ``modes``.

    Args:
        modes: by the rival's name, of ``compile_modes`` or, for inference, ``inference_modes``.
        gpu: the rivals that a GPU is asked, wherever they run: with CUDA graphs, cuDNN's fused
            calls and torch.compile of ours, the most important first.
    """
    if workload.conv:
        return _convs(workload, device)
    if workload.call:
        return _training_convs(workload, device)
    if workload.inference:
        return _inference(workload, device, modes, gpu)
    if workload.suite == "nets":
        builds = _Nets(workload)
    else:
        kinds = {"blocks": _Blocks, "autotune": _Blocks, "parts": _Parts}
        builds = _Ops() if workload.suite == "ops" else kinds[workload.suite](workload)
    layout = workload.layout or CL
    eager = {
        name: Rival("eager", name, 1.0, builds.eager(name))
        for name in ([workload.layout] if workload.layout else FORMATS)
    }
    compiled = []
    for name, options in modes.items():
        seconds = builds.compile_s * (3 if "autotune" in name else 1)
        build = _static(builds.compiled(options), options)
        compiled.append(Rival(name, layout, COMPILE_SLACK, build, seconds=seconds))
    backends = fused_backends(device, workload.dtype)
    if workload.suite == "parts" and not gpu:
        backends = ["auto"]  # which leaves some norms to PyTorch
    folds = workload.net and not workload.training and workload.dtype != torch.float32
    slack = {b: FOLDED_SLACK if folds and b == "cuda" else OUR_SLACK for b in backends}
    bound = winograd_bound(workload) if workload.suite == "parts" else 0.0
    ours = [
        Rival(f"fused_res-{b}", layout, slack[b], builds.ours(b), bound=bound) for b in backends
    ]
    if not gpu:
        return [*eager.values(), *compiled, *ours]

    first = [replace(rival, core=True) for rival in (eager.pop(layout), *ours)]
    if not workload.training and workload.suite != "parts":
        first.append(Rival("cudnn-fused", layout, COMPILE_SLACK, builds.folded(workload.dtype)))
    out = [*first, *compiled[:1], *map(graphed, first), *compiled[1:], *eager.values()]
    if workload.suite == "nets" and "compile" in modes:
        out += [
            Rival(
                f"fused_res-{b}-compile",
                layout,
                slack,
                builds.compiled(modes["compile"], b),
                seconds=builds.compile_s,
            )
            for b in backends[:1]
        ]
    return out
