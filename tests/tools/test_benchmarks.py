"""The benchmark runner and its tables, on tiny tensors. No timing is asserted anywhere."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from net_sequences import sequence
from sweeps import sweep

from fused_res import fuse_, reference
from fused_res.dispatch import (
    backends,
    inference_conv,
    shipped_timings,
    training_conv,
    user_timings,
)
from fused_res.dispatch.shipped_timings import Row
from fused_res.ops import conv_bn_act

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(BENCHMARKS))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors
    yield
    torch.set_num_threads(before)
    sys.path.remove(str(BENCHMARKS))


def module_fixture(name, short=None):
    fixture = pytest.fixture(scope="module", name=short or name.rpartition(".")[2])
    return fixture(lambda: importlib.import_module(name))


run = module_fixture("run")
table = module_fixture("table")
suites = module_fixture("suites")
rows = module_fixture("harness.rows")
suite = module_fixture("harness.suite")
measuring = module_fixture("harness.measure", "measuring")
ops = module_fixture("suites.ops")
blocks = module_fixture("suites.blocks")
nets = module_fixture("suites.nets")
convs = module_fixture("suites.convs")
inference = module_fixture("suites.inference")


def run_quickly(out, *options):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--rounds", "2"]
    command += ["--device", "cpu", "--threads", "1", "--out", str(out), *options]
    environ = {**os.environ, "FUSED_RES_CACHE": f"{out}-cache"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One whole quick run, all suites and both allocators."""
    return run_quickly(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def gpu_results(run, tmp_path_factory):
    """The suites of a GPU on a CPU; torch.compile in the smallest of them."""
    out = run_quickly(tmp_path_factory.mktemp("gpu"), "--gpu")
    for suite in ("convs", "partial"):
        run.main(["--gpu", "--quick", "--suite", suite, "--rounds", "2", "--out", str(out)])
    return run_quickly(out, "--gpu", "--suite", "autotune", "--compile")


def read(results):
    return {p.stem: json.loads(p.read_text()) for p in results.glob("*/*.json")}


RUNTIMES = {"onnxruntime", "openvino"}


def test_rows_are_valid(results, rows, suite):
    suites = read(results)
    assert set(suites) == {"ops", "blocks", "partial", "inference", "chains"}
    assert not list(results.glob("*/*.part"))
    for found in suites.values():
        for row in found:
            rows.validate(row)
            if row["rival"] in RUNTIMES and not importlib.util.find_spec(row["rival"]):
                assert f"No module named '{row['rival']}'" in row["refused"]
                continue
            if row["suite"] in ("inference", "chains"):
                check_inference(row)
            else:
                assert set(row) == set(rows.ROW_TYPES)
            assert row["refused"] is None
            assert row["device"]["threads"] == 1
            if row["rival"] == "eager":
                assert row["error_over_eager"] <= 1
            if row["direction"] != "saved":
                assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
                if row["suite"] != "partial":
                    assert row["bytes"] > 0 and row["percent_of_copy"] > 0
        assert {r["allocator"] for r in found} == {"default", "raised"}
        ours = {f"fused_res-{b}" for b in suite.fused_backends("cpu")}
        if found[0]["suite"] == "partial":
            ours = {"fused_res-auto"}
        if found[0]["suite"] == "inference":
            ours = {"fused_res-optimized", *RUNTIMES}
        if found[0]["suite"] == "chains":
            ours = {"fused_res-cpu", "fused_res-optimized", "fused_res-frozen", *RUNTIMES}
        assert {r["rival"] for r in found} == {"eager", *ours}


def check_inference(row):
    seconds = row["median_ms"] / 1e3
    assert row["images_per_s"] == pytest.approx(row["shape"][0] / seconds)
    assert row["gbps"] == pytest.approx(row["bytes"] / seconds / 1e9)
    arithmetic = row["tflops"] / row["peak_tflops"]
    # kernel by kernel the slower of the two counts: no less than either of all, no more than both
    low, high = max(arithmetic, row["gbps"] / row["copy_gbps"]), arithmetic
    high += row["gbps"] / row["copy_gbps"]
    assert 0 < 100 * low <= row["percent_of_roofline"] * 1.001 <= 100 * high * 1.002


def test_committed_rows_are_of_todays_workloads(rows, suites):
    paths = {p for p in (BENCHMARKS / "results").glob("cpu-*/*.json") if p.stem != "curves"}
    assert paths
    for path in paths:
        known = {w.name: w for w in suites.workloads(path.stem)}
        found = json.loads(path.read_text())
        assert {row["workload"] for row in found} == set(known)
        for row in found:
            rows.validate(row)
            workload = known[row["workload"]]
            assert row["shape"] == list(workload.shape)
            if row["median_ms"] is not None:
                assert row["bytes"] == workload.moved_bytes(row["direction"])
                assert (row["bytes"] is None) == (workload.suite == "partial")


def test_suites_of_a_gpu(gpu_results, rows, suite):
    """Every candidate of every suite is right and timed; its rows are under the suite's name."""
    suites = read(gpu_results)
    assert set(suites) == {"peaks", "ops", "blocks", "nets", "autotune", "inference", "chains",
                           "convs", "partial"}  # fmt: skip
    ours = {f"fused_res-{b}" for b in suite.fused_backends("cpu")}
    ours |= {f"{name}-graphed" for name in ours}
    plain = {"eager", "eager-graphed", *ours}
    evaluated = {*plain, "cudnn-fused", "cudnn-fused-graphed"}
    for name, found in suites.items():
        for row in found:
            rows.validate(row)
            assert row["refused"] is None, row
            if name in ("inference", "chains", "convs"):
                check_inference(row)
        seen = {d: {r["rival"] for r in found if r["direction"] == d} for d in ("eval", "train")}
        if name in ("blocks", "nets"):
            assert seen["eval"] == evaluated
        if name == "partial":
            assert seen["eval"] == plain
        if name == "inference":
            optimized = {"fused_res-optimized", "fused_res-optimized-graphed"}
            assert evaluated - ours | optimized <= seen["eval"]
        if name == "nets":
            assert seen["train"] == plain
            assert all(r["images_per_s"] > 0 and r["peak_mib"] is None for r in found)
            assert {r["layout"] for r in found} == {"NCHW", "channels_last"}
    assert {r["dtype"] for r in suites["ops"]} == {"bfloat16", "float16", "float32"}
    assert "compile-max-autotune" in {r["rival"] for r in suites["autotune"]}
    copy, *matmuls = suites["peaks"]
    assert copy["gbps"] > 0 and len(matmuls) == 4 and all(r["tflops"] > 0 for r in matmuls)


def test_roofline_of_blocks(measuring, suite, inference):
    """x 8 channels of 4x4 and 4 images, in bf16."""
    x, pixels = 2 * 4 * 8 * 16, 4 * 16
    first, last = inference.one_block("basic", (4, 8, 4, 4), dtype="bf16").kernels()
    weights = 2 * 8 * 8 * 9
    assert first == suite.Kernel(pixels * 8 * weights // 8, x + weights + x)
    assert last == suite.Kernel(first.flops, first.bytes + x)  # the last reads the residual
    # 8 channels to 16 at a quarter of the pixels: the projection is in the last kernel
    strided = inference.one_block("basic", (4, 8, 4, 4), None, 16, 2, dtype="bf16")
    kernels = strided.kernels()
    weights, y = 2 * 16 * (16 * 9 + 8), x // 2
    assert kernels[1] == suite.Kernel(pixels // 4 * weights, y + x // 4 + weights + y)
    # the slower of arithmetic and bytes, for each
    arithmetic, copies = (measuring.bound_ms(kernels, *rates) for rates in ((1, 1e9), (1e9, 1)))
    assert arithmetic == pytest.approx(measuring.flops(kernels) / 1e9)
    assert copies == pytest.approx(strided.moved_bytes("eval") / 1e6)


def test_roofline_of_a_chain(suite, inference):
    """x of 2 images, 16 channels and 8x8, in float32: read once, as the weights are."""
    weights, x = 3 * 16 * 16 * 9, 2 * 16 * 64
    (one,) = inference.chain(3, 16, 8, 2).kernels()
    assert one == suite.Kernel(2 * weights * 2 * 64, 4 * (weights + 2 * x))


def test_roofline_of_nets(measuring, inference, convs):
    """ResNet-50: 4.1 billion multiplications an image, He et al., 2016, with strides in the 3x3."""
    count = measuring.flops(inference.net("ResNet-50", 2).kernels())
    assert count / 4 == pytest.approx(4.09e9, rel=1e-3)
    for depth, bottleneck in (18, False), (50, True):
        own, theirs = (inference.net(f"{name}ResNet-{depth}", 2) for name in ("", "torchvision "))
        assert own.kernels() == theirs.kernels()
        # the calls that are tuned are the net's
        tuned = {w.kernels()[0] for w in convs.convs_of(bottleneck, 2, "bf16")}
        half = inference.net(f"ResNet-{depth}", 2, dtype="bf16").kernels()
        assert tuned == {kernel for kernel in half[:-1] if kernel.flops}


@pytest.mark.parametrize("runtime", sorted(RUNTIMES))
def test_runtimes(measuring, suite, suites, runtime, monkeypatch):
    """One that is not installed has a row that says so; one that is computes the same."""
    workload = suites.workloads("inference", quick=True)[1]
    every = workload.candidates("cpu", suite.Options(compile=False))
    candidates = [c for c in every if c.name in ("eager", runtime)]
    options = {"rounds": 1, "least_ms": 0.1}
    if importlib.util.find_spec(runtime):
        found = measuring.measure(workload, candidates, **options)
        assert {row["refused"] for row in found} == {None}
    monkeypatch.setitem(sys.modules, runtime, None)
    found = measuring.measure(workload, candidates, **options)
    assert {row["rival"]: row["refused"] for row in found if row["median_ms"] is None} == {
        runtime: f"ModuleNotFoundError: import of {runtime} halted; None in sys.modules"
    }


def test_frozen_weights_are_frozen(inference, suite):
    """The candidate is what it is called: only a frozen graph keeps weights that have changed."""
    modes = inference.one_block("basic", (2, 8, 5, 5)).compile_modes(suite.Options())
    x = torch.randn(2, 8, 5, 5)
    for name, options in modes.items():
        net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8)).eval()
        with torch.no_grad():
            call = inference.compiled(net, x, **options)
            before = call(x).clone()
            torch.testing.assert_close(before, net(x))
            net[0].weight.mul_(2)
            assert torch.equal(call(x), before) == (name == "compile-freezing")
    assert set(modes) == {"compile", "compile-freezing"}


@pytest.mark.parametrize(("factor", "right"), [(1 + 2e-6, True), (1 + 1e-4, False)])
def test_what_inference_may_be_off_by(measuring, suite, inference, suites, factor, right):
    """In float32 ours may have Winograd's error, which is more than 1.5 times PyTorch's."""
    workload = suites.workloads("inference", quick=True)[1]
    every = workload.candidates("cpu", suite.Options(compile=False))
    eager, *_, ours = [c for c in every if c.name[:2] in ("ea", "fu")]

    def prepare(module, x):
        return lambda x: module(x) * factor

    build = partial(inference.program, prepare, workload)
    found = measuring.measure(
        workload, [eager, dataclasses.replace(ours, build=build)], rounds=1, least_ms=0.1
    )
    assert found[1]["error_over_eager"] > 1.5
    assert (found[1]["refused"] is None) == right


def test_a_turn_begins_with_a_call_that_is_not_timed(measuring):
    calls = []
    counts = []
    for settle in (False, True):
        calls.clear()
        measuring.rotate({"a": lambda: calls.append(1)}, 3, "cpu", least_ms=1e-6, settle=settle)
        counts.append(len(calls))
    assert counts[1] == counts[0] + 3


def test_a_gpus_clock_measures_between_calls(measuring, monkeypatch):
    """Far from its origin too, with a stand-in for the events."""
    now = iter([1e9, 1e9 + 2, 1e9 + 5])

    class Event:
        def __init__(self, enable_timing):
            self.at = next(now)

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = measuring.DeviceClock()
    assert [clock(), clock()] == pytest.approx([0.002, 0.005])


@pytest.mark.parametrize("quick", [False, True])
def test_gpu_workloads_are_told_apart(suites, quick):
    for name in suites.SUITES:
        keys = [(w.name, w.directions) for w in suites.workloads(name, True, quick)]
        assert len(set(keys)) == len(keys)


def test_validate_refuses(results, rows):
    row = read(results)["ops"][0]
    changes = [{"rounds": "3"}, {"refused": "why"}, {"median_ms": None}, {"extra": 1}]
    for change in [*changes, {"peak_mib": "1"}]:
        with pytest.raises(ValueError):
            rows.validate({**row, **change})


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
def test_wrong_candidate_is_not_timed(measuring, suite, suites, call, reason):
    workload = suites.workloads("ops", quick=True)[0]
    assert_refused(measuring, workload, *op_candidates(suite, workload, call), reason)


def op_candidates(suite, workload, call):
    return (
        suite.Candidate("eager", "NCHW", 1.0, partial(workload.program, reference.bn_act)),
        suite.Candidate("fused_res-x", "NCHW", 1.5, partial(workload.program, call)),
    )


def assert_refused(measuring, workload, right, wrong, reason):
    found = measuring.measure(workload, [right, wrong], rounds=2, least_ms=0.1)
    assert len(found) == 2 * len(workload.directions)
    for row in found:
        if row["rival"] == right.name:
            assert row["median_ms"] > 0 and row["refused"] is None
        else:
            assert row["median_ms"] is None and reason in row["refused"]
            assert not row["speedup_over"]
            json.dumps(row, allow_nan=False)


def off_by_two_percent(x, norm, residual):
    return reference.bn_act(x, norm, residual) * 1.02


@pytest.mark.parametrize("call", [off_by_two_percent, stale, not_a_number])
def test_wrong_candidate_in_16_bits(measuring, suite, suites, call):
    workload = suites.workloads("ops", gpu=True, quick=True)[0]
    assert workload.dtype == torch.bfloat16
    wrong = "wrong result: error of "
    assert_refused(measuring, workload, *op_candidates(suite, workload, call), wrong)


def other_eps(net):
    net.resblocks[0].bn1.eps = 1.0
    return net


def other_gradients(net):
    for p in net.parameters():
        p.register_hook(torch.neg)
    return net


def no_net(net):
    raise RuntimeError("no kernel for this")


@pytest.mark.parametrize(
    ("swap", "reason"),
    [
        (other_eps, "wrong result: error of y"),
        (other_gradients, "wrong result: error of gradients"),
        (no_net, "RuntimeError: no kernel for this"),
    ],
)
def test_wrong_net_is_not_timed(measuring, suite, nets, suites, swap, reason):
    workload = suites.workloads("nets", gpu=True, quick=True)[0]
    build = partial(nets.NetProgram, workload)
    right = suite.Candidate("eager", "channels_last", 1.0, build)
    wrong = suite.Candidate("fused_res-x", "channels_last", 1.5, partial(build, swap=swap))
    assert_refused(measuring, workload, right, wrong, reason)


@pytest.mark.parametrize("torchvisions", sweep([False, True], quick=[False]))
def test_nets_run_the_backend_that_is_named(nets, torchvisions):
    for name, net in nets.NETS.items():
        if name.startswith("torchvision") != torchvisions:
            continue
        blocks = [m for m in nets.fused(net.make(), "eager").modules() if hasattr(m, "plan")]
        assert blocks and all(block.backend == "eager" for block in blocks)
        if torchvisions:
            continue  # for a CPU, where nothing takes a net apart
        norms = [m for m in sequence(net.make()) if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) <= 1  # the stem's; all others are in blocks


@pytest.mark.parametrize("name", ["small ResNet", "narrow ResNet-18", "3 blocks"])
def test_folded_net_is_the_net(nets, name):
    v = nets.net(name, 4, "eval").values()
    net = nets.NETS[name].make()
    net.load_state_dict(v.state)
    expected = net.eval()(v.x)
    with torch.no_grad():
        torch.testing.assert_close(nets.folded(net, torch.float32)(v.x), expected)


class Countdown:
    """A deadline that is over when it has been asked ``asked`` times."""

    def __init__(self, asked):
        self.asked = asked

    def left(self):
        self.asked -= 1
        return 100.0 if self.asked >= 0 else -1.0


@pytest.mark.parametrize("name", ["ops", "nets"])
def test_deadline(measuring, suite, rows, suites, name):
    """What cannot be built in time is listed; what was timed before it has its rows."""
    workload = suites.workloads(name, gpu=True, quick=True)[0]
    every = workload.candidates("cpu", suite.Options(gpu=True, compile=False))
    candidates = [c for c in every if c.why_not is None]
    progress = []
    options = {"rounds": 1, "least_ms": 0.1, "progress": progress.append}
    found = measuring.measure(workload, candidates, deadline=Countdown(4), **options)
    timed = {row["rival"] for row in found if row["median_ms"] is not None}
    late = {row["rival"] for row in found if row["refused"] == rows.OUT_OF_TIME}
    assert timed and late and timed | late == {r.name for r in candidates}
    assert progress[-1] == found
    # the share of a workload holds back all but the core
    found = measuring.measure(workload, candidates, share=Countdown(0), **options)
    timed = {row["rival"] for row in found if row["median_ms"] is not None}
    assert timed == {r.name for r in candidates if r.core} and "eager" in timed


def test_no_time_at_all(run, rows, tmp_path, capsys):
    command = ["--gpu", "--quick", "--suite", "nets", "--seconds", "0", "--out", str(tmp_path)]
    assert run.main(command) == 0
    found = read(tmp_path)["nets"]
    assert {row["refused"] for row in found} == {rows.OUT_OF_TIME}
    assert {row["workload"] for row in found} == {w.name for _, w in run.selected(
        run.parse(command))}  # fmt: skip
    assert "not timed: out of time" in capsys.readouterr().out


def test_a_graph_is_captured_and_replayed(monkeypatch):
    """With stand-ins for what a machine without a GPU has not."""
    graphs = importlib.import_module("harness.program")
    calls, replays = [], []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            replays.append(1)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    x = torch.ones(3, requires_grad=True)

    def call():
        calls.append(1)
        return 2 * x

    program = graphs.Program({"forward": call}, ())
    program.capture("cuda")
    captured = len(calls)
    (y,), (z,) = program.run(), program.run()
    assert y is z and not y.requires_grad and torch.equal(y, 2 * x)
    assert len(calls) == captured and len(replays) == 2
    on_cpu = graphs.Program({"forward": call}, ())
    on_cpu.capture("cpu")
    assert len(calls) == captured and on_cpu.run()[0].requires_grad and len(calls) == captured + 1


def test_filter_without_a_match(run, capsys):
    assert run.main(["--quick", "--filter", "no such workload"]) == 2
    assert "no such workload" in capsys.readouterr().err


def test_ideal_bytes(ops):
    n = 2 * 8 * 4 * 4
    half = ops.op((2, 8, 4, 4), "NCHW", "bf16")
    assert half.moved_bytes("forward") == 8 * n + n // 8
    op = ops.op((2, 8, 4, 4), "NCHW")
    assert op.moved_bytes("forward") == 16 * n + n // 8
    assert op.moved_bytes("forward+backward") == 40 * n + 3 * n // 8


def test_ideal_bytes_of_a_projection(blocks):
    """x 8 channels of 4x4, y 16 of 2x2, in bf16."""
    block = blocks.block("single", (2, 8, 4, 4), out=16, stride=2, dtype=torch.bfloat16)
    x, y, weights = 2 * 2 * 8 * 16, 2 * 2 * 16 * 4, 2 * 8 * 16 * 10
    # convolutions: x -> a; a quarter of x -> r. bn_act: a, r -> y
    assert block.moved_bytes("eval") == x + y + x // 4 + y + weights + 3 * y


def test_saved_bytes_of_plain_pytorch(suites):
    workload = suites.workloads("blocks", quick=True)[1]
    v = workload.values()
    n = v["x"].nbytes
    saved = workload.eager("NCHW")(v).saved_bytes()
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
    for found in read(results).values():
        assert f"| {found[0]['workload'].removeprefix('bn_act ')} |" in written
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
    """Every block, of 32 channels, basic of 64, bottleneck; saved bytes."""
    for step, saved, expected in (
        (1.7, 1.25, [True] * 5),
        (1.4, 1.25, [True, False, True, True, True]),
        (1.2, 1.1, [True, False, True, False, False]),
        (0.9, 1.25, [False, False, False, False, True]),
    ):
        assert [met for met, _ in table.targets(synthetic(step, saved))] == expected


def inferred(eager, frozen, runtime):
    """Rows as the inference suite has them, as fast over each baseline as is said."""
    names = [f"torchvision ResNet-{d} batch {n}" for d in (18, 50) for n in (1, 16)]
    names += [f"basic 64ch 56x56 batch {n}" for n in range(6)]
    over = {"eager NCHW": 9.0, "eager channels_last": eager, "onnxruntime NCHW": runtime}
    over |= {"compile channels_last": 9.0, "compile-freezing channels_last": frozen}
    common = {"rival": "fused_res-optimized", "layout": "channels_last", "allocator": "default"}
    row = {**common, "direction": "eval", "speedup_over": over}
    return {"inference": [{**row, "workload": name} for name in names]}


def test_targets_of_blocks_fused_in_part(table, suites):
    """Every block, in training and in eval mode, over eager."""
    common = {"rival": "fused_res-auto", "layout": "channels_last", "allocator": "default"}
    for step, evaluated in ((1.1, 1.0), (0.9, 1.0), (1.1, 0.9)):
        rows = [
            {
                **common,
                "workload": w.name,
                "direction": w.directions[-1],
                "speedup_over": {
                    "eager NCHW": 9.0,
                    "compile channels_last": 0.5,
                    "eager channels_last": step if w.training else evaluated,
                },
            }
            for w in suites.workloads("partial")
        ]
        met = [met for met, _ in table.targets({"partial": rows})]
        assert met == [step >= 1, evaluated >= 1]
        assert not any(met for met, _ in table.targets({"partial": rows[2:]}))


@pytest.mark.parametrize("quick", [False, True])
def test_blocks_are_fused_in_part(suites, quick):
    for workload in suites.workloads("partial", quick=quick):
        block = workload.block()
        report = fuse_(block)
        ((_, reason),) = report.partly
        assert reason.startswith(f"{block.depth} of {block.depth} norms; "), workload.name


def test_targets_of_inference(table):
    """Batch 1 over eager, over frozen; batch 16 likewise; blocks over the best."""
    for speeds, expected in (
        ((1.4, 1.2), [True] * 5),
        ((1.32, 1.07), [False, False, True, True, True]),
        ((1.4, 0.9), [True, False, True, False, False]),
        ((0.9, 1.4), [False, True, False, True, False]),
    ):
        assert [met for met, _ in table.targets(inferred(*speeds, 1.0))] == expected
    assert not table.goals(synthetic(1.0, 1.0))
    assert [met for met, _ in table.goals(inferred(1.0, 1.0, 1.0))] == [True] * 10
    assert [met for met, _ in table.goals(inferred(2.0, 2.0, 0.9))] == [False] * 10


def test_targets_of_chains(table, suites):
    """Each batch and size over eager; all chains over the other runtimes."""
    common = {"rival": "fused_res-frozen", "layout": "channels_last", "allocator": "default"}
    row = {**common, "direction": "eval"}
    names = [w.name for w in suites.workloads("chains")]
    for eager, rest, expected in (
        (10.0, 1.5, [True] * 5),
        (7.0, 1.4, [True, False, True, True, False]),
        (2.9, 1.6, [False, False, True, False, True]),
    ):
        over = {"eager channels_last": eager, "compile-freezing channels_last": 9.0}
        over |= {"onnxruntime NCHW": rest, "openvino NCHW": 9.0}
        rows = [{**row, "workload": name, "speedup_over": over} for name in names]
        assert [met for met, _ in table.targets({"chains": rows})] == expected
    # neither a workload nor a candidate may be missing
    assert not any(met for met, _ in table.targets({"chains": [{**row, "workload": ""}]}))
    over.pop("openvino NCHW")
    assert not table.targets({"chains": rows})[-1][0]


def test_targets_need_every_workload(results, table):
    for suites in table.load(results).values():
        assert not all(met for met, _ in table.targets(suites))


@pytest.fixture(scope="module")
def fabricated(gpu_results, tmp_path_factory):
    """The rows of the dry run as if a GPU had them, and a plot's folder."""
    folder = tmp_path_factory.mktemp("fabricated") / "nvidia-x"
    folder.mkdir()
    device = {"slug": "nvidia-x", "name": "NVIDIA X", "cores": 132, "threads": 1, "isa": "sm_90"}
    for name, found in read(gpu_results).items():
        changed = [{**row, "device": device, "allocator": "cuda"} for row in found]
        for row in changed:
            if "peak_mib" in row:
                row["peak_mib"] = 1234.0
        (folder / f"{name}.json").write_text(json.dumps(changed))
    return folder


def test_tables_of_a_gpu(fabricated, table, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"{table.BEGIN}\n{table.END}")
    common = ["--results", str(fabricated.parent)]
    assert table.main([*common, "--write", str(page)]) == 0
    assert table.main([*common, "--check", str(page)]) == 0
    text = page.read_text()
    for shown in ("NVIDIA X (sm_90, 132 multiprocessors), bfloat16", "images/s", "1234 → 1234",
                  "% of copy", "TFLOP/s", "saved for backward", "max-autotune", "% of roofline",
                  "16-24ch 9x9 stride 2 batch 2 fp16",
                  "loses to the fastest other in"):  # fmt: skip
        assert shown in text, shown
    assert table.main([*common, "--targets"]) == 1  # they are a CPU's


def test_what_auto_follows(fabricated, table, tmp_path, monkeypatch):
    """Each implementation's fastest time, of Triton's configurations too, decides for its call."""
    eager = json.loads((fabricated / "convs.json").read_text())[0]
    fast, slow = (dict(kind="pointer", M=m, BN=32) for m in (64, 128))
    rows = [eager | {"median_ms": 2.0}]
    rows += [
        eager | {"rival": f"fused_res-{name}", "median_ms": ms, "config": config, "refused": why}
        for name, ms, config, why in (
            ("cudnn", 1.5, None, None),
            ("triton-pointer-128-32", 0.9, slow, None),
            ("triton-pointer-64-32", 0.5, fast, None),
            ("triton-pointer-32-32", None, slow, "wrong result"),
        )
    ]
    (tmp_path / "nvidia-x").mkdir()
    (tmp_path / "nvidia-x" / "convs.json").write_text(json.dumps(rows))
    path = tmp_path / "measured.json"
    assert table.main(["--results", str(tmp_path), "--dispatch", str(path)]) == 0
    (found,) = [shipped_timings.Row(**row) for row in json.loads(path.read_text())]
    assert found.ms == {"eager": 2.0, "cudnn": 1.5, "triton": 0.5}
    monkeypatch.setattr(
        shipped_timings, "rows", lambda: (found._replace(shape=tuple(found.shape)),)
    )
    shipped_timings.verdict.cache_clear()
    weight, norm = torch.zeros(24, 16, 3, 3), reference.Norm(*torch.ones(4, 24))
    conv = reference.ConvNorm(weight, None, (2, 2), (1, 1), (1, 1), 1, norm)
    x = torch.zeros(2, 16, 9, 9, dtype=torch.float16).to(memory_format=torch.channels_last)
    key = inference_conv.row_of(inference_conv.key_of(conv_bn_act.Call(x, conv)), {})
    try:
        device, of = ("NVIDIA X", "sm_90"), key[3:6]
        verdict = shipped_timings.verdict(key.op, device, *of, ("cudnn", "triton"), key.like)
    finally:
        shipped_timings.verdict.cache_clear()
    assert (verdict.backend, verdict.config) == ("triton", fast)


def test_every_configuration_of_tritons_is_timed(suite, measuring, convs, monkeypatch):
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = importlib.import_module("fused_res.kernels.conv_bn_act")
    monkeypatch.setattr(convs, "why_not", lambda *args: None)
    workload = convs.conv((1, 16, 3, 3), "fp16", convs.Conv(16, 1))
    candidates = [c for c in workload.candidates("cpu", suite.Options()) if c.why_not is None]
    found = measuring.measure(workload, candidates, rounds=1, least_ms=1e-3)
    expected = kernels.candidates(*workload.call_of(workload.values()))
    triton = [row for row in found if "-triton-" in row["rival"]]
    assert [row["config"] for row in triton] == [config._asdict() for config in expected]
    assert len({row["rival"] for row in triton}) == len(triton) > 1
    assert {row["refused"] for row in triton} == {None}


@pytest.fixture
def interpreted(monkeypatch):
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends.STATUS, "triton", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "triton", ("cpu",))


