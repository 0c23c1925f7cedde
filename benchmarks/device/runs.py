"""The parts of ``make gpu-smoke`` and ``make gpu``, and those that run only when they are named.

``dry``: there is no GPU. The same parts run on what there is: tiny tensors on the CPU, Triton's
kernels in its interpreter, tests that skip themselves.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

from .prepared import ROOT
from .runner import SECONDS, Job, Part

INTERPRET = {"TRITON_INTERPRET": "1"}
SMOKE_SECONDS, FULL_SECONDS = 270.0, 420.0
# as in smoke.py, riskiest first
CASES = (
    "training-conv-relu", "training-conv-statistics", "training-conv-add", "inference-conv",
    "conv-halo", "res-chain-cluster", "res-chain-block", "bn-act-cooperative", "bn-act-triton",
    "graph", "stream",
)  # fmt: skip
CASE_LIMIT, CASES_AT_ONCE = 15.0, 3
TESTS = ("conv_bn_act", "conv_halo", "res_block", "res_chain", "train")
STEP = "ResNet-50 batch 256 train"
CORE = "eager,fused_res-cuda,fused_res-triton"
# suites and others that only run when they are named, with the limit of each
NAMED = {
    "blocks": 45, "nets": 500, "inference-all": 500, "chains": 20, "convs": 500, "partial": 500,
    "training-convs": 500, "autotune": 500, "curves": 500, "sanitizer": 50, "plots": 15,
}  # fmt: skip


class Runs:
    """rows: the folder that results are written to."""

    def __init__(self, rows: Path, dry: bool, arch: str | None = None) -> None:
        self.rows, self.dry, self.arch = rows, dry, arch

    # --- jobs

    def script(self, name: str, path: str, *words: str, **fields) -> Job:
        return Job(name, [sys.executable, str(ROOT / path), *words], **fields)

    def suite(self, suite: str, *words: str, name: str = "") -> Job:
        """Times a suite; ``words`` are a GPU's, for which without one there is ``--quick``."""
        given = ["--gpu", "--suite", suite, "--out", str(self.rows), "--seconds", SECONDS]
        given += ["--rounds", "7", *words] if not self.dry else ["--quick", "--threads", "1"]
        # other kernels of Triton's are tried by smoke.py
        environ = INTERPRET if self.dry and suite.endswith("convs") else None
        return self.script(name or suite, "benchmarks/run.py", *given, environ=environ)

    def cases(self, names: tuple[str, ...]) -> tuple[Job, ...]:
        if self.dry:  # one process: most of its time goes to imports
            return (self.script("all", "benchmarks/device/smoke.py", *names, environ=INTERPRET),)
        return tuple(
            self.script(name, "benchmarks/device/smoke.py", name, limit=CASE_LIMIT)
            for name in names
        )

    def tests(self) -> tuple[Job, ...]:
        run = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu"]
        paths = {name: f"tests/{name}/test_gpu.py" for name in TESTS}
        if self.dry:
            return (Job("all", [*run, *paths.values()]),)
        # Triton compiles on the CPU, for longer than the kernels run
        run += ["-n", "4"] if importlib.util.find_spec("xdist") else []
        return tuple(Job(name, [*run, path], 45.0) for name, path in paths.items())

    # --- runs

    def build(self) -> Part:
        environ = {"FUSED_RES_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": self.arch or ""}
        words = ["-q", "build_ext", "--inplace", "--build-temp", "build/gpu-libraries/temp"]
        return Part("build", 120.0, (self.script("build", "setup.py", *words, environ=environ),))

    def smoke(self) -> list[Part]:
        doctor = Job("doctor", [sys.executable, "-m", "fused_res", "doctor"])
        step = self.suite("nets", "--filter", STEP, "--candidates", CORE, "--no-compile")
        if self.dry:
            step.command.extend(["--filter", "small ResNet batch 8 train"])
        return [
            Part("doctor", 10.0, (doctor,)),
            Part("kernels", 55.0, self.cases(CASES), CASES_AT_ONCE),
            Part("peaks", 15.0, (self.suite("peaks"),)),
            Part("ops", 45.0, (self.suite("ops"),)),
            Part("resnet50-convs", 110.0, (self.suite("resnet50-convs"),)),
            Part("step", 35.0, (step,)),
        ]

    def full(self, failed: tuple[str, ...] = ()) -> list[Part]:
        """failed: cases of the first run, which are tried again."""
        again = [Part("again", 20.0, self.cases(failed), CASES_AT_ONCE)] if failed else []
        environ = INTERPRET if self.dry else None
        dispatch = self.script("dispatch", "benchmarks/device/dispatch.py", "--rows",
                               str(self.rows))  # fmt: skip
        counters = self.script("counters", "benchmarks/device/counters.py", environ=environ)
        return [
            *again,
            Part("tests", 90.0, self.tests(), 3),
            Part("dispatch", 20.0, (dispatch,)),
            Part("resnet50", 200.0, (self.suite("nets", "--filter", STEP),)),
            Part("inference", 50.0, (self.suite("inference", "--filter", "ResNet-50 batch"),)),
            Part("counters", 40.0, (counters,)),
        ]

    def named(self, name: str) -> Part:
        """A part of either run, or one that is in none.

        Raises:
            KeyError: there is no such part.
        """
        known = {part.name: part for part in [self.build(), *self.full(CASES), *self.smoke()]}
        if name in known:
            return known[name]
        limit = float(NAMED[name])
        if name == "sanitizer":
            return Part(name, limit, self._sanitizer())
        if name == "plots":
            # of the devices whose rows the parts before it wrote
            loop = 'for f in "$0"/*/; do case $f in */timings/) ;; *) "$1" "$2" --plots "$f";; esac'
            words = [str(self.rows), sys.executable, str(ROOT / "benchmarks/table.py")]
            return Part(name, limit, (Job(name, ["sh", "-ec", f"{loop}; done", *words]),))
        if name == "curves":
            words = ["--quick", "--threads", "1"] if self.dry else []
            job = self.script(name, "benchmarks/curves.py", "--out", str(self.rows), *words)
            return Part(name, limit, (job,))
        return Part(name, limit, (self.suite(name),))

    def _sanitizer(self) -> tuple[Job, ...]:
        cases = self.script("unchecked", "tests/tools/sanitizer_cases.py")
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.dry or not Path(found).exists():
            return (cases,)
        # PyTorch asks for features that a driver may refuse, and copes: kernels alone are checked
        options = ["--error-exitcode", "1", "--report-api-errors", "no"]
        return tuple(
            Job(tool, [found, "--tool", tool, *options, *cases.command])
            for tool in ("memcheck", "racecheck")
        )


def failed_cases(summary: Path) -> tuple[str, ...]:
    """The cases of a first run that did not pass; none where there is no summary of one."""
    try:
        jobs = json.loads(summary.read_text())["jobs"]
        failed = {job["job"] for job in jobs if job["status"] != "passed"}
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(case for case in CASES if case in failed)
