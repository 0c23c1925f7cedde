"""A CUDA library that this driver or these GPUs cannot run is not available, and says why."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from fused_res.dispatch import backends, cuda_library
from fused_res.dispatch.cuda_library import Facts, runs_on, why_not, why_not_on

SHIPPED = ("8.0", "9.0a", "10.0+PTX")


def facts(**fields) -> Facts:
    return Facts(13000, 13000, SHIPPED)._replace(**fields)


@pytest.mark.parametrize(
    "architecture, runs, fails",
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("9.0a", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.0+PTX", [(10, 0), (12, 0)], [(9, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
    ],
)
def test_what_code_runs_on(architecture, runs, fails):
    assert [c for c in runs + fails if runs_on(architecture, c)] == runs


@pytest.mark.parametrize(
    "given, words",
    [
        (facts(), None),
        (facts(driver=13010), None),
        (facts(runtime=13010), None),  # the driver of a major version runs all its runtimes
        (facts(driver=12080), "built with CUDA 13.0, and the driver is for CUDA 12.8"),
        (facts(driver=0), "built with CUDA 13.0"),
    ],
)
def test_a_driver_that_cannot_run_it_is_told(given, words):
    reason = why_not(given)
    assert reason is None if words is None else re.search(words, reason)


def test_ptx_needs_a_driver_of_its_version():
    newer = facts(runtime=13010)
    assert why_not_on([(10, 0)], newer) is None
    assert "only PTX in it, of CUDA 13.1" in why_not_on([(12, 0)], newer)
    assert why_not_on([(12, 0)], facts()) is None


@pytest.mark.parametrize(
    "devices, code, words",
    [
        ([(8, 9), (12, 0)], SHIPPED, None),
        ([], SHIPPED, None),
        ([(9, 0), (7, 5)], SHIPPED, r"GPU 1 \(compute capability 7.5\) is older than 8.0"),
        ([(10, 0)], ("8.0", "9.0a"), "has no code in it, only 8.0, 9.0a have"),
    ],
)
def test_a_gpu_that_cannot_run_it_is_told(devices, code, words):
    reason = why_not_on(devices, facts(code=code))
    assert reason is None if words is None else re.search(words, reason)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Makes a library with a text for its facts, or none, and gives the status of the backend."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "dispatch").mkdir()
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "dispatch" / "backends.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def status(text: str | None) -> str | None:
        code = "int unused;" if text is None else ""
        code = code or f'const char* fused_res_cuda_facts(void) {{ return "{text}"; }}'
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o",
                   str(tmp_path / "_C_cuda.abi3.so")]  # fmt: skip
        subprocess.run(command, input=code, text=True, check=True)
        return backends._cuda_status()

    return status


def test_the_status_of_a_library(library):
    assert library("runtime=13000 driver=13000 code=8.0;9.0a") is None


def test_the_status_of_a_library_that_cannot_run(library):
    reason = library("runtime=13000 driver=12040 code=8.0;9.0a")
    assert reason.startswith("_C_cuda.abi3.so cannot run here: it is built with CUDA 13.0")


@pytest.mark.parametrize("capability, runs", [((9, 0), True), ((7, 0), False)])
def test_gpus_are_looked_at_when_cuda_is_initialised(library, monkeypatch, capability, runs):
    monkeypatch.setitem(backends.STATUS, "cuda", library("runtime=13000 driver=13000 code=9.0a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    backends._look_at_devices()
    reason = backends.STATUS["cuda"]
    assert reason is None if runs else "GPU 0 (compute capability 7.0)" in reason


def test_the_status_of_an_older_library(library):
    assert "older fused_res: build it again" in library(None)


def test_the_facts_are_read_as_they_are_written():
    text = "runtime=13000 driver=0 code=8.0;10.0+PTX"
    assert cuda_library.parse(text) == Facts(13000, 0, ("8.0", "10.0+PTX"))


def test_an_import_does_not_initialise_cuda():
    """After that a fork of the process, as launchers of notebooks make them, could not use it."""
    code = """if True:
        import torch
        torch.version.cuda = "13.0"
        def refuse():
            raise SystemExit("CUDA was initialised")
        torch.cuda.is_available = torch.cuda.init = torch.cuda._lazy_init = refuse
        torch.cuda.device_count = lambda: 1
        import fused_res
        from fused_res.dispatch import backends
        assert "no CUDA device" not in str(backends.STATUS["cuda"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