def test_rows_of_several_runs_say_which_is_which():
    made = importlib.import_module("report.tables").made
    row = {"workload": "a", "commit": "0f", "date": "2026-01-01T10"}
    assert made([row, {**row, "workload": "b"}]) == "commit 0f, 2026-01-01"
    later = {"workload": "c", "commit": "1e", "date": "2026-01-02T10"}
    assert made([row, later, {**row, "workload": "b"}]) == (
        "a, b: commit 0f, 2026-01-01; c: commit 1e, 2026-01-02"
    )


def test_training_convolutions_are_right_and_followed(
    interpreted, suite, measuring, suites, rows, table, tmp_path, monkeypatch
):
    """Every configuration is timed; the fastest decides for its call."""
    configs = importlib.import_module("fused_res.kernels.conv_tiles").CONFIGS
    calls = {w.call[-2:]: w for w in suites.workloads("training-convs", True, True)}
    names = "STATISTICS", "RELU", "ADD", "ADD_IN_PLACE"
    assert {end for _, end in calls} == {"", *(getattr(training_conv, n) for n in names)}
    written = []
    where = {"allocator": "cuda", "versions": {"torch": "2"}, "commit": "0", "date": "2026-01-01"}
    where["device"] = {"slug": "x", "name": "NVIDIA X", "cores": 9, "threads": 1, "isa": "sm_90"}
    for workload in calls.values():
        candidates = workload.candidates("cpu", suite.Options())
        found = measuring.measure(workload, candidates, rounds=1, least_ms=1e-3)
        assert len(found) == 4 and {row["refused"] for row in found} == {None}
        written += [row | where for row in found]
    for row in written:
        rows.validate(row)
        ours = row["config"] is not None
        fastest = 1.0 if "-128-64-" in row["rival"] else 1.5
        row["median_ms"] = 2.0 if not ours else 1.99 if row["direction"] == "forward" else fastest
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "training-convs.json").write_text(json.dumps(written))
    path = tmp_path / "measured.json"
    assert table.main(["--results", str(tmp_path), "--dispatch", str(path)]) == 0
    shipped = [shipped_timings.Row(**row) for row in json.loads(path.read_text())]
    assert len(shipped) == len(calls)
    by_call = [r._replace(shape=tuple(r.shape), device="cpu", isa="cpu") for r in shipped]
    monkeypatch.setattr(shipped_timings, "rows", lambda: tuple(by_call))
    shipped_timings.verdict.cache_clear()
    inference_conv.forget()
    try:
        for (backward, _), workload in calls.items():
            call = workload.call._replace(device=torch.device("cpu"))
            choice = training_conv._choose(call, training_conv.TIMED, -1)
            assert (choice > training_conv.TRITON) == backward
            assert not backward or configs[choice - training_conv.TRITON - 1][1:3] == (128, 64)
    finally:
        shipped_timings.verdict.cache_clear()
        inference_conv.forget()
    assert "3x3 8-8ch 4x4 stride 2 backward, batch 2 fp16" in table.markdown(tmp_path)


