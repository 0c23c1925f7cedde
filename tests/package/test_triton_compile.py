"""Every Triton configuration, compiled for GPUs that need not be there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import sweep

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB a block may have
ELEMENTWISE = ("_bn_act_fwd_apply_kernel", "_bn_act_bwd_gradients_kernel")


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


@pytest.fixture(scope="module", params=sweep(SHARED, quick=["sm_90"]))
def rows(request):
    """Of one target."""
    code = (
        f"sections = [s._replace(targets=[{request.param!r}]) for s in report.SECTIONS[1:]\n"
        f"            if {request.param!r} in s.targets]\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps([dict(kernel=c.kernel, tile=c.tile, dtype=c.dtype, layout=c.layout,\n"
        "                           residual=c.residual, warps=c.warps, target=target,\n"
        "                           **{**r._asdict(), 'loops': [\n"
        "                               dict(stores=l.stores, **l.counts._asdict())\n"
        "                               for l in r.loops[1:]]})\n"
        "                      for c, target, r in report.report(sections)]))"
    )
    return json.loads(python(code))


def test_every_kernel_compiles_without_spills(rows):
    bn_act = {
        f"_bn_act_{way}_{what}_kernel"
        for way, whats in {
            "fwd": ("statistics", "moments", "merge", "apply", "small"),
            "bwd": ("sums", "merge", "gradients", "reapply", "small"),
        }.items()
        for what in whats
    }
    kind = "descriptor" if rows[0]["target"] in ("sm_90", "sm_100") else "pointer"
    ops = "conv_bn_act_fwd", "training_convolution_fwd_bwd"
    convs = {f"_{op}_{kind}_kernel" for op in ops}
    assert {row["kernel"] for row in rows} == bn_act | convs
    for row in rows:
        limit = 512 if row["target"] == "gfx942" else 255
        assert row["stack"] == row["spills"] == 0 and row["registers"] <= limit, row
        assert row["shared"] <= 1024 * SHARED[row["target"]], row


SUMS = {"fwd_statistics": 2, "fwd_small": 2, "bwd_sums": 2, "bwd_small": 2}  # of a BatchNorm


def test_sums_are_compensated_in_loops_that_have_no_float64(rows):
    """Seven additions for each batch and sum, and three instructions for each value at least: no
    compiler has made a plain sum of them."""
    if rows[0]["target"] == "gfx942":
        pytest.skip("loops are read of NVIDIA's code")
    checked = set()
    for row in rows:
        name = row["kernel"].removeprefix("_bn_act_").removesuffix("_kernel")
        loops = [loop for loop in row["loops"] if loop["bytes"] and not loop["stores"]]
        for loop in loops if name in SUMS else ():
            size, batch = row["tile"].split(" x")
            lanes = math.prod(map(int, size.split("x"))) // (32 * row["warps"])
            assert loop["fp64"] == loop["convert64"] == 0, row
            if row["target"] != "sm_100":  # where an instruction adds two pairs
                assert loop["fp32"] >= SUMS[name] * 7 * lanes + 3 * int(batch) * lanes, row
            checked.add(name)
    assert checked == set(SUMS)


def test_tensors_are_moved_16_bytes_at_a_time(rows):
    """Where runs are whole vectors: all but the mask's loads and stores are that wide."""
    for row in rows:
        if row["kernel"] in ELEMENTWISE and row["layout"] == "channels_last":
            for kind in ("loads", "stores"):
                wide = row[f"wide_{kind}"]
                assert wide > 0 and row[kind] - wide <= 4, row


def test_convolutions_run_on_tensor_cores(rows):
    """From shared memory that TMA fills where there is such a thing; float32 that is not to be
    rounded only where they take it."""
    for row in rows:
        if row["kernel"].endswith("_descriptor_kernel"):
            assert row["wgmma"] > 0 and row["tma"] > 0 and row["mma"] == 0, row
        elif row["kernel"].endswith("_pointer_kernel"):
            exact = row["dtype"] == "fp32" and row["tile"].endswith("2 stages")
            assert (row["mma"] > 0) != (exact and row["target"] == "sm_80"), row


def test_programs_fit_a_multiprocessor_as_configurations_say():
    """Of an H100: 65536 registers and 228 KB of shared memory, of which a program's first is the
    system's."""
    code = (
        "for config in report.conv_tiles.CONFIGS:\n"
        "    if config.kind == 'descriptor' and config.programs > 1:\n"
        "        c = report.record_conv(config, report.torch.bfloat16, 'tensor')\n"
        "        r = report.compile_for(c, 'sm_90')\n"
        "        registers = 32 * config.warps * ((r.registers + 7) // 8 * 8)\n"
        "        print(config.programs * registers <= 65536,\n"
        "              config.programs * (r.shared + 1024) <= 228 * 1024)"
    )
    assert set(python(code).split()) == {"True"}


def test_calls_with_parts_left_out_compile():
    code = (
        "from triton_bare import record_bare\n"
        "found = record_bare()\n"
        "assert len({c.kernel for c in found}) >= 6\n"
        "print(len([report.compile_for(c, 'sm_90') for c in found]))"
    )
    assert int(python(code)) >= 8


def test_a_planted_spill_is_seen():
    code = (
        "from fused_res.kernels import bn_act as kernels\n"
        "kernels.CONFIGS['bwd_sums'] = kernels.Config(16384, 4, 4)\n"
        "name = '_bn_act_bwd_sums_kernel'\n"
        "c = next(c for c in report.configurations() if c.kernel == name)\n"
        "print(report.compile_for(c, 'sm_90').spills)"
    )
    assert int(python(code)) > 0
