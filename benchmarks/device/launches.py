"""What Triton compiles in the two runs on a GPU, found without one: each kernel's launches on meta
tensors, compiled for the architecture of a GPU that is not here into TRITON_CACHE_DIR.

Triton takes what it compiled before from that folder if its own files, the kernel, the types and
alignment of the arguments, and the options are the same; ``tests/tools/test_gpu_prepared.py`` shows
that the launches on a device come to the same keys.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
import triton  # noqa: E402
from harness.program import CL, FORMATS  # noqa: E402
from suites import convs, nets, ops  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from device import smoke  # noqa: E402
from fused_res.dispatch import training_conv, training_conv_candidates  # noqa: E402
from fused_res.kernels import bn_act_bwd, bn_act_fwd, conv_tiles, launch, res_block  # noqa: E402
from fused_res.kernels import conv_bn_act as inference_kernels  # noqa: E402
from fused_res.reference import ACTS, ConvNorm, Norm, ResBlock  # noqa: E402

MULTIPROCESSORS = 132  # of an H100 and an H200: they decide which configurations come first
RELU = ACTS.index("relu")


class Device:
    """Stands for Triton's driver of a GPU of such an architecture."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


Launch = Callable[[], object]
channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)


def _laid_out(run: Callable) -> Callable:
    """Results as cuDNN lays them out; on meta tensors they may be contiguous."""

    def result(*args: object) -> object:
        found = run(*args)
        if isinstance(found, torch.Tensor):
            return channels_last(found)
        return [t if t is None or t.dim() != 4 else channels_last(t) for t in found]

    return result


@contextlib.contextmanager
def on_device(capability: int) -> Iterator[None]:
    """The kernels' host code behaves as beside a GPU of such an architecture."""
    known = MULTIPROCESSORS, capability // 10 in (9, 10)  # as conv_tiles.gpu
    with (
        mock.patch.object(launch, "on_device", lambda x: contextlib.nullcontext()),
        mock.patch.object(launch, "GRAPHS", False),
        mock.patch.object(conv_tiles, "gpu", lambda device: known),
        mock.patch.object(conv_tiles, "stages", lambda c, _: conv_tiles.pipeline(c, known[1])),
        mock.patch.object(torch, "convolution", _laid_out(torch.convolution)),
        mock.patch.object(res_block, "aten_backward", _laid_out(res_block.aten_backward)),
    ):
        yield


@contextlib.contextmanager
def collecting(capability: int) -> Iterator[list[Launch]]:
    """Collects the launches of the body, each to be compiled; none runs."""
    found: dict[tuple, Launch] = {}

    def collect(kernel, grid, warps, stages=None, **arguments) -> None:
        options = launch.options(kernel.fn.__name__, warps, launch.WARP, stages)
        given = {**arguments, **options}
        values = [_alike(parameter, arguments[parameter.name]) for parameter in kernel.params]
        key = kernel.fn.__name__, warps, stages, *map(str, values)
        found.setdefault(key, partial(kernel.run, grid=grid, warmup=True, **given))

    launches: list[Launch] = []
    with on_device(capability), mock.patch.object(launch, "run", collect):
        yield launches
    launches += found.values()


def _alike(parameter: object, value: object) -> object:
    """The same for arguments that come to one compilation."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if hasattr(value, "block_shape"):
        return value.base.dtype, value.block_shape
    if isinstance(value, int) and not parameter.is_constexpr:
        kind = None if parameter.do_not_specialize else (value == 1, value % 16 == 0)
        return abs(value) < 2**31, kind
    return type(value) if isinstance(value, float) and not parameter.is_constexpr else value


# --- what is launched


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str = CL) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=FORMATS[layout])


def _norm(channels: int) -> Norm:
    return Norm(*[torch.empty(channels, device="meta")] * 4, True)


def bn_act(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """A training step with a residual."""
    x, norm = empty(shape, dtype, layout), _norm(shape[1])
    _, mask, stats = bn_act_fwd.forward(bn_act_fwd.Call(x, norm, x, act=RELU))
    of_norm, wanted = bn_act_bwd.NormCall(norm.weight, True), bn_act_bwd.Wanted(True, True, True)
    bn_act_bwd.backward(
        bn_act_bwd.Call(x, x, of_norm, stats, mask, None, None, act=RELU, wanted=wanted)
    )


class NoHalo:
    """``conv_halo`` takes nothing: it is no kernel of Triton."""

    def trains(self, x: torch.Tensor, conv: ConvNorm) -> bool:
        return False


def block(x: torch.Tensor, kind: str, out: int, stride: int, candidate: int) -> torch.Tensor:
    """A training step of a block. candidate: of ``res_block.Candidates``, for all convolutions."""
    made = ResBlock(x.size(1), out, stride, kind=kind, device="meta", dtype=x.dtype)
    every = [getattr(made, f"conv{i + 1}") for i in range(made.depth)]
    every += [] if made.downsample is None else [made.downsample[0]]
    stages = [
        ConvNorm(c.weight.detach().contiguous(memory_format=torch.channels_last), None, c.stride,
                 c.padding, c.dilation, c.groups, _norm(len(c.weight)))
        for c in every
    ]  # fmt: skip
    branch, rest = stages[: made.depth], stages[made.depth :]
    candidates = [res_block.Candidates(candidate, candidate)] * len(stages)
    of = res_block.Block(x, branch, *(rest or [None]), RELU, False, candidates, NoHalo())
    y, *saved = res_block.forward(of, True)
    needs = 1 + sum(0b101 << (1 + 3 * i) for i in range(len(stages)))  # no bias
    res_block.backward(of, y, saved, needs)
    return y


def resnet50(batch: int, candidate: int) -> None:
    """The stem's norm and the blocks of a training step."""
    bn_act((batch, 64, 112, 112), torch.bfloat16, CL)
    x = empty((batch, 64, 56, 56), torch.bfloat16)
    for stage in range(4):
        for stride in (2 if stage else 1, 1):
            x = block(x, "bottleneck", 256 << stage, stride, candidate)


