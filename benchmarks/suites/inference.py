"""Nets, blocks and chains of blocks in eval mode: PyTorch, other runtimes, cuDNN's fused calls, and
``optimize_for_inference``.

Convolutions and linear layers are of the workload's dtype, BatchNorm of float32; no autocast, which
would cast the weights in every call.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from harness import suite
from harness.program import FORMATS, Program
from harness.suite import CL, DTYPES, FUSED, OPTIMIZED, Candidate, Kernel, Plot, Suite, Workload
from report.plot import draw_roofline
from report.tables import COMPILED, Lookup, Table, both_forms, claims, figure, number, over
from torch import Tensor, nn

import fused_res

from .blocks import BlockWorkload, block, folded, fused, product_kernel
from .nets import NETS, Values, values

# What makes of a net and its input the call that is timed, which is given the input again.
Prepare = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
FROZEN = "fused_res-frozen"
COMPILE_FROZEN = "compile-freezing"


def program(prepare: Prepare, workload: InferenceWorkload, v: Values, layout: str = CL) -> Program:
    """``prepare``'s call of the workload's module, given the values ``v``."""
    module = workload.module().to(v.x.device)
    module.load_state_dict(v.state, strict=False)  # a block's values count no batches
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.to(workload.dtype)
    module = module.to(memory_format=FORMATS[layout]).eval()
    x = v.x.to(workload.dtype, memory_format=FORMATS[layout])
    with torch.no_grad():
        call = prepare(module, x)
    return Program({"eval": torch.no_grad()(partial(call, x))}, (x,))


def eager(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return module


def compiled(
    module: nn.Module, x: Tensor, freezing: bool, mode: str = "default"
) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of one fixed shape, told that ``x`` stays where it is.

    freezing: BatchNorm folded and weights in the layout that kernels like. The global setting asks
    for it: the one in ``options=`` is not seen where the graph is traced. It is there so that two
    candidates differ: else the second one is silently given the graph of the first.
    """
    if mode != "default":  # has CUDA graphs
        torch._dynamo.mark_static_address(x, guard=False)
    options = {**torch._inductor.list_mode_options(mode), "freezing": freezing}
    call = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    with torch._inductor.config.patch(freezing=freezing):
        call(x)
    return call


def cudnn_fused(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return folded(module, x.dtype)


def _onnx(module: nn.Module, x: Tensor) -> bytes:
    # By the older exporter: BatchNorm is folded by either, but the newer one takes 5.7 s for a
    # ResNet-50 where this takes 1.0 s, and ONNX Runtime is 6 % slower with what it writes.
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False)
    return file.getvalue()


def onnxruntime(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """As many threads as PyTorch has. Imports what may not be there: it is refused then."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(_onnx(module, x), options, providers=providers)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """As many threads as PyTorch has, and float32 inside, which is not its default everywhere."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    model = core.compile_model(core.read_model(_onnx(module, x)), "CPU", options)
    request = model.create_infer_request()

    def call(x: Tensor) -> Tensor:
        out = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(out[0])

    return call


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}


