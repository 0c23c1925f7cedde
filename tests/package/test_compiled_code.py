"""What the compilers made of the GPU kernels, read from their PTX and machine code without a GPU:
copies and products are waited for and fenced, no load that is not coherent reads what is written,
ReLU's sign is the same sum everywhere. A planted fault of each kind is caught."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import sweep

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    from compiled_code import checks, ptx, ptx_run
    from report import cuda_resources

DESCRIPTOR = "_training_convolution_fwd_bwd_descriptor_kernel"
# Of kernels and targets; the first is quick.
SETS = [("few", "sm_90"), ("descriptor", "sm_90"), ("pointer", "sm_90"), ("pointer", "sm_80"),
        ("bn_act", "sm_90")]  # fmt: skip


def compiling() -> dict[str, str]:
    """The environment of a process in which Triton compiles instead of interpreting."""
    folders = [str(ROOT / "benchmarks"), str(ROOT / "tests/tools"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "TRITON_INTERPRET": "0"}


def compiled(what: str, target: str) -> list[dict]:
    """As ``compiled_code/texts.py`` prints it."""
    script = ROOT / "tests/tools/compiled_code/texts.py"
    run = subprocess.run(
        [sys.executable, str(script), target, what],
        capture_output=True,
        text=True,
        env=compiling(),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def run(kernel: dict, text: str | None = None) -> ptx_run.Block:
    given = checks.Text(text or kernel["ptx"], kernel["ttgir"])
    return checks.run(given, kernel["constants"])


@pytest.fixture(scope="module")
def few():
    return compiled("few", "sm_90")


@pytest.fixture(scope="module")
def relu():
    """With each kernel's machine code."""
    return [kernel | {"code": code_of(kernel)} for kernel in compiled("relu", "sm_90")]


@pytest.fixture(scope="module")
def one(few):
    """A kernel with TMA loads and stores, wgmma and scratch memory."""
    return next(k for k in few if k["kernel"] == DESCRIPTOR and k["residual"] == "RELU")


# --- one block


@pytest.mark.parametrize(("what", "target"), sweep(SETS, quick=SETS[:1], unpack=True))
def test_everything_is_waited_for_and_fenced(request, what, target):
    kernels = request.getfixturevalue("few") if what == "few" else compiled(what, target)
    asked = dict.fromkeys(("bytes", "fence", "barrier", "wait"), 0)
    for kernel in kernels:
        block = run(kernel)
        assert not block.memory.faults, (kernel["name"], block.memory.faults[:3])
        assert not checks.incoherent(block.kernel), kernel["name"]
        for rule, count in block.memory.checked.items():
            asked[rule] += count
        if kernel["kernel"].endswith("_descriptor_kernel"):
            assert min(block.memory.checked.values()) > 50, kernel["name"]
    assert asked["wait"] > 10 * len(kernels)
    assert what == "bn_act" or "sm_80" in target or asked["fence"] > 10 * len(kernels)