def training_convolution(call: training_conv.Call, most: int) -> None:
    """A call with ATen's convolution, and with the configurations that are guessed best."""
    with mock.patch.object(torch, "Generator") as generator:  # none is for meta tensors
        generator.return_value.manual_seed.return_value = None
        v = training_conv_candidates.values(call, "meta")
    steps = training_conv_candidates.Steps(call, v)
    triton = [c for c in steps.candidates() if c > training_conv.TRITON]
    for candidate in [training_conv.ATEN, *triton[:most]]:
        steps.run(candidate)


def inference(workload: convs.ConvWorkload, most: int) -> None:
    call = workload.call_of(workload.values("meta"))
    for config in inference_kernels.candidates(*call)[:most]:
        inference_kernels.forward(*call, config=config)


def every_launch() -> None:
    """Of smoke, and of the suites that both runs time, at their sizes."""
    with mock.patch.object(smoke, "HAS_GPU", True):
        trials = [trial for make in smoke.CASES.values() for trial in make()]
    for trial in trials:
        workload = trial.workload
        if isinstance(workload, convs.TrainingConvWorkload):
            training_convolution(workload.call, trial.most)
        elif isinstance(workload, convs.ConvWorkload):
            inference(workload, trial.most)
        elif isinstance(workload, ops.OpWorkload):
            bn_act(workload.shape, workload.dtype, workload.layout)
    for workload in ops.workloads(True, False):
        bn_act(workload.shape, workload.dtype, workload.layout)
    for workload in convs.resnet50_workloads(True, False):
        training_convolution(workload.call, convs.TOP)
    for candidate in (0, 1):  # cuDNN's convolutions, and Triton's
        resnet50(nets.GPU_NETS[0][1], candidate)
        resnet50(32, candidate)  # as dispatch.py measures
    for batch in (256, 1):
        for workload in convs.convs_of(True, batch, "bf16"):
            inference(workload, 1)


# --- compiling


def launcher(compiled: object) -> None:
    """Builds the modules that Triton 3.6 launches a kernel with, for this Python; without loading
    them. Later versions have one for all kernels."""
    if hasattr(nvidia, "make_launcher"):
        with mock.patch("triton.runtime.build._load_module_from_path", mock.MagicMock()):
            nvidia.CudaUtils()
            nvidia.CudaLauncher(compiled.src, compiled.metadata)


@contextlib.contextmanager
def linking() -> Iterator[None]:
    """In place of the driver's library, which is not here, an empty one of its name is linked."""
    with tempfile.TemporaryDirectory() as folder:
        stub = str(Path(folder) / "libcuda.so.1")
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o",
                        stub], check=True)  # fmt: skip
        with mock.patch.object(nvidia, "libcuda_dirs", lambda: [folder]):
            yield


_launches: list[Launch] = []


def _compile(place: int) -> str | None:
    try:
        launcher(_launches[place]())
    except Exception as error:  # one that does not compile leaves the rest
        return f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    return None


def compile_all(launches: list[Launch], capability: int, workers: int) -> list[str]:
    """Compiles launches in processes beside each other; the errors of those that failed."""
    driver.set_active(Device(capability))
    _launches[:] = launches
    fork = multiprocessing.get_context("fork")
    with linking(), concurrent.futures.ProcessPoolExecutor(workers, mp_context=fork) as pool:
        return [error for error in pool.map(_compile, range(len(launches))) if error]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", action="store_true", help="compile nothing, print how many")
    args = parser.parse_args(argv)
    with collecting(args.arch) as launches:
        every_launch()
    print(f"triton {triton.__version__}: {len(launches)} compilations", flush=True)
    if args.count:
        return 0
    errors = compile_all(launches, args.arch, args.workers)
    print("\n".join([*errors, f"{len(launches) - len(errors)} of {len(launches)} compiled"]))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