@functools.cache
def kernels(workload: InferenceWorkload) -> tuple[Kernel, ...]:
    """The least that the net, block or chain costs where each convolution is one kernel.

    BatchNorm, residual add and ReLU happen inside it, a projection is summed up in the convolution
    that it is added to, and every tensor crosses memory once in each kernel that reads or writes
    it. A chain of blocks is one kernel, which reads its weights and x once and writes y. Hooks see
    the layers in the order in which they run on tensors without data.
    """
    with torch.device("meta"):
        module, x = workload.module().eval(), torch.empty(workload.shape)
    item = workload.dtype.itemsize  # bytes
    found: list[Kernel] = []

    def product(part: nn.Conv2d | nn.Linear, args: tuple, y: torch.Tensor) -> None:
        found.append(product_kernel(part, *args, y, item))

    def pooling(part: nn.Module, args: tuple, y: torch.Tensor) -> None:
        found.append(Kernel(0, item * (args[0].numel() + y.numel())))

    def block(part: nn.Module, args: tuple, y: torch.Tensor) -> None:
        out = item * y.numel()
        if part.downsample is None:  # the last convolution reads x
            found[-1] = Kernel(found[-1].flops, found[-1].bytes + out)
            return
        shortcut, last = found.pop(), found.pop()
        found.append(Kernel(last.flops + shortcut.flops, last.bytes + shortcut.bytes - out))

    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_hook(product)
        elif isinstance(part, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            part.register_forward_hook(pooling)
        elif hasattr(part, "downsample"):
            part.register_forward_hook(block)
    with torch.no_grad():
        module(x)
    if all(hasattr(part, "downsample") for part in module.children()) and found:
        weights = sum(
            conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d)
        )
        return (Kernel(sum(k.flops for k in found), item * (weights + 2 * x.numel())),)
    return tuple(found)


@dataclass(frozen=True)
class InferenceWorkload(Workload):
    """A net or a block."""

    directions: tuple[str, ...] = ("eval",)
    net: str | None = None
    block: BlockWorkload | None = None

    settles = True

    def module(self) -> nn.Module:
        """In plain PyTorch, with parameters of its own."""
        return NETS[self.net].make() if self.net else self.block.block()

    def values(self, device: str = "cpu", seed: int = 0) -> Values:
        if self.net:
            return values(self.net, self.shape, device, seed)
        v = self.block.values(device, seed)
        del v["dy"]
        return Values(v.pop("x"), None, 1, v)

    def exact(self, v: Values) -> dict[str, Tensor]:
        exact = replace(self, dtype=torch.float64)
        result = program(lambda module, x: module.double(), exact, v.one(), "NCHW").result()
        return {"y": v.repeated(result["y"])}

    def kernels(self) -> tuple[Kernel, ...]:
        return kernels(self)

    def winograd(self) -> int:
        return sum(kernel.flops > 0 for kernel in self.kernels())

    def compile_modes(self, options: suite.Options) -> dict[str, dict]:
        """Arguments of ``compiled`` by the candidate's name: frozen, of a block on a CPU not frozen
        too; frozen is a net at its best, and a net compiles for long."""
        if not options.compile:
            return {}
        modes = self.modes
        if self.suite == "chains" and options.gpu:
            modes = "reduce-overhead", "max-autotune"
        if modes:
            return {f"compile-{mode}-freezing": {"mode": mode, "freezing": True} for mode in modes}
        frozen = {COMPILE_FROZEN: {"freezing": True}}
        return frozen if options.gpu or self.net else {"compile": {"freezing": False}, **frozen}

    def candidates(self, device: str, options: suite.Options) -> list[Candidate]:
        def of(name: str, slack: float, prepare: Prepare, layout: str = CL, **fields) -> Candidate:
            return Candidate(name, layout, slack, partial(program, prepare, self, layout=layout),
                             **fields)  # fmt: skip

        def of_backend(name: str) -> Candidate:
            def prepare(module: nn.Module, x: Tensor) -> nn.Module:
                return fused(nn.Sequential(module), name)  # the rest is PyTorch's

            why = suite.backends(device, self.dtype, "conv_bn_act")[name]
            return of(FUSED + name, self.slack(name), prepare, bound=self.bound(), why_not=why)

        why = suite.why_none(device, self.dtype, "conv_bn_act")
        optimized = partial(of, slack=suite.FUSED_SLACK, bound=self.bound(), why_not=why)
        optimize = fused_res.optimize_for_inference
        best = optimized(OPTIMIZED, prepare=optimize, core=True)
        found = [of("eager", 1.0, eager, core=True)]
        if options.gpu:
            found += [best, of("cudnn-fused", suite.COMPILE_SLACK, cudnn_fused, core=True)]
            found += map(of_backend, suite.backends(device))
            found += map(suite.graphed, list(found))
        else:
            found += [of("eager", 1.0, eager, "NCHW"), best]
            if self.suite == "chains":
                found.append(optimized(FROZEN, prepare=partial(optimize, freeze=True)))
                found.append(of_backend("cpu"))
            for name, prepare in RUNTIMES.items():
                found.append(of(name, suite.COMPILE_SLACK, prepare, "NCHW"))
        seconds = NETS[self.net].compile_s * 0.6 if self.net else 20.0
        for name, how in self.compile_modes(options).items():
            prepare, times = partial(compiled, **how), 3 if "autotune" in name else 1
            found.append(of(name, suite.COMPILE_SLACK, prepare, seconds=seconds * times))
        return found


