"""The CUDA kernels as compiled for each architecture, without a GPU: registers, spills, stack, and
the width of their accesses to memory."""

import re
import subprocess
from pathlib import Path

import pytest
from sweeps import sweep

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    from report import cuda_resources
    from report.cuda_resources import ARCHITECTURES, Kernel

# Registers a thread may take. A block has 256: at 128 two of them share a multiprocessor. The sums
# of two BatchNorms in doubles, and what reads element by element or a small tensor in one launch,
# may have a multiprocessor to themselves; so have a chain and a convolution of large tiles, whose
# shared memory is what is short.
USUAL, MOST = 128, 255

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


def needs(architecture: str) -> None:
    missing = cuda_resources.missing([architecture])
    if missing:
        pytest.skip(missing)


def check(kernels: list[Kernel]) -> None:
    bad = [k for k in kernels if k.resources.spilled]
    assert not bad, f"spills: {bad}"


def limit(kernel: Kernel) -> int:
    two_norms = kernel.arguments.get("kSecond") == "true"
    doubles = two_norms and kernel.name.endswith(("_sums", "_cooperative"))
    scalar = kernel.arguments.get("kVector") == "false"
    alone = kernel.name.endswith("_whole") or kernel.name.startswith("res_chain")
    if kernel.name.startswith("conv_halo"):
        alone = kernel.arguments["kRows"] == "4" or kernel.dtype == "fp32"
    return MOST if doubles or scalar or alone else USUAL


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every kernel of the extension that is built in this checkout, by architecture; none where
    there is none, or a source is newer."""
    library, folder = ROOT / "fused_res/_C_cuda.abi3.so", tmp_path_factory.mktemp("built")
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if not library.exists() or library.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        return {}
    command = [cuda_resources.cuobjdump(), "-xelf", "all", str(library)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    found = {}
    for cubin in sorted(folder.glob("*.cubin")):
        kernels = found.setdefault(cubin.stem.split(".")[-1], [])
        kernels += cuda_resources.kernels_in(cubin)
    return found


@pytest.fixture(scope="module", params=sweep(ARCHITECTURES, quick=["sm_90a"]))
def kernels(request, tmp_path_factory):
    """All of an architecture: as the library has them that is built, else compiled."""
    needs(request.param)
    built = request.getfixturevalue("built")
    if request.param not in built:
        return cuda_resources.compile_kernels(request.param, tmp_path_factory.mktemp("compiled"))
    return built[request.param]


def test_every_kernel_is_there_once(kernels):
    assert {k.name for k in kernels} == set(map(cuda_resources.short, cuda_resources.declared()))
    assert len({(k.name, k.dtype, k.variant) for k in kernels}) == len(kernels)
    declared = cuda_resources.declared()
    assert all(k.dtype or not declared[f"{k.name}_kernel"] for k in kernels)


def test_no_kernel_spills(kernels):
    check(kernels)


def test_registers_leave_room_for_two_blocks(kernels):
    bad = [k for k in kernels if k.resources.registers > limit(k)]
    assert not bad, bad


def test_a_cooperative_launch_leaves_the_shared_memory_it_counts_on(kernels):
    text = (ROOT / "csrc/cuda/bn_act_common.cuh").read_text()
    limit = int(re.search(r"kStaticShared = (\d+) << 10;", text)[1]) << 10
    bad = [k for k in kernels if k.resources.shared > limit]
    assert not bad, bad


def test_memory_is_accessed_16_bytes_at_a_time(kernels):
    # the others go over tensors element by element
    whole = [k for k in kernels if k.arguments.get("kVector") != "false"]
    vector = [k for k in whole if "kChannelsLast" in k.arguments]
    assert len(vector) >= sum("kChannelsLast" in k.arguments for k in kernels) / 2
    assert not [k for k in vector if k.resources.wide_loads == 0]
    for k in vector:
        # those that store tensors and masks, nothing else
        if k.name in ("bn_act_fwd_apply", "bn_act_bwd_gradients"):
            stores, wide = k.resources.stores, k.resources.wide_stores
            assert wide > 0 and stores - wide <= wide, k


def test_a_chain_multiplies_on_tensor_cores_what_was_copied_asynchronously(kernels):
    chains = [k for k in kernels if k.name == "res_chain_fwd"]
    empty = [k for k in chains if k.resources.copies == 0]  # before sm_90 there are no clusters
    assert all(k.arguments["kCluster"] == "true" for k in empty)
    chains = [k for k in chains if k not in empty]
    assert {k.dtype for k in chains} == {"bf16", "fp16", "tf32", "fp32"}
    for k in chains:
        r = k.resources
        assert r.copies > 0 and r.wide_loads > 0 and r.wide_stores > 0, k
        assert (r.mma > 0) == (r.matrix_loads > 0) == (k.dtype != "fp32"), k
        # each load of 16 pixels feeds two products of 8 channels out, or four
        assert 2 * r.matrix_loads <= r.mma <= 4 * r.matrix_loads, k
        assert r.shared == 0  # all of it is given at the launch


def test_a_convolution_multiplies_patches_that_were_copied_asynchronously(kernels):
    convs = [k for k in kernels if k.name == "conv_halo_fwd_bwd"]
    assert {k.dtype for k in convs} == {"bf16", "fp16", "tf32", "fp32"}
    assert len(convs) == 7 * len(cuda_resources.EPILOGUES)  # of fp32 with 2 rows alone
    for k in convs:
        r = k.resources
        assert r.copies > 0 and r.shared == 0, k
        assert (r.mma > 0) == (r.matrix_loads > 0) == (k.dtype != "fp32"), k
        assert 2 * r.matrix_loads <= r.mma <= 4 * r.matrix_loads, k


def test_a_kernel_that_spills_is_caught(tmp_path):
    needs("sm_90a")
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    spilling = cuda_resources.compile_source(source, "sm_90a", tmp_path)
    with pytest.raises(AssertionError, match="spills"):
        check(spilling)
