"""The benchmark runner and its tables, on tiny tensors. No timing is asserted anywhere."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from fused_res import reference

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def run():
    return importlib.import_module("run")


@pytest.fixture(scope="module")
def table():
    return importlib.import_module("table")


@pytest.fixture(scope="module")
def workloads():
    return importlib.import_module("workloads")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One whole quick run, both suites and both allocators."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--rounds", "2"]
    command += ["--device", "cpu", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def read(results):
    return {p.stem: json.loads(p.read_text()) for p in results.glob("*/*.json")}


def test_rows_are_valid(results, run, workloads):
    suites = read(results)
    assert set(suites) == {"ops", "blocks"}
    assert not list(results.glob("*/*.part"))
    for rows in suites.values():
        for row in rows:
            run.validate(row)
            assert row["refused"] is None
            assert row["device"]["threads"] == 1
            if row["rival"] == "eager":
                assert row["error_over_eager"] <= 1
            if row["direction"] != "saved":
                assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
                assert row["bytes"] > 0 and row["percent_of_copy"] > 0
        assert {r["allocator"] for r in rows} == {"default", "raised"}
        assert {r["rival"] for r in rows} == {
            "eager",
            *(f"fused_res-{b}" for b in workloads.fused_backends("cpu")),
        }


def test_validate_refuses(results, run):
    row = read(results)["ops"][0]
    for change in {"rounds": "3"}, {"refused": "why"}, {"median_ms": None}, {"extra": 1}:
        with pytest.raises(ValueError):
            run.validate({**row, **change})


def scaled(x, norm, residual):
    return reference.bn_act(x, norm, residual) * (1 + 1e-5)


def stale(x, norm, residual):
    kept = norm._replace(running_mean=norm.running_mean.clone())
    return reference.bn_act(x, kept, residual)


def broken(x, norm, residual):
    raise RuntimeError("no kernel\nfor this")


def not_a_number(x, norm, residual):
    return reference.bn_act(x, norm, residual) * float("nan")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (scaled, "wrong result: error of "),
        (stale, "wrong result: error of running_mean"),
        (not_a_number, "wrong result: error of "),
        (broken, "RuntimeError: no kernel"),
    ],
)
def test_wrong_rival_is_not_timed(run, workloads, call, reason):
    workload = workloads.QUICK_SUITES["ops"][0]
    candidates = [
        workloads.Rival("eager", "NCHW", 1.0, partial(workloads.op_program, reference.bn_act)),
        workloads.Rival("fused_res-x", "NCHW", 1.5, partial(workloads.op_program, call)),
    ]
    rows = run.measure(workload, candidates, rounds=2, least_ms=0.1)
    assert len(rows) == 4
    for row in rows:
        if row["rival"] == "eager":
            assert row["median_ms"] > 0 and row["refused"] is None
        else:
            assert row["median_ms"] is None and reason in row["refused"]
            assert not row["speedup_over"]
            json.dumps(row, allow_nan=False)


def test_filter_without_a_match(run, capsys):
    assert run.main(["--quick", "--filter", "no such workload"]) == 2
    assert "no such workload" in capsys.readouterr().err


def test_ideal_bytes(workloads):
    n = 2 * 8 * 4 * 4
    op = workloads.Workload("ops", "", (2, 8, 4, 4), "NCHW")
    assert workloads.ideal_bytes(op)["forward"] == 16 * n + n // 8
    assert workloads.ideal_bytes(op)["forward+backward"] == 40 * n + 3 * n // 8


def test_saved_bytes_of_plain_pytorch(workloads):
    workload = workloads.QUICK_SUITES["blocks"][1]
    v = workloads.values(workload)
    n = v["x"].nbytes
    saved = workloads.block_program(reference.ResBlock, workload, v).saved_bytes()
    # x, the convolution's output, the ReLU's output, and a few numbers per channel
    assert 3 * n <= saved <= 3 * n + 4096


def test_table_round_trip(results, table, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    common = ["--results", str(results)]
    assert table.main([*common, "--check", str(page)]) == 1
    assert table.main([*common, "--write", str(page)]) == 0
    assert table.main([*common, "--check", str(page)]) == 0
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    row = read(results)["ops"][0]
    assert row["device"]["name"] in written and row["commit"] in written
    assert row["versions"]["torch"] in written and row["date"][:10] in written
    page.write_text("no markers")
    assert table.main([*common, "--check", str(page)]) == 2
    capsys.readouterr()
    assert table.main(common) == 0
    assert capsys.readouterr().out.strip() in written


def synthetic(step, saved):
    """Rows as the blocks suite has them, every step ``step`` times as fast as every baseline."""
    names = [f"basic 64ch {i}" for i in range(3)] + ["bottleneck 256-64ch"]
    names += ["single 32ch 16x16", "single 32ch 8x8"]
    common = {"rival": "fused_res-cpu", "layout": "channels_last", "allocator": "default"}
    over = {"eager NCHW": 9.0, "eager channels_last": step, "compile channels_last": 2.0}
    rows = [
        {**common, "workload": n, "direction": "forward+backward", "speedup_over": over}
        for n in names
    ]
    ratio = {"eager channels_last": saved, "eager NCHW": saved}
    rows.append(
        {**common, "workload": names[3], "direction": "saved", "speedup_over": ratio, "bytes": 1}
    )
    return {"blocks": rows}


def test_targets(table):
    assert [met for met, _ in table.targets(synthetic(1.2, 1.25))] == [True, True, True]
    assert [met for met, _ in table.targets(synthetic(1.0, 1.1))] == [True, False, False]
    assert [met for met, _ in table.targets(synthetic(0.9, 1.25))] == [False, False, True]


def test_targets_need_every_workload(results, table):
    for suites in table.load(results).values():
        assert not all(met for met, _ in table.targets(suites))