# --- workloads


def net(
    name: str, batch: int, pixels: int = 224, dtype: str = "", suite: str = "inference", **fields
) -> InferenceWorkload:
    """dtype: of a GPU's, in the name too; default: float32."""
    full, shape = f"{name} batch {batch} {dtype}".strip(), (batch, 3, pixels, pixels)
    fields |= {"dtype": DTYPES[dtype or "fp32"], "alone": bool(dtype), "net": name}
    return InferenceWorkload(suite, full, shape, **fields)


def one_block(*args, dtype: str = "", **fields) -> InferenceWorkload:
    """A block, as ``blocks.block`` takes it."""
    of = block(*args, directions=("eval",), dtype=DTYPES[dtype or "fp32"])
    name = f"{of.name} {dtype}".strip()
    return InferenceWorkload("inference", name, of.shape, dtype=of.dtype, block=of, **fields)


def chain(
    count: int, channels: int, pixels: int, batch: int, dtype: str = "", **fields
) -> InferenceWorkload:
    name = f"chain of {count}, {channels}ch"
    found = net(name, batch, pixels, dtype, "chains", **fields)
    full = f"{name} {pixels}x{pixels} batch {batch} {dtype}".strip()
    return replace(found, name=full, shape=(batch, channels, pixels, pixels))


GPU_CHAINS = (
    (100, 32, 16, 64), (100, 32, 8, 1), (9, 64, 16, 256), (100, 32, 16, 1), (3, 64, 8, 1024),
    (9, 16, 32, 128), (100, 16, 8, 1024), (3, 32, 32, 16), (1, 64, 16, 256), (100, 64, 8, 16),
)  # fmt: skip


GPU_NETS = ("ResNet-50", 256), ("ResNet-50", 1), ("ResNet-18", 32)
GPU_BLOCKS = ("bottleneck", (32, 256, 56, 56), 64), ("basic", (32, 512, 7, 7))
CPU_NETS = (  # with the most rounds
    ("ResNet-18", 1, None), ("ResNet-18", 16, 7), ("ResNet-50", 1, None), ("ResNet-50", 16, 5),
)  # fmt: skip
BLOCKS = (
    ("basic", (1, 64, 56, 56)), ("basic", (32, 64, 56, 56)), ("basic", (1, 512, 7, 7)),
    ("basic", (32, 512, 7, 7)), ("bottleneck", (1, 256, 56, 56), 64),
    ("bottleneck", (16, 256, 56, 56), 64),
)  # fmt: skip


def workloads(gpu: bool, quick: bool) -> list[InferenceWorkload]:
    if gpu and quick:
        nets = [
            net("small ResNet", batch, 32, dtype) for batch, dtype in ((8, "bf16"), (1, "fp16"))
        ]
        return [*nets, one_block("bottleneck", (4, 32, 12, 12), 16, 64, 2, dtype="bf16")]
    if gpu:
        nets = [net(*args, dtype="bf16") for args in GPU_NETS]
        return nets + [one_block(*args, dtype="bf16") for args in GPU_BLOCKS]
    if quick:
        return [net("small ResNet", 1, 32), one_block("basic", (2, 16, 9, 9))]
    nets = [net(f"torchvision {n}", b, most_rounds=rounds) for n, b, rounds in CPU_NETS]
    return nets + [one_block(*args) for args in BLOCKS]