def test_the_convolutions_of_the_nets_are_timed(nets, suites):
    of_net = [
        ("ResNet-50", 256, 224), ("ResNet-18", 256, 224), ("ResNet-18 CIFAR", 512, 32),
        ("ResNet-20 CIFAR", 128, 32), ("100 blocks", 64, 32),
    ]  # fmt: skip
    seen = set()
    for name, batch, size in of_net:
        with torch.device("meta"):
            parts = sequence(nets.NETS[name].make())
            x = torch.empty(batch, 3, size, size)
        for block in parts:
            for part in block.modules():
                if isinstance(part, torch.nn.Conv2d) and part is not block:  # a stem is one
                    part.register_forward_hook(
                        lambda c, args, _: seen.add((args[0].shape, c.weight.shape, c.stride))
                    )
            x = block(x)
    for backward in (False, True):
        calls = [w.call for w in suites.workloads("training-convs", gpu=True)]
        assert seen == {(c.shape, c.weight, c.stride) for c in calls if c.backward == backward}


def test_tables_of_rows_that_are_missing(fabricated, table, rows, tmp_path, capsys):
    """Nothing was timed: the tables have dashes."""
    folder = tmp_path / "nvidia-x"
    folder.mkdir()
    none = dict.fromkeys(("median_ms", "percent_of_copy", "gbps", "images_per_s"))
    for path in fabricated.glob("[bno]*s.json"):
        found = [r for r in json.loads(path.read_text()) if r["direction"] != "saved"]
        changes = {"speedup_over": {}, "refused": rows.OUT_OF_TIME, **none}
        (folder / path.name).write_text(json.dumps([{**row, **changes} for row in found]))
    assert table.main(["--results", str(tmp_path)]) == 0
    assert "| - | - | - |" in capsys.readouterr().out


