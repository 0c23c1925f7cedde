"""Building, installing and the README, as a user meets them."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import model_libraries  # noqa: F401  torchvision, before the README imports it
import pytest

import fused_res
from fused_res import env

NVCC = shutil.which("nvcc")
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def build_wheel(folder, **environ):
    """Builds a wheel from a copy of what a clone holds; returns (wheel, build folder, output)."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in ("csrc", "fused_res", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    process = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "-d", str(folder)],
        cwd=source,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, source / "build", process.stdout + process.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"), FUSED_RES_BUILD_CUDA="0")


@pytest.fixture(scope="module")
def built_with_cuda(tmp_path_factory):
    # one architecture: `make wheel` builds them all
    environ = {"FUSED_RES_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    return build_wheel(tmp_path_factory.mktemp("cuda"), **environ)


def check_contents(wheel, *libraries):
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {*libraries} == {name for name in names if name.endswith(".so")}
    assert "fused_res/kernels/__init__.py" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fused_res"}


def test_wheel_serves_every_python_and_holds_only_the_package(built):
    check_contents(built[0], "fused_res/_C.abi3.so")


def test_vector_code_cannot_replace_baseline_code(built):
    """Weak symbols of AVX objects may be linked in place of baseline ones: all must be ours."""
    _, build, _ = built
    for isa in ("avx2", "avx512"):
        objects = list(build.rglob(f"*kernels.{isa}.o"))
        assert objects
        for path in objects:
            lines = subprocess.check_output(["nm", "-C", str(path)], text=True).splitlines()
            weak = [line.split(maxsplit=2)[2] for line in lines if re.match(r"\w+ [VWu] ", line)]
            assert [name for name in weak if f"fused_res::{isa}::" not in name] == []
    text = next(build.rglob("build.ninja")).read_text()
    assert "-march=" not in text


def test_library_needs_no_unstable_symbol_of_torch(built, tmp_path):
    wheel, _, _ = built
    zipfile.ZipFile(wheel).extract("fused_res/_C.abi3.so", tmp_path)
    path = tmp_path / "fused_res/_C.abi3.so"
    undefined = subprocess.check_output(["nm", "-DC", "--undefined-only", str(path)], text=True)
    assert "torch_library_impl" in undefined or "aoti_torch" in undefined
    assert not re.search(r"\b(at|c10|torch)::", undefined)


def test_install_without_a_compiler(tmp_path):
    wheel, _, output = build_wheel(tmp_path, CXX="no-such-compiler", PATH="")
    assert output.count("no C++ compiler") == 1
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import torch, fused_res
from fused_res import reference
from fused_res.dispatch import backends
assert "not built" in backends.STATUS["cpu"], backends.STATUS
x = torch.randn(2, 8, 5, 5)
block = fused_res.FusedResBlock(8, 8)
block(x).sum().backward()
model = torch.nn.Sequential(*(fused_res.FusedResBlock(8, 8) for _ in range(3))).eval()
fused_res.fuse_(model)
with torch.no_grad():
    model(x.to(memory_format=torch.channels_last))
try:
    with fused_res.backend("cpu"):
        raise SystemExit("no error")
except fused_res.BackendUnavailable as error:
    assert "not built" in str(error)
print("fine")
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_cuda_library_builds_against_a_cpu_torch(built_with_cuda, tmp_path):
    wheel, _, _ = built_with_cuda
    check_contents(wheel, "fused_res/_C.abi3.so", "fused_res/_C_cuda.abi3.so")
    zipfile.ZipFile(wheel).extract("fused_res/_C_cuda.abi3.so", tmp_path)
    path = str(tmp_path / "fused_res/_C_cuda.abi3.so")
    needed = subprocess.check_output(["readelf", "-d", path], text=True)
    assert "[libtorch_cuda.so]" in needed  # the real one, once a CUDA torch has loaded it
    symbols = subprocess.check_output(["nm", "-DC", "--undefined-only", path], text=True)
    assert not re.search(r"\b(at|c10|torch)::", symbols)


COMPILER = """#!/bin/sh
case "$*" in
  *--list-gpu-code*) echo sm_80 sm_90 sm_100; exit ;;
  *.cu*) echo no such architecture >&2; exit {status} ;;
esac
while [ "$1" != -o ]; do shift; done
touch "$2"
"""


@pytest.mark.parametrize(
    "choice, cuda, status, built, warning",
    [
        ("auto", None, 0, False, "this torch has no CUDA"),
        ("auto", "13.0", 1, False, "the CUDA library did not build, see "),
        ("1", "13.0", 1, False, None),
        ("auto", "13.0", 0, True, None),
        ("1", None, 0, True, None),
    ],
)
def test_when_the_cuda_library_is_built(tmp_path, choice, cuda, status, built, warning):
    """By compilers that only make files, beside such a torch. nvcc fails unless ``status`` is 0."""
    (tmp_path / "bin").mkdir()
    for name in "nvcc", "c++":
        path = tmp_path / "bin" / name
        path.write_text(COMPILER.format(status=status))
        path.chmod(0o755)
    for name in "setup.py", "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "fused_res", tmp_path / "fused_res", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "site/torch").mkdir(parents=True)
    (tmp_path / "site/torch/__init__.py").touch()
    (tmp_path / "site/torch/version.py").write_text(f"cuda = {cuda!r}")
    process = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "lib"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "FUSED_RES_BUILD_CUDA": choice, "CUDA_HOME": str(tmp_path),
             "CXX": str(tmp_path / "bin/c++"), "TORCH_CUDA_ARCH_LIST": "",
             "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    found = {path.name for path in tmp_path.glob("lib/fused_res/*.so")}
    assert "_C.abi3.so" in found, process.stderr
    assert ("_C_cuda.abi3.so" in found) == built
    assert (process.returncode == 0) == (choice == "auto" or status == 0)
    assert process.stderr.count("warning: ") == (warning is not None), process.stderr
    assert (warning or "") in process.stderr
    if warning and cuda:
        log = process.stderr.split("see ")[1].split(": installing")[0]
        assert "no such architecture" in Path(log).read_text()


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("FUSED_RES_BUILD_CUDA", "yes", "FUSED_RES_BUILD_CUDA='yes' must be auto, 0 or 1"),
        ("TORCH_CUDA_ARCH_LIST", "hopper", "TORCH_CUDA_ARCH_LIST: 'hopper' is not of the form"),
    ],
)
def test_bad_build_variables(tmp_path, variable, value, words):
    if variable == "TORCH_CUDA_ARCH_LIST" and NVCC is None:
        pytest.skip("no nvcc")
    environ = {**os.environ, "FUSED_RES_BUILD_CUDA": "1", variable: value}
    process = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode != 0 and words in process.stderr


@pytest.mark.parametrize("name", ["FUSED_RES_BACKEND", "FUSED_RES_CPU_ISA", "FUSED_RES_LOG"])
def test_bad_environment_variable_is_named(name):
    with pytest.raises(ValueError, match=f"{name}='fast' must be one of: "):
        env.read({name: "fast"})
    assert env.read({name: ""}) == env.read({})


def test_environment_variables_take_effect(tmp_path):
    code = """
import torch
from fused_res.dispatch import backends
from fused_res.ops.bn_act import bn_act
print(backends.cpu_isa())
bn_act(torch.randn(2, 3, 4, 4, dtype=torch.double), None, None, training=True)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "FUSED_RES_CPU_ISA": "plain", "FUSED_RES_LOG": "dispatch"},
    )  # fmt: skip
    assert run.stdout.strip() == "plain"
    assert run.stderr.count("bn_act runs in PyTorch's own ops: no fused kernel is preferred") == 1


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_readme_python_runs():
    for code in blocks("python"):
        exec(code, {})


# every command of the README, and what runs it
COMMANDS = {
    "make run": ".ci/run",
    "make test": ".ci/run",
    'pip install "setuptools>=77" ninja && pip install --no-build-isolation .': "make test",
    "fused-res train": "test_train.py",
    "fused-res evaluate train-out/best.pt": "test_train.py",
}


def test_every_readme_command_is_run_somewhere():
    lines = [line.split("#")[0].strip() for text in blocks("sh") for line in text.splitlines()]
    assert {line for line in lines if line} == set(COMMANDS)
    ci = (ROOT / ".ci/run").read_text()
    for command, where in COMMANDS.items():
        if where == ".ci/run" and command.startswith("make"):
            assert command in ci, command


def test_versions_agree():
    assert fused_res.__version__ in (ROOT / "CHANGELOG.md").read_text()