def chains(gpu: bool, quick: bool) -> list[InferenceWorkload]:
    if gpu:
        return [chain(*args, "bf16") for args in ([(3, 16, 8, 2)] if quick else GPU_CHAINS)]
    if quick:
        return [chain(3, 16, 8, 1)]
    return [
        chain(100, 32, 16, 1),
        chain(100, 32, 8, 1),
        chain(100, 32, 16, 64, most_rounds=9),
        chain(100, 32, 8, 64),
        net("ResNet-20 CIFAR", 1, 32, suite="chains"),
    ]


def everything(gpu: bool, quick: bool) -> list[InferenceWorkload]:
    """Every batch and dtype, against torch.compile's max-autotune."""
    if not gpu:
        return []
    fields = {"dtype": "bf16", "modes": ("max-autotune",)}
    if quick:
        return [one_block("basic", (2, 16, 9, 9), **fields)]
    nets = [
        net(name, batch, **fields | {"dtype": dtype})
        for dtype in ("bf16", "fp16")
        for name in ("ResNet-50", "ResNet-18")
        for batch in (1, 256, 32, 8)
    ]
    single = [
        one_block(kind, (batch, channels, size, size), *width, **fields)
        for batch in (256, 1, 32, 8)
        for kind, channels, size, *width in (
            ("bottleneck", 256, 56, 64),
            ("basic", 64, 56),
            ("basic", 512, 7),
            ("bottleneck", 2048, 7, 512),
        )
    ]
    strided = [
        one_block("bottleneck", (batch, 512, 28, 28), 256, 1024, 2, **fields) for batch in (256, 1)
    ]
    return nets + single + strided


# --- reports

GPU_COLUMNS = [
    over(f"over PyTorch, {CL}", "eager"),
    over("over torch.compile", COMPILED),
    over("over cuDNN's fused calls", "cudnn-fused"),
    over("in CUDA graphs, over the fastest of the others", "eager-graphed", "cudnn-fused-graphed",
         "compile-max-autotune-freezing", graphed=True),
    both_forms("ms", "median_ms"),
    both_forms("images/s", "images_per_s", ".0f"),
    both_forms("% of roofline", "percent_of_roofline"),
]  # fmt: skip
GPU_REPORT = Table(
    "Inference on a GPU",
    "Inference ({candidate}, channels_last): speed-up; then as it is / in a CUDA graph, and the "
    "share of what the measured peaks allow a kernel for each convolution.",
    "net or block",
    GPU_COLUMNS,
    candidates=(OPTIMIZED,),
)
GPU_CHAINS_REPORT = Table(
    "Chains of blocks in inference on a GPU",
    "Chains of residual blocks in one call, inference ({candidate}, channels_last): speed-up; then "
    "as it is / in a CUDA graph, and the share of what the measured peaks allow a kernel that "
    "reads the weights and x once.",
    "chain",
    GPU_COLUMNS,
)
EAGER = [over(f"over PyTorch, {layout}", f"eager {layout}") for layout in FORMATS]
RUNTIME_COLUMNS = [
    over("over torch.compile, frozen", COMPILE_FROZEN),
    over("over ONNX Runtime", "onnxruntime"),
    over("over OpenVINO", "openvino"),
    figure("ms", "median_ms"),
]
ROOFLINE = figure("% of roofline", "percent_of_roofline")
REPORT = Table(
    "Inference",
    "Inference, {candidate} (channels_last): speed-up over PyTorch and over other runtimes, and "
    "the share reached of what the measured peak rate and copy bandwidth allow a kernel for each "
    "convolution (over 100 %: Winograd multiplies less).",
    "net or block",
    [*EAGER, over("over torch.compile", "compile"), *RUNTIME_COLUMNS,
     figure("images/s", "images_per_s", ".0f"), ROOFLINE],
    candidates=(OPTIMIZED,),
)  # fmt: skip
CHAINS_REPORT = Table(
    "Chains of blocks in inference",
    "Chains of residual blocks in one call, {candidate} (channels_last), as the runtimes beside it "
    "are frozen; last, after `fuse_` alone, which looks at every parameter in every call. The "
    "roofline is that of a direct convolution.",
    "net",
    [*EAGER, *RUNTIME_COLUMNS, ROOFLINE,
     over(f"`fuse_` alone, over PyTorch, {CL}", f"eager {CL}", of=FUSED + "cpu")],
    candidates=(FROZEN,),
)  # fmt: skip


