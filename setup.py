"""Builds the two shared libraries of fused_res: CPU (always, where there is a C++ compiler) and
CUDA.

Neither is a Python extension: they register kernels with PyTorch's dispatcher through libtorch's
stable ABI, so one wheel serves every Python >= 3.10 and every torch >= 2.11.

    FUSED_RES_BUILD_CUDA   auto (default: where nvcc is found and torch has CUDA; where nvcc fails,
                           go on without), 0, 1 (with any torch; fail without nvcc)
    TORCH_CUDA_ARCH_LIST   for example "8.0;9.0a;10.0+PTX" (the default)
    FUSED_RES_SANITIZE     1: the CPU library under AddressSanitizer and UndefinedBehaviorSanitizer
    CXX                    the C++ compiler
"""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch the libraries load under
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Kernel sources are compiled once per instruction set; the library picks one at run time.
ISA_FLAGS = {"plain": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx2"] = avx2
    ISA_FLAGS["avx512"] = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def compiler():
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def build_cuda():
    """FUSED_RES_BUILD_CUDA: auto, 0 or 1."""
    choice = os.environ.get("FUSED_RES_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_RES_BUILD_CUDA={choice!r} must be auto, 0 or 1")
    return choice


def nvcc():
    """Path of nvcc; None where it is not found or FUSED_RES_BUILD_CUDA is 0."""
    choice = build_cuda()
    if choice == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home]
    path = next(filter(None, found), None) or shutil.which("nvcc")
    if path is None and choice == "1":
        raise SystemExit("FUSED_RES_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH")
    return path


def gencode_flags(nvcc_path):
    """-gencode flags of TORCH_CUDA_ARCH_LIST, or of the defaults that this nvcc knows; and their
    names, which the library keeps."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST") or None
    flags, known, names = [], [], []
    if requested is None:
        known = subprocess.run(
            [nvcc_path, "--list-gpu-code"], capture_output=True, text=True, check=True
        ).stdout.split()
    for arch in re.split(r"[;\s]+", requested or DEFAULT_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {arch!r} is not of the form 9.0, 9.0a, 9.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        number = f"{major}{minor}"
        if requested is None and f"sm_{number}" not in known:
            continue
        names.append(arch)
        number += suffix
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return [*flags, f"-DFUSED_RES_ARCHITECTURES={';'.join(names)}"]


class Ninja:
    """The text of a build.ninja."""

    def __init__(self):
        self.lines = []

    def rule(self, name, command, depfile=None):
        self.lines += [f"rule {name}", f"  command = {command}"]
        if depfile:
            self.lines += [f"  depfile = {depfile}", "  deps = gcc"]

    def build(self, output, rule, inputs, **variables):
        self.lines.append(
            f"build {self.escape(output)}: {rule} {' '.join(map(self.escape, inputs))}"
        )
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    @staticmethod
    def escape(path):
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def run(self, folder, log=None):
        """Builds in ``folder``; the compilers print to ``log``, an open file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        subprocess.run(command, check=True, stdout=log, stderr=log)


def torch_folder():
    """Where torch is installed; to import it takes seconds, in each of pip's calls."""
    found = importlib.util.find_spec("torch")
    if found is None:
        raise SystemExit("the build needs torch: pip install torch, or build with isolation")
    return Path(found.origin).parent


def torch_has_cuda():
    return runpy.run_path(str(torch_folder() / "version.py"))["cuda"] is not None