def once(pattern: str, by: str, place: int = 0):
    """Replaces the place-th match; the last of them where it is -1."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text, re.M))
        match = found[place]
        return text[: match.start()] + match.expand(by) + text[match.end() :]

    return change


def every(pattern: str, by: str):
    return lambda text: re.sub(pattern, by, text, flags=re.M)


def without_barrier_before(pattern: str):
    """Drops the barrier that comes last before the first match."""

    def change(text: str) -> str:
        place = re.search(pattern, text, re.M).start()
        begin = text.rindex("bar.sync", 0, place)
        return text[:begin] + "//" + text[begin:]

    return change


def without_barrier_after(pattern: str):
    def change(text: str) -> str:
        begin = text.index("bar.sync", re.search(pattern, text, re.M).end())
        return text[:begin] + "//" + text[begin:]

    return change


def without_barriers_in_the_loop(text: str) -> str:
    """From the wait for the product before to where the loop goes back."""
    begin = re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", text).end()
    stop = text.index("bra", begin)
    return text[:begin] + text[begin:stop].replace("bar.sync", "//") + text[stop:]


STORE = r"cp\.async\.bulk\.tensor\.4d\.global"
PLANTED = {
    "a byte too many is expected": ("bytes", once(r"(expect_tx.*), (\d+);", r"\1, 32784;", -1)),
    "the bytes of one box are expected": ("bytes", every(r"(expect_tx.*), \d+;", r"\1, 8192;")),
    "a copy is left out": ("bytes", every(r"@%p\d+ (cp\.async\.bulk\.tensor\.2d\.sh.*)", r"//\1")),
    "no proxy fence before a TMA store": ("fence", every(r"fence\.proxy\.async", "//")),
    "no barrier before a TMA store": ("barrier", without_barrier_before(STORE)),
    "no barrier between loads and stores of scratch memory": (
        "barrier", without_barrier_after(r"stmatrix|st\.shared")),
    "no barrier between a product and a TMA load": ("barrier", without_barriers_in_the_loop),
    "an mbarrier that is not waited for": (
        "wait", every(r"mbarrier\.try_wait.*", "setp.eq.b32 complete, 0, 0;")),
    "a product that is not waited for in the loop": (
        "wait", every(r"wgmma\.wait_group\.sync\.aligned\s+1;", "//")),
    "sums of a product that is not waited for": (
        "wait", every(r"wgmma\.wait_group\.sync\.aligned\s+0;", "//")),
    "a TMA store that is not waited for": (
        "wait", every(r"cp\.async\.bulk\.wait_group\.read\s+0;", "//")),
    "a block that is done before its TMA store": (
        "wait", once(r"cp\.async\.bulk\.wait_group(\.read)?\s+0;", "//", -1)),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_caught(one, fault):
    rule, change = PLANTED[fault]
    text = change(one["ptx"])
    assert text != one["ptx"]
    assert rule in {f.rule for f in run(one, text).memory.faults}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_cp_async_that_is_not_waited_for_is_caught(target):
    tried = 0
    for kernel in compiled("pointer", target)[:6]:
        text = re.sub(r"cp\.async\.wait_group\s+\d+;", "//", kernel["ptx"])
        if text != kernel["ptx"]:
            tried += 1
            assert "wait" in {f.rule for f in run(kernel, text).memory.faults}, kernel["name"]
    assert tried or target == "sm_90"  # before Triton 3.9 there are none


def test_float32_in_descriptors(few):
    """Tensor cores take TF32 from shared memory as it is and cut the rest off, unless TMA rounds it
    on the way, which Triton 3.6 cannot ask for: there all else is as in later versions."""
    code = (
        "from fused_res.kernels import conv_tiles\n"
        "from triton.tools.tensor_descriptor import TensorDescriptor\n"
        "known = 'round_f32_to_tf32' in TensorDescriptor.__dataclass_fields__\n"
        "print(known, bool(conv_tiles.ROUND))"
    )
    answer = subprocess.check_output([sys.executable, "-c", code], text=True,
                                     env=compiling()).split()  # fmt: skip
    assert answer in (["True", "True"], ["False", "False"])
    floats = [k for k in few if " fp32 " in k["name"]]
    for kernel in floats:
        assert re.search(r"wgmma\.mma_async\.\S*f32\.tf32\.tf32", kernel["ptx"])
        boxes = [b for b in ptx.arguments(kernel["ttgir"]).values() if isinstance(b, ptx.Box)]
        assert len(boxes) >= 3 and all(b.element == 4 for b in boxes)
    assert len(floats) >= 2


# --- loads that are not coherent

INCOHERENT = """
__global__ void kernel(const float* x, const float* __restrict__ z, float* y, long n) {
  const long i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) y[i] = __ldg(FROM + n - i) + x[i];
}
"""


def test_loads_that_are_not_coherent_of_what_is_written_are_caught(one):
    kernel = ptx.parse_one(one["ptx"])
    found = ptx.accesses(kernel)
    assert found.loads and found.stores and not found.unknown
    read, written = (frozenset().union(*d.values()) for d in (found.loads, found.stores))
    assert read and written and not read & written
    # A load from where the sums of the program go.
    address = next(re.search(r"%rd\d+", i.operands[0])[0] for i in kernel.code
                   if i.name.startswith("st.global"))  # fmt: skip
    load = f"ld.global.nc.b32 %r1, [ {address} + 0 ];\n\tret;"
    assert checks.incoherent(ptx.parse_one(one["ptx"].replace("ret;", load)))
    # One of another tensor may stay.
    other = every(r"ld\.global\.v4", "ld.global.nc.v4")(one["ptx"])
    assert ptx.accesses(ptx.parse_one(other)).not_coherent
    assert not checks.incoherent(ptx.parse_one(other))


@pytest.mark.parametrize(("of", "wrong"), [("y", True), ("z", False), ("x", False)])
def test_in_cuda_too(tmp_path, of, wrong):
    if cuda_resources.missing(["sm_90"]):
        pytest.skip("no nvcc")
    source = tmp_path / "kernel.cu"
    source.write_text(INCOHERENT.replace("FROM", of))
    (kernel,) = ptx.parse(checks.compile_ptx(source, "sm_90"))
    assert len(ptx.accesses(kernel).not_coherent) > 0
    assert bool(checks.incoherent(kernel)) == wrong


# --- ReLU's sign


def code_of(kernel: dict) -> list[checks.Operation]:
    (code,) = checks.disassemble(base64.b64decode(kernel["cubin"])).values()
    return code


def test_a_relus_sign_is_the_same_sum_in_every_kernel_of_triton(relu):
    seen = set()
    for kernel in relu:
        wrong = checks.wrong_signs(kernel["code"], least=4)
        assert not wrong, (kernel["name"], wrong)
        seen.add(kernel["kernel"])
    assert seen == {"_bn_act_fwd_apply_kernel", "_bn_act_bwd_reapply_kernel", DESCRIPTOR,
                    DESCRIPTOR.replace("descriptor", "pointer")}  # fmt: skip


@pytest.mark.parametrize("fault", ["mul and add", "another order", "no subtraction"])
def test_another_sum_is_caught(relu, fault):
    """In machine code: x * scale + (shift - centre * scale) and its like."""
    kernel = next(k for k in relu if k["kernel"] == "_bn_act_fwd_apply_kernel")
    code, planted = kernel["code"], []
    for operation in code:
        name, operands = operation
        if name == "FFMA" and fault == "mul and add":
            planted.append(checks.Operation("FMUL", operands[:3]))
            operation = checks.Operation("FADD", (operands[0], operands[0], operands[3]))
        elif name == "FADD" and fault == "another order":
            operation = checks.Operation("FFMA", (*operands, "R1"))
        elif name == "FADD" and fault == "no subtraction":
            operation = checks.Operation("MOV", operands)
        planted.append(operation)
    assert not checks.wrong_signs(code, least=4)
    assert checks.wrong_signs(planted, least=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The machine code of the CUDA library of this checkout for Hopper, by the kernels' names."""
    library, folder = ROOT / "fused_res/_C_cuda.abi3.so", tmp_path_factory.mktemp("library")
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    if not library.exists() or library.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        pytest.skip("the CUDA library is not built of these sources")
    command = [cuda_resources.cuobjdump(), "-xelf", "all", str(library)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    found = {}
    for cubin in folder.glob("*sm_90a*.cubin"):
        found |= checks.disassemble(cubin.read_bytes())
    names = subprocess.check_output(["c++filt", *found], text=True).splitlines()
    return dict(zip(names, found.values(), strict=True))


@pytest.mark.slow
def test_a_relus_sign_is_the_same_sum_in_cuda(library):
    seen = 0
    for name, code in library.items():
        if re.search(r"bn_act_fwd_(apply|reapply)_kernel", name):
            # A residual that is not there is -0, which changes no bit.
            assert not checks.wrong_signs(code, 0, also=[("FADD", *checks.SIGN)]), name
            assert sum(checks.signs(code).values()) >= 8, name
            seen += 1
        if re.search(r"conv_halo.*Epilogue\)2", name):
            assert not checks.wrong_signs(code, 8), name
            seen += 1
    assert seen >= 20


@pytest.mark.slow
def test_cuda_has_no_load_that_is_not_coherent(library):
    """None at all: what a kernel reads may be what another argument of it writes."""
    assert len(library) > 100
    for name, code in library.items():
        assert not [o for o in code if re.match(r"LDG\b.*\.CONSTANT", o.name)], name


# --- pipes


def test_passes_over_the_elements_have_no_float64(relu):
    for kernel in relu:
        pipes = checks.pipes(kernel["code"])
        assert pipes.bytes > 0 and pipes.fp64 == 0, kernel["name"]
        assert pipes.special_per_byte < 0.1, kernel["name"]


def test_pipes_are_counted():
    code = checks.read_sass(
        "Function : f\n"
        "        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0 */\n"
        "        /*0010*/              @!P0 LDG.E.U8 R8, desc[UR4][R2.64] ;\n"
        "        /*0020*/                   DADD R4, R4, R6 ;\n"
        "        /*0030*/                   MUFU.RCP R5, R5 ;\n"
        "        /*0040*/                   STG.E desc[UR4][R2.64], R4 ;\n"
    )["f"]
    assert checks.pipes(code) == (1, 1, 21)