def targets(rows: list[dict]) -> list[tuple[bool, str]]:
    found, out = Lookup(rows), []
    blocks = [w for w in found.workloads if "ResNet" not in w]
    for candidate, allocator in found.pairs:
        what = f"{candidate}, allocator {allocator}: inference of"
        case = candidate, "eval", allocator
        for batch, least, least_frozen in (1, 1.35, 1.10), (16, 1.3, 1.05):
            names = [w for w in found.workloads if re.search(rf"ResNet-\d+ batch {batch}$", w)]
            nets = f"{what} ResNet-18, ResNet-50, batch {batch}, over"
            over = found.speedups(names, *case, f"eager {CL}")
            frozen = found.speedups(names, *case, COMPILE_FROZEN)
            out += claims(
                (f"{nets} eager {CL}", over, least, 2, 2),
                (f"{nets} torch.compile, frozen", frozen, least_frozen, 2, 2),
            )
        best = found.speedups(blocks, *case, "eager", "compile", COMPILE_FROZEN)
        out += claims((f"{what} blocks over the best of PyTorch", best, 1.0, 6, 6))
    return out


def goals(rows: list[dict]) -> list[tuple[bool, str]]:
    """To be the fastest runtime there is."""
    found, out = Lookup(rows), []
    for candidate, allocator in found.pairs:
        for workload in found.workloads:
            over = found.speedup(workload, candidate, "eval", allocator, *RUNTIMES)
            what = f"{candidate}, allocator {allocator}: {workload} over the faster of"
            met = over is not None and over >= 1
            out.append((met, f"{what} {' and '.join(RUNTIMES)}, >= 1.00: {number(over)}"))
    return out


def chain_targets(rows: list[dict]) -> list[tuple[bool, str]]:
    found, out = Lookup(rows), []
    least = {"16x16 batch 1": (6.0, 1), "8x8 batch 1": (10.0, 1), "batch 64": (2.5, 2),
             "CIFAR": (3.0, 1)}  # fmt: skip
    for allocator in found.allocators:
        case = FROZEN, "eval", allocator
        what = f"{FROZEN}, allocator {allocator}: chain of 100 blocks"
        for part, (enough, count) in least.items():
            names = [w for w in found.workloads if part in w]
            speeds = found.speedups(names, *case, f"eager {CL}")
            out += claims((f"{what}, {part}, over eager {CL}", speeds, enough, count, count))
        rest = []
        for workload in (w for w in found.workloads if "chain" in w):
            each = [found.speedup(workload, *case, base) for base in (COMPILE_FROZEN, *RUNTIMES)]
            rest.append(None if None in each else min(each))
        what = f"{what}, over the best of other runtimes and torch.compile"
        out += claims((what, rest, 1.5, 4, 4))
    return out


SUITES = (
    Suite("inference", 50, workloads, report=REPORT, gpu_report=GPU_REPORT, targets=targets,
          goals=goals, plot=Plot("inference", ("eval",))),
    Suite("chains", 60, chains, report=CHAINS_REPORT, gpu_report=GPU_CHAINS_REPORT,
          targets=chain_targets,
          plot=Plot("chains of blocks, inference", ("eval",)), picture=draw_roofline),
    Suite("inference-all", 70, everything, named=True, gpu_report=GPU_REPORT,
          plot=Plot("inference", ("eval",))),
)  # fmt: skip
