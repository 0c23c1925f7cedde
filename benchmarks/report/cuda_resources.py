"""What a compiler made of CUDA kernels, read from the binary; and the kernels of ``csrc``, compiled
as ``setup.py`` compiles them. Needs nvcc, and no GPU."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from .bound import Loop, loops

ROOT = Path(__file__).resolve().parents[2]
with mock.patch("setuptools.setup"):
    SETUP = runpy.run_path(str(ROOT / "setup.py"))
ARCHITECTURES = tuple(
    "sm_" + arch.replace(".", "").removesuffix("+PTX") for arch in SETUP["DEFAULT_ARCHS"].split(";")
)
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
# Template parameters in words: where they are false, where they are true.
FLAGS = {
    "kChannelsLast": ("NCHW", "channels_last"),
    "kVector": ("scalar", "vector"),
    "kSecond": ("one norm", "two norms"),
    "kCluster": ("a block", "a cluster"),
}
# kEpilogue of a convolution's tiles, in words.
EPILOGUES = ("affine", "statistics", "gradient")
# Those that are kinds of products of matrices, in words.
PRODUCTS = {
    "cuda::HalfProducts<bf16>": "bf16",
    "cuda::HalfProducts<fp16>": "fp16",
    "cuda::Tf32Products": "tf32",
    "cuda::ExactProducts": "fp32",
}


class Resources(NamedTuple):
    """Of one kernel. Registers of a thread, bytes of its stack and of a block's shared memory;
    then how many instructions there are of a kind, a loop's counted once."""

    registers: int
    shared: int
    stack: int
    spills: int  # loads and stores of local memory
    loads: int  # of global memory
    wide_loads: int  # those of 16 bytes or more
    stores: int
    wide_stores: int
    shared_loads: int
    shared_stores: int
    fp32: int  # additions, multiplications and both in one
    fp64: int
    mma: int  # products of matrices in registers
    barriers: int
    # NVIDIA's alone
    matrix_loads: int = 0  # ldmatrix: their operands, from shared memory
    copies: int = 0  # cp.async: from global to shared memory, past the registers
    wgmma: int = 0  # in shared memory: sm_90's, and sm_100's tcgen05
    tma: int = 0  # loads of tensors' boxes
    loops: tuple[Loop, ...] = ()  # all of it, then its innermost loops

    @property
    def spilled(self) -> bool:
        return self.stack > 0 or self.spills > 0


# LD and ST are of global memory too where the compiler could not tell which memory it is; FADD2 is
# sm_100's addition of two pairs.
SASS = {
    "spills": r"(LDL|STL)\b",
    "loads": r"LDG?\b",
    "wide_loads": r"LDG?\b.*\.(128|256)\b",
    "stores": r"STG?\b",
    "wide_stores": r"STG?\b.*\.(128|256)\b",
    "shared_loads": r"LDSM?\b",
    "shared_stores": r"STSM?\b",
    "fp32": r"F(ADD|MUL|FMA)2?\b",
    "fp64": r"D(ADD|MUL|FMA)\b",
    "mma": r"HMMA\b",
    "matrix_loads": r"LDSM\b",
    "copies": r"LDGSTS\b",
    "wgmma": r"(HGMMA|UTC\w*MMA)\b",
    "tma": r"UTMALDG\b",
    "barriers": r"BAR\b",
}


def count(instructions: list[str], kinds: dict[str, str]) -> dict[str, int]:
    """How many instructions there are of each kind: a pattern of how their names begin."""
    found = collections.Counter(instructions)
    return {
        kind: sum(n for name, n in found.items() if re.match(pattern, name))
        for kind, pattern in kinds.items()
    }


@functools.cache
def cuobjdump() -> str | None:
    """Triton brings one, with the nvdisasm that it needs; not every CUDA installation does."""
    triton, nvcc = importlib.util.find_spec("triton"), SETUP["nvcc"]()
    folders = []
    if triton:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    if nvcc:
        folders.append(Path(nvcc).resolve().parent)
    found = [shutil.which("cuobjdump", path=str(folder)) for folder in folders]
    return next(filter(None, found), None) or shutil.which("cuobjdump")


