"""Every Triton configuration, compiled for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB a block may have
# Bytes of stack. Of what Triton 3.6 makes of three kernels, ptxas (12.8 as 12.9) spills two to four
# registers to fit one more block on a multiprocessor; none of what 3.9 makes of them.
STACK = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 16
ELEMENTWISE = ("forward_apply", "backward_dx")


def python(code: str) -> str:
    """Runs code beside the report, in a process where Triton compiles instead of interpreting."""
    run = subprocess.run(
        [sys.executable, "-c", f"import json\nimport kernels_report as report\n{code}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def rows():
    code = (
        "if __name__ == '__main__':\n"
        "    print(json.dumps([dict(kernel=c.kernel, tile=c.tile, dtype=c.dtype, layout=c.layout,\n"
        "                           residual=c.residual, target=target, **r._asdict())\n"
        "                      for c, target, r in report.report()]))"
    )
    return json.loads(python(code))


def test_every_kernel_compiles_for_every_target_without_spills(rows):
    assert {row["target"] for row in rows} == set(SHARED)
    assert {row["kernel"] for row in rows} == {
        f"{way}_{what}"
        for way, whats in {
            "forward": ("stats", "finish", "apply", "small"),
            "backward": ("sums", "finish", "dx", "small"),
        }.items()
        for what in whats
    }
    for row in rows:
        limit = 512 if row["target"] == "gfx942" else 255
        assert row["stack"] <= STACK and row["registers"] <= limit, row
        assert row["spills"] == 0 or row["stack"] > 0, row
        assert row["shared"] <= 1024 * SHARED[row["target"]], row


def test_tensors_are_moved_16_bytes_at_a_time(rows):
    """Where runs are whole vectors: all but the mask's loads and stores are that wide."""
    for row in rows:
        if row["kernel"] in ELEMENTWISE and row["layout"] == "channels_last":
            for kind in ("loads", "stores"):
                wide = row[f"wide_{kind}"]
                assert wide > 0 and row[kind] - wide <= 4, row


def test_a_planted_spill_is_seen():
    code = (
        "kernels = report.kernels\n"
        "kernels.CONFIGS['backward_sums'] = kernels.Config(16384, 4, 4)\n"
        "c = next(c for c in report.configurations() if c.kernel == 'backward_sums')\n"
        "print(report.compile_for(c, 'sm_90').spills)"
    )
    assert int(python(code)) > 0