def test_plot(fabricated, table, tmp_path, capsys):
    if not importlib.util.find_spec("matplotlib"):
        pytest.skip("no matplotlib")
    assert table.main(["--plots", str(fabricated)]) == 0
    for name in ("speed", "chains"):
        assert (fabricated / f"{name}.png").stat().st_size > 10_000
    assert table.main(["--plots", str(tmp_path)]) == 0 and "no rows" in capsys.readouterr().out


def test_plot_without_matplotlib(fabricated, table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert table.main(["--plots", str(fabricated)]) == 0
    assert "no plot: " in capsys.readouterr().out


def pytest_of(keyword, code=""):
    """`pytest benchmarks -k ...` in a process of its own, after ``code``."""
    arguments = ["benchmarks", "--benchmark-only", "-k", keyword, "--benchmark-max-time=0.01",
                 "--benchmark-min-rounds=1", "-p", "no:cacheprovider"]  # fmt: skip
    command = f"import sys, pytest\n{code}\nsys.exit(pytest.main({arguments!r}))"
    # pytest-benchmark times nothing in a process of pytest-xdist
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True,
                          cwd=BENCHMARKS.parent, env=environ)  # fmt: skip


SMALLEST = "ops/ and 64x32x8x8_NCHW and backward and not compile"