def read_cubin(path: Path) -> dict[str, Resources]:
    """By the kernels' mangled names. Shared memory is what is known at compile time."""

    def dump(option: str) -> str:
        command = [cuobjdump(), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    sass = dump("-sass")
    # from sm_90 on cuobjdump counts a kilobyte of a block's shared memory that the system keeps
    reserved = 1024 if int(re.search(r"code for sm_(\d+)", sass)[1]) >= 90 else 0
    mixes, found_loops = {}, {}
    for part in sass.split("Function : ")[1:]:
        # "/*00b0*/ @!P0 LDG.E.128 R4, ..." and nothing of the lines with the encoding alone
        name = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
        mixes[part.split()[0]] = count(re.findall(name, part, re.M), SASS)
        found_loops[part.split()[0]] = tuple(loops(part))
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = {}
    for kernel, *numbers in re.findall(usage, dump("--dump-resource-usage")):
        registers, stack, shared, local = map(int, numbers)
        shared = max(0, shared - reserved)
        found[kernel] = Resources(
            registers, shared, stack + local, **mixes[kernel], loops=found_loops[kernel]
        )
    return found


def declared(stem: str = "") -> dict[str, list[str]]:
    """Every ``__global__`` function of csrc/cuda (of an op's files), in order, and its template
    parameters' names."""
    paths = sorted((ROOT / "csrc/cuda").glob(f"{stem}*.cu*"))
    text = "".join(path.read_text() for path in paths)
    attributes = r"(?:__\w+__\((?:[^()]|\([^()]*\))*\)\s*)*"
    pattern = rf"(?:template <([^<>]*)>\s*)?__global__\s+void\s+{attributes}(\w+)\("
    return {
        name: [parameter.split()[-1] for parameter in parameters.split(",") if parameter]
        for parameters, name in re.findall(pattern, text)
    }


class Kernel(NamedTuple):
    name: str  # as short(); of its template's instances there are several
    dtype: str  # "" where it has none
    arguments: dict[str, str]  # of the template, by name, less the type of its elements
    resources: Resources

    @property
    def variant(self) -> str:
        words = []
        for name, value in self.arguments.items():
            if name in FLAGS:
                words.append(FLAGS[name][value == "true"])
            elif name == "kEpilogue":  # "(cuda::Epilogue)1"
                words.append(EPILOGUES[int(value[-1])])
            else:
                words.append(f"{name}={value}")
        return ", ".join(words)


def short(name: str) -> str:
    return name.removesuffix("_kernel")


def _kernel(demangled: str, resources: Resources) -> Kernel:
    """From "void fused_res::cuda::bn_act_fwd_apply_kernel<float, true, false>(...)"."""
    name, arguments = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*?)>)?\(", demangled).groups()
    values = (arguments or "").replace("fused_res::", "").split(", ")
    named = dict(zip(declared().get(name, ()), values, strict=False))
    products = named.pop("Products", "").strip()
    dtype = PRODUCTS[products] if products else named.pop("T", "").replace("float", "fp32")
    return Kernel(short(name), dtype, named, resources)


def version() -> str:
    text = subprocess.check_output([SETUP["nvcc"](), "--version"], text=True)
    return re.search(r"release [\d.]+, V([\d.]+)", text)[1]


def missing(architectures: Iterable[str]) -> str | None:
    """Why kernels cannot be compiled and read here; None where they can."""
    nvcc = SETUP["nvcc"]()
    if nvcc is None:
        return "no nvcc"
    if cuobjdump() is None:
        return "no cuobjdump, beside nvcc or in Triton"
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    unknown = [name for name in architectures if name.rstrip("af") not in known]
    return f"nvcc {version()} does not know {', '.join(unknown)}" if unknown else None


def compile_source(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    """The kernels of one source, in the order of their declarations."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    compute = architecture.replace("sm", "compute")
    flags = [*SETUP["common_flags"](), "-DUSE_CUDA", f"-gencode=arch={compute},code={architecture}"]
    command = [SETUP["nvcc"](), *flags, "-cubin", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True)
    return kernels_in(cubin)


def kernels_in(cubin: Path) -> list[Kernel]:
    found = read_cubin(cubin)
    names = subprocess.check_output(["c++filt", *found], text=True).splitlines()
    kernels = [_kernel(*pair) for pair in zip(names, found.values(), strict=True)]
    order = {short(name): i for i, name in enumerate(declared())}
    return sorted(kernels, key=lambda k: (order.get(k.name, len(order)), k.variant, k.dtype))


def compile_kernels(architecture: str, folder: Path, stem: str = "") -> list[Kernel]:
    """Every kernel (of an op), for one architecture."""
    sources = [source for source in SOURCES if source.stem.startswith(stem)]
    return [k for source in sources for k in compile_source(source, architecture, folder)]