def common_flags():
    include = torch_folder() / "include"
    return [
        "-std=c++20",
        "-O3",
        f"-I{include}",
        f"-I{include / 'torch/csrc/api/include'}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]


def cpu_rules(ninja, output):
    lib = torch_folder() / "lib"
    flags = [
        *common_flags(),
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
    ]
    link = [f"-L{lib}", "-ltorch_cpu"]
    if os.environ.get("FUSED_RES_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        # with the multiply-adds of the shipped build: the tests look at rounding
        flags += [*sanitize, "-O1", "-fexpensive-optimizations", "-g", "-fno-omit-frame-pointer"]
        link += sanitize
    if X86:
        flags.append("-DFUSED_RES_X86")
    quoted = " ".join(f'"{flag}"' for flag in flags)
    ninja.rule("cxx", f'"{compiler()}" {quoted} $isa -MMD -MF $out.d -c $in -o $out', "$out.d")
    ninja.rule("link", f'"{compiler()}" -shared $in -o $out ' + " ".join(f'"{x}"' for x in link))
    objects = []

    def compile_source(source, name, isa=""):
        objects.append(f"{name}.o")
        ninja.build(objects[-1], "cxx", [source], isa=isa)

    for source in [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
        if not source.stem.endswith("_kernels"):
            compile_source(source, f"cpu.{source.stem}")
            continue
        for isa, isa_flags in ISA_FLAGS.items():
            defines = [f"-DFUSED_RES_ISA={isa}"]
            if isa_flags:  # the vector builds leave float64 to the plain one
                defines.append("-DFUSED_RES_VECTOR_ISA")
            compile_source(source, f"cpu.{source.stem}.{isa}", " ".join(isa_flags + defines))
    ninja.build(output, "link", objects)


def cuda_rules(ninja, output):
    nvcc_path = nvcc()
    flags = [
        *common_flags(),
        "-DUSE_CUDA",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ]
    flags += gencode_flags(nvcc_path)
    quoted = " ".join(f'"{flag}"' for flag in flags)
    ninja.rule("nvcc", f'"{nvcc_path}" {quoted} -MMD -MF $out.d -c $in -o $out', "$out.d")
    # libtorch_cuda is absent from a CPU-only torch, so an empty library of its name stands in for
    # it at link time; at run time the loader finds the real one, already in the process.
    ninja.rule(
        "stub", f'"{compiler()}" -shared -x c++ /dev/null -Wl,-soname,libtorch_cuda.so -o $out'
    )
    libraries = Path(nvcc_path).resolve().parent.parent / "lib64"
    lib = torch_folder() / "lib"
    link = f'-L"{libraries}" -L"{lib}" -ltorch_cpu -lcudart_static -lrt -ldl -lpthread'
    ninja.rule(
        "link_cuda",
        f'"{compiler()}" -shared -Wl,--no-as-needed $in -o $out {link} -Wl,--exclude-libs,ALL',
    )
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cu")) + sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(f"cuda.{source.stem}.o")
        ninja.build(objects[-1], "nvcc", [source])
    ninja.build("libtorch_cuda.so", "stub", [])
    ninja.build(output, "link_cuda", [*objects, "libtorch_cuda.so"])


class BuildLibraries(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        if ext.optional:
            return self.try_cuda(output, folder)
        ninja = Ninja()
        try:
            {"fused_res._C": cpu_rules, "fused_res._C_cuda": cuda_rules}[ext.name](ninja, output)
            ninja.run(folder)
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"building {ext.name} failed; the compiler's words are above"
            ) from None

    def try_cuda(self, output, folder):
        """Builds the CUDA library, or warns and names the log where nvcc fails."""
        log = ROOT / "build" / "cuda.log"  # pip deletes the folder of an editable build
        log.parent.mkdir(exist_ok=True)
        ninja = Ninja()
        try:
            with log.open("w") as file:
                cuda_rules(ninja, output)
                ninja.run(folder, file)
        except (subprocess.CalledProcessError, OSError) as error:
            with log.open("a") as file:
                print(error, getattr(error, "stderr", None) or "", file=file)
            warn(
                f"the CUDA library did not build, see {log}: installing the CPU library and the "
                "Triton kernels without it; FUSED_RES_BUILD_CUDA=0 does not try"
            )


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def cuda_extension():
    """The CUDA library, or None where it is not built."""
    if nvcc() is None:
        return None
    if build_cuda() == "auto" and not torch_has_cuda():
        warn(
            "nvcc is here, but this torch has no CUDA and could not load a CUDA library: not "
            "building it (FUSED_RES_BUILD_CUDA=1 does)"
        )
        return None
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        gencode_flags(nvcc())  # complains of a bad list before anything is compiled
    optional = build_cuda() == "auto"
    return Extension("fused_res._C_cuda", [], py_limited_api=True, optional=optional)


def extensions():
    if compiler() is None or not sys.platform.startswith("linux"):
        warn(
            "no C++ compiler (or not Linux): installing fused_res without its C++ libraries; "
            "Triton or the reference will run instead"
        )
        return []
    cpu = Extension("fused_res._C", [], py_limited_api=True)
    return [cpu, *filter(None, [cuda_extension()])]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
