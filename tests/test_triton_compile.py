"""Every Triton configuration, compiled for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB a block may have
ELEMENTWISE = ("forward_apply", "backward_dx")


def python(code: str) -> str:
    """Runs code beside the report, in a process where Triton compiles instead of interpreting."""
    run = subprocess.run(
        [sys.executable, "-c", f"import json\nimport kernels_report as report\n{code}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def rows():
    code = (
        "if __name__ == '__main__':\n"
        "    print(json.dumps([(c.kernel, c.tile, c.dtype, c.layout, c.residual, target, *r)\n"
        "                      for c, target, r in report.report()]))"
    )
    return [dict(zip(("kernel", "tile", "dtype", "layout", "residual", "target", "registers",
                      "spills", "shared", "loads", "stores"), row, strict=True))
            for row in json.loads(python(code))]  # fmt: skip


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
        assert row["spills"] == 0 and row["registers"] <= limit, row
        assert row["shared"] <= 1024 * SHARED[row["target"]], row


def test_tensors_are_moved_16_bytes_at_a_time(rows):
    """Where runs are whole vectors: all but the mask's loads and stores are that wide."""
    for row in rows:
        if row["kernel"] in ELEMENTWISE and row["layout"] == "channels_last":
            for field, narrow in (("loads", 2), ("stores", 2)):
                wide, every = map(int, row[field].split("/"))
                assert wide > 0 and every - wide <= 2 * narrow, row


def test_a_planted_spill_is_seen():
    code = (
        "kernels = report.kernels\n"
        "kernels.CONFIGS['backward_sums'] = kernels.Config(16384, 4, 4)\n"
        "c = next(c for c in report.configurations() if c.kernel == 'backward_sums')\n"
        "print(report.compile_for(c, 'sm_90').spills)"
    )
    assert int(python(code)) > 0