def test_pytest_compares_candidates(suite):
    """One table of a workload and a direction, candidates its rows; what cannot run says why."""
    done = pytest_of(SMALLEST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'ops: bn_act 64x32x8x8 NCHW, forward+backward': 2 tests" in done.stdout
    for name in "eager NCHW", "fused_res-cpu NCHW":
        assert f"\n{name} " in done.stdout
    for name, why in suite.backends("cpu").items():
        assert why is None or f"fused_res-{name}: {why}" in done.stdout


def test_pytest_refuses_a_wrong_candidate():
    done = pytest_of(SMALLEST, """
sys.path.insert(0, "benchmarks")
from suites import ops
real = ops.bn_act
ops.bn_act = lambda *args, **kwargs: 1.1 * real(*args, **kwargs)
""")  # fmt: skip
    assert done.returncode == 1
    assert "WrongResult: wrong result: error of " in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_pytest_says_what_was_not_built():
    why = "_C.abi3.so was not built"
    code = f"from fused_res.dispatch import backends; backends.STATUS['cpu'] = {why!r}"
    done = pytest_of(f"({SMALLEST}) or (chains/ and CIFAR and fused_res)", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"fused_res-cpu: {why}" in done.stdout
    assert f"fused_res-frozen: cpu: {why}" in done.stdout
    assert "1 passed" in done.stdout


def test_sanitizer_cases_run():
    command = [sys.executable, str(BENCHMARKS.parent / "tests/tools/sanitizer_cases.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_timings_of_first_use_on_a_gpu_can_be_shipped(table, tmp_path, monkeypatch):
    runner = importlib.import_module("device.runner")
    found = Row("", "", "block_train", "bfloat16", "channels_last", (8, 64, 56, 56, 64),
                {"eager": 2.0, "cuda": 1.0}, "a block")  # fmt: skip
    made = {"device": "NVIDIA H200, sm_90", "driver": "1"}
    monkeypatch.setattr(user_timings, "made_by", lambda device: made)
    monkeypatch.setattr(user_timings, "settings", user_timings.settings._replace(cache=tmp_path))
    user_timings.write(torch.device("cuda"), [found])
    runner.keep_timings("nets", tmp_path, tmp_path / "rows")
    (row,) = json.loads(table.dispatch(tmp_path / "rows"))
    shipped = Row(**{**row, "shape": tuple(row["shape"])})
    assert shipped == found._replace(device="NVIDIA H200", isa="sm_90")
