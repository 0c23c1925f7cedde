"""The CUDA kernels as compiled for each architecture, without a GPU: registers, spills, stack, and
the width of their accesses to memory."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")
KERNELS = Path(__file__).parents[1] / "csrc/cuda/bn_act_kernels.cuh"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Registers a thread may take. A block has 256: at 128 two of them share a multiprocessor. The sums
# of two BatchNorms in doubles, and what reads element by element or a small tensor in one launch,
# may have a multiprocessor to themselves.
USUAL, MOST = 128, 255

LAUNCHES = f"""
#include "{KERNELS}"
using namespace fused_res::cuda;
void instantiate(const ForwardArgs& forward, const BackwardArgs& backward) {{
  bn_act_forward(forward, nullptr);
  bn_act_backward(backward, nullptr);
}}
"""
# more live values than 16 registers hold
SPILLS = """
__global__ void __maxnreg__(16) spills(float* p) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; i++) v[i] = p[i * 32 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) p[threadIdx.x * 64 + i] = v[i] * v[63 - i];
}
"""


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spills: int
    ptx: str

    @property
    def vector(self) -> bool:
        """Whether its tensors are read 16 bytes at a time: template argument kVector."""
        flags = re.search(r"_kernelI\w*?Lb[01]ELb([01])E", self.name)
        return flags is not None and flags[1] == "1"


def compile_kernels(source: str, architecture: str, folder: Path) -> list[Kernel]:
    path = folder / "kernels.cu"
    path.write_text(source)
    cubin = folder / "kernels.cubin"
    flags = ["-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-keep", "-keep-dir"]
    command = [NVCC, *flags, str(folder), "-cubin", str(path), "-o", str(cubin)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (ptx,) = folder.glob("*.ptx")
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx.read_text(), re.S))
    kernels = []
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) .*? stores, (\d+) ", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        kernels.append(Kernel(name, registers, stack, stores + loads, bodies[name]))
    return kernels


def check(kernels: list[Kernel]) -> None:
    bad = [(k.name, k.stack, k.spills) for k in kernels if k.stack or k.spills]
    assert not bad, f"name, bytes of stack, bytes spilled: {bad}"


def limit(kernel: Kernel) -> int:
    two_norms = re.search(r"gradient_sums_kernelI\w*Lb1ELb1ELb1E", kernel.name)
    alone = two_norms or "whole" in kernel.name or not kernel.vector
    return MOST if alone and "merge" not in kernel.name else USUAL


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory):
    known = subprocess.check_output([NVCC, "--list-gpu-code"], text=True).split()
    if request.param.rstrip("a") not in known:
        pytest.skip(f"this nvcc does not know {request.param}")
    return compile_kernels(LAUNCHES, request.param, tmp_path_factory.mktemp(request.param))


def test_no_kernel_spills(kernels):
    assert len(kernels) == len({k.name for k in kernels}) == 96
    check(kernels)


def test_registers_leave_room_for_two_blocks(kernels):
    bad = [(k.name, k.registers) for k in kernels if k.registers > limit(k)]
    assert not bad, bad


def test_memory_is_accessed_16_bytes_at_a_time(kernels):
    vector = [k for k in kernels if k.vector]
    assert len(vector) == 54
    stores = "apply_kernel|gradients_kernel|whole"
    bad = [k.name for k in vector if not re.search(r"ld\.global[.\w]*\.v4\.", k.ptx)]
    bad += [
        k.name
        for k in vector
        if re.search(stores, k.name) and not re.search(r"st\.global[.\w]*\.v4\.", k.ptx)
    ]
    assert not bad


def test_a_kernel_that_spills_is_caught(tmp_path):
    spilling = compile_kernels(SPILLS, "sm_90a", tmp_path)
    with pytest.raises(AssertionError, match="spills"):
        check(spilling)
