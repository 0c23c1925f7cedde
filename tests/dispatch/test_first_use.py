"""First use: what is measured, what is believed, and what is remembered. No GPU is needed: the CPU
stands for one, with a clock and candidates of the tests' own, or Triton's interpreter."""

import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_res
from fused_res import cli
from fused_res.cli import doctor
from fused_res.dispatch import (
    backends,
    first_use,
    gpu_rules,
    inference_conv,
    norm,
    shipped_timings,
    training_block,
    user_timings,
)
from fused_res.dispatch.shipped_timings import Row
from fused_res.ops.bn_act import bn_act
from fused_res.reference import ResBlock
from fused_res.run import own_forward

CPU = torch.device("cpu")
ROW = Row("", "", "bn_act", "float32", "NCHW", (2, 3, 4, 5), {}, "toy")


@pytest.fixture(autouse=True)
def covered(monkeypatch):
    """The CPU is a device on which auto believes only measurements, in a process that has measured
    nothing."""
    monkeypatch.setattr(first_use, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(first_use, "_spent", first_use.Spent())
    monkeypatch.setattr(first_use, "_seen", {})
    monkeypatch.setattr(backends, "_logged", set())
    inference_conv.forget()
    user_timings.forget()
    yield
    monkeypatch.undo()
    inference_conv.forget()
    user_timings.forget()


class Toy:
    """y = 2 * x, by candidates whose names say how."""

    def __init__(self, *names, quick=None):
        self.names, self.runs = list(names), []
        self.quick = self.names if quick is None else quick

    def sample(self, seed, images=None):
        n = 2 if images is None else images
        x = torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        return (x.to(getattr(torch, self.dtype)),)

    dtype = "float32"

    def cast(self, sample, dtype):
        return (sample[0].to(dtype),)

    def run(self, name, sample):
        self.runs.append(name)
        y = 2 * sample[0]
        if "wrong" in name:
            y[0, 0, 0, 0] += 1
        if "nan" in name:
            y[-1] = float("nan")
        if "raising" in name:
            raise RuntimeError("an illegal memory access")
        if "hungry" in name:
            raise torch.OutOfMemoryError("out of memory")
        if "lazy" in name:
            y = torch.empty_like(y)
            y[:, 1:] = 2 * sample[0][:, 1:]
        if "unsteady" in name and self.runs.count(name) > 4:
            y += 1
        return {"y": [y]}


@pytest.fixture
def clock(monkeypatch):
    """Seconds by candidate; 1 where nothing is said."""
    seconds = {}

    def read(run, device):
        run()
        return seconds.get(run.args[0], 1.0)

    monkeypatch.setattr(first_use, "clock", read)
    return seconds


def decide(toy, row=ROW, key="key", times=1):
    for _ in range(times):
        found = first_use.decide((key,), CPU, lambda: row, lambda: toy)
    return found


def files():
    return [json.loads(path.read_text()) for path in user_timings.files()]


# --- what is believed


def test_the_second_sighting_is_measured_and_the_third_is_not(clock):
    toy = Toy("fast")
    clock["fast"] = 0.5
    first = decide(toy)
    assert (first.name, first.final, toy.runs) == ("eager", False, [])
    second = decide(toy)
    assert (second.name, second.final) == ("fast", True) and "2.00x PyTorch" in second.reason
    runs = len(toy.runs)
    assert decide(toy) == second and len(toy.runs) == runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_and_clearly_faster_is_taken(clock, dtype):
    clock.update(fast=0.97, close=0.98, slow=1.5, wrong_fast=0.1, nan_fast=0.1)
    toy = Toy("close", "slow", "wrong_fast", "nan_fast", "fast")
    toy.dtype = dtype
    row = ROW._replace(dtype=dtype)
    assert decide(toy, row, times=2).name == "fast"
    (mine,) = user_timings.table(CPU).rows.values()
    assert mine.ms == {"eager": 1000.0, "fast": 970.0, "close": 980.0, "slow": 1500.0}
    assert {f.candidate for f in user_timings.faults(CPU)} == {"wrong_fast", "nan_fast"}


def test_nothing_faster_leaves_the_call_to_pytorch(clock):
    clock.update(close=0.98, slow=2.0)
    assert decide(Toy("close", "slow"), times=2)[:2] == (
        "eager",
        "measured here: no candidate is faster",
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("wrong", "y has an error of .*; 1.5 times PyTorch's own error allows"),
        ("nan", "y has an error of nan"),
        ("raising", "RuntimeError: an illegal memory access"),
        ("hungry", "OutOfMemoryError: out of memory"),
        ("unsteady", "y has an error of"),
        ("lazy", "y has an error of nan"),
    ],
)
def test_a_faulty_candidate_is_dropped_named_and_remembered(clock, caplog, name, words):
    clock.update({name: 0.1, "fast": 0.5})
    with caplog.at_level(logging.WARNING, "fused_res"):
        assert decide(Toy(name, "fast"), times=2).name == "fast"
    assert f"{name} is not used for bn_act 2x3x4x5 toy, float32 NCHW: " in caplog.text
    (fault,) = user_timings.faults(CPU)
    assert fault.candidate == name and fault.shape == ROW.shape
    assert re.search(words, fault.error)
    # by a later process too, even where the call is measured again
    user_timings.forget()
    inference_conv.forget()
    (of,) = files()
    assert [f["candidate"] for f in of["faults"]] == [name]
    toy = Toy(name, "fast")
    first_use.measure(CPU, ROW, toy, toy.names)
    assert name not in toy.runs


def test_a_large_sample_is_compared_as_a_whole(clock):
    """The comparison with float64 has two images; a kernel may be wrong on the others alone."""

    class Large(Toy):
        def sample(self, seed, images=None):
            n = 64 if images is None else images
            return (torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed)),)

        def run(self, name, sample):
            found = super().run(name, sample)
            if name == "late" and len(sample[0]) > 2:
                found["y"][0][40:] = 0
            return found

    clock["late"] = 0.1
    assert decide(Large("late"), times=2).name == "eager"
    assert "the comparison with PyTorch's ops" in user_timings.faults(CPU)[0].error


def test_pytorchs_ops_that_fail_are_not_measured(clock):
    class Failing(Toy):
        def run(self, name, sample):
            raise torch.OutOfMemoryError("out of memory")

    assert decide(Failing("fast"), times=2)[:2] == ("eager", "it could not be measured")
    assert [(of["rows"], of["faults"]) for of in files()] == [([], [])]


def test_a_candidate_that_raises_while_it_is_timed_is_remembered(clock, monkeypatch):
    """A GPU reports an illegal address in a later call."""
    read = first_use.clock

    def failing(run, device):
        if run.args[0] == "late":
            raise RuntimeError("an illegal memory access")
        return read(run, device)

    monkeypatch.setattr(first_use, "clock", failing)
    clock["fast"] = 0.5
    assert decide(Toy("late", "fast"), times=2).name == "fast"
    (fault,) = user_timings.faults(CPU)
    assert (fault.candidate, fault.error) == ("late", "RuntimeError: an illegal memory access")


@pytest.mark.parametrize("often, name", [(5, "fast"), (1, "eager")])
def test_a_large_error_in_few_samples_is_chance(clock, often, name):
    """As where rounding turns a ReLU. Each of so many samples has three times PyTorch's error."""

    class Rounding(Toy):
        dtype = "bfloat16"

        def run(self, name, sample):
            found = super().run(name, sample)
            n = self.runs.count(name)
            if sample[0].dtype == torch.bfloat16:
                worse = name == "fast" and (n <= MOST or n % often == 0)
                found["y"][0] *= 1 + (3 if worse else 1) * 2**-7
            return found

    MOST = first_use.MOST_SAMPLES
    clock["fast"] = 0.5
    assert decide(Rounding("fast"), ROW._replace(dtype="bfloat16"), times=2).name == name


def test_an_interrupt_is_no_fault(clock):
    class Interrupted(Toy):
        def run(self, name, sample):
            if name == "fast":
                raise KeyboardInterrupt
            return super().run(name, sample)

    with pytest.raises(KeyboardInterrupt):
        decide(Interrupted("fast"), times=2)
    assert user_timings.table(CPU).faults == {} and files()[0]["faults"] == []
    clock["fast"] = 0.5
    assert decide(Toy("fast")).name == "fast"


def test_on_an_xpu_a_run_is_timed_until_it_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", done.append)
    first_use.clock(lambda: done.append("run"), torch.device("xpu"))
    assert done == [torch.device("xpu"), "run", torch.device("xpu")]


def test_all_measurements_on_a_gpu_have_one_stream(monkeypatch):
    """Each stream keeps its memory: those of 32 blocks would add up."""
    first_use._stream_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    device = torch.device("cuda", 0)
    assert first_use._stream_of(device) is first_use._stream_of(device)
    first_use._stream_of.cache_clear()


def test_a_call_in_inference_is_seen_once_in_a_call(clock, monkeypatch):
    monkeypatch.setattr("fused_res.run.inference.prepared", lambda *_: None)  # as on a GPU
    model, x = fused(net(ResBlock(16, 16))).eval(), image(4, 16, 8, 8)
    with torch.no_grad():
        model(x)
        assert user_timings.table(CPU).rows == {}
        model(x)
        assert len(user_timings.table(CPU).rows) == 2


@pytest.mark.parametrize("training", [True, False])
def test_a_report_measures_nothing(clock, monkeypatch, training):
    monkeypatch.setattr("fused_res.run.inference.prepared", lambda *_: None)  # as on a GPU
    model, x = fused(net(ResBlock(16, 16))).train(training), image(4, 16, 8, 8)
    with torch.set_grad_enabled(training):
        model(x)
        for _ in range(3):
            (block,) = fused_res.report(model).blocks
            assert "measured when it is seen again" in block.why
        assert user_timings.table(CPU).rows == {}
        model(x)
    assert user_timings.table(CPU).rows


# --- when nothing is measured


def test_of_several_threads_one_measures(clock):
    """As in nn.DataParallel: at once they would time each other."""
    running, most = [], []

    class Slow(Toy):
        def run(self, name, sample):
            running.append(name)
            most.append(len(running))
            time.sleep(0.001)
            running.pop()
            return super().run(name, sample)

    threads = [
        threading.Thread(target=decide, args=(Slow("fast"), ROW._replace(like=k), k, 2))
        for k in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert decide(Toy("fast"), ROW._replace(like="d"), "d", 2).final


def test_caps(clock, monkeypatch):
    monkeypatch.setattr(first_use, "MOST_CALLS", 2)
    clock["fast"] = 0.5
    found = [decide(Toy("fast"), ROW._replace(like=k), k, times=2).name for k in "abc"]
    assert found == ["fast", "fast", "eager"]
    assert "2 calls were measured" in decide(Toy("fast"), ROW._replace(like="d"), "d").reason


def test_at_most_five_candidates(clock):
    toy = Toy(*"abcdefg")
    decide(toy, times=2)
    assert set(toy.runs) == {"eager", *"abcde"}


@pytest.mark.parametrize(
    "value, measured", [("1", {"eager", "quick"}), ("0", set()), ("full", {"eager", "quick", "b"})]
)
def test_the_variable(clock, monkeypatch, value, measured):
    monkeypatch.setattr(first_use, "settings", first_use.settings._replace(autotune=value))
    toy = Toy("b", "quick", quick=["quick"])
    found = decide(toy, times=2)
    assert set(toy.runs) == measured
    assert found.final and (value != "0" or found.reason == "FUSED_RES_AUTOTUNE=0")


@pytest.mark.parametrize("value", ["full", "1"])
def test_a_row_without_a_candidate_is_measured_again(clock, monkeypatch, value):
    """The candidate's library was built since, or the variable was set."""
    clock.update(a=0.5, b=0.9)
    assert decide(Toy("b"), times=2).name == "b"
    inference_conv.forget()
    first_use._seen.clear()
    monkeypatch.setattr(first_use, "settings", first_use.settings._replace(autotune=value))
    toy = Toy("b", "a", quick=["a"])
    first = decide(toy)
    assert (first.name, first.final, toy.runs) == ("b", False, [])  # by the old row
    assert decide(toy).name == "a" and set(toy.runs) == {"eager", "a", "b"}


def test_the_reason_names_a_faulty_candidate(clock):
    for _ in range(2):
        assert "(wrong: wrong or failed, see" in decide(Toy("wrong"), times=2).reason
        inference_conv.forget()


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


class deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


def mode():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def profiler():
    return torch.autograd.profiler.profile()


@pytest.mark.parametrize(
    "make", [hooks, deterministic, mode, profiler, torch.autograd.detect_anomaly]
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_never_where_the_call_is_watched(clock, make):
    toy = Toy("fast")
    decide(toy)
    with make():
        assert decide(toy, times=2).name == "eager" and toy.runs == []
    clock["fast"] = 0.5
    assert decide(toy).name == "fast"  # later it is


def test_modes_of_functions_do_not_see_a_measurement(clock):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    clock["fast"] = 0.5
    toy = Toy("fast")
    decide(toy)
    with Mode():
        assert decide(toy).name == "fast"
    assert torch.Tensor.normal_ not in seen and torch.Tensor.mul not in seen and len(seen) < 10


def test_never_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in first_use._why_not_now(torch.device("cuda"))


def test_a_cached_row_is_followed_everywhere(clock):
    clock["fast"] = 0.5
    decide(Toy("fast"), times=2)
    inference_conv.forget()
    toy = Toy("fast")
    with deterministic():
        assert decide(toy).name == "fast"
    assert toy.runs == []


def test_several_processes_measure_nothing(clock, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    toy = Toy("fast")
    assert decide(toy, times=2)[:2] == ("eager", "several processes train together")
    inference_conv.forget()
    clock["fast"] = 0.5
    with first_use.alone():
        assert decide(toy, times=2).name == "fast"


def test_a_rule_without_measurements(monkeypatch):
    def rows(*gains, isa=("sm_80", "sm_90")):
        found = [
            Row("gpu", isa[i % len(isa)], *ROW[2:5], (n, 3, 4, 5), {"eager": g, "cuda": 1.0}, "toy")
            for i, (n, g) in enumerate(zip(range(1, 100), gains, strict=False))
        ]
        monkeypatch.setattr(shipped_timings, "rows", lambda: tuple(found))

    of = ["cuda", "triton"]
    assert gpu_rules.expected(ROW, of) == "eager"  # of the package as it is
    rows(*[1.2] * 6)
    assert gpu_rules.expected(ROW, of) == "cuda"
    assert gpu_rules.expected(ROW, ["triton"]) == "eager"
    assert gpu_rules.expected(ROW._replace(dtype="float16"), of) == "eager"
    rows(*[1.2] * 5)
    assert gpu_rules.expected(ROW, of) == "eager"
    rows(*[1.2] * 5, 1.05)
    assert gpu_rules.expected(ROW, of) == "eager"
    rows(*[1.2] * 6, isa=("sm_90",))
    assert gpu_rules.expected(ROW, of) == "eager"


# --- the table


def write(like):
    user_timings.write(CPU, [ROW._replace(like=like, ms={"eager": 2.0, "fast": 1.0})])


def test_two_processes_that_write_at_once_lose_nothing():
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=lambda i=i: [write(f"{i}-{j}") for j in range(20)]) for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    (found,) = files()
    assert {row["like"] for row in found["rows"]} == {
        f"{i}-{j}" for i in range(4) for j in range(20)
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[: len(t) // 2],
        lambda t: "[]",
        lambda t: t.replace('"faults"', '"other"'),
        lambda t: t.replace('"eager": 2.0', '"eager": "2"'),
        lambda t: t.replace('"format": "2"', '"format": "1"'),
        lambda t: t.replace('"device": "', '"device": "another '),
    ],
)
def test_a_damaged_or_foreign_table_is_ignored_and_replaced(clock, damage):
    write("toy")
    (path,) = user_timings.files()
    path.write_text(damage(path.read_text()))
    clock["fast"] = 0.5
    with pytest.warns(UserWarning, match="is ignored"):
        assert decide(Toy("fast"), times=2).name == "fast"
    assert len(files()[0]["rows"]) == 1


def test_a_table_that_cannot_be_written_holds_in_this_process(clock, monkeypatch):
    def fail(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(user_timings, "write", fail)
    clock["fast"] = 0.5
    assert decide(Toy("fast"), times=2).name == "fast"
    inference_conv.forget()
    assert decide(Toy("fast")).name == "fast"


# --- blocks


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def net(*blocks):
    model = nn.Sequential(*(blocks or [ResBlock(16, 16), ResBlock(16, 24, 2)]))
    return model.to(memory_format=torch.channels_last)


def fused(model):
    fused_res.fuse_(model)
    return model


def step(model, x):
    model(x.requires_grad_()).sum().backward()


@pytest.fixture
def ran(monkeypatch):
    """The candidates that ran blocks."""
    found, run = [], training_block._runner
    from fused_res.ops import res_block

    real = res_block._run_as
    monkeypatch.setattr(
        res_block, "_run_as", lambda call, of, *rest: found.append(of) or real(call, of, *rest)
    )
    yield found
    training_block.register(run)


def test_a_block_in_training(clock, ran, caplog):
    model, x = fused(net()), image(4, 16, 8, 8)
    clock["cpu"] = 0.5
    step(model, x)
    assert not ran
    with caplog.at_level(logging.INFO, "fused_res"):
        step(model, x)
    lines = [m for m in caplog.messages if m.startswith("measured ")]
    assert len(lines) == 2 and "takes cpu; ms: eager 1e+03, cpu 500" in lines[0]
    ran.clear()
    step(model, x)
    assert [of.backend for of in ran] == ["cpu", "cpu"]
    assert {row.op for row in user_timings.table(CPU).rows.values()} == {"block_train"}
    step(model, image(3, 16, 8, 8))  # another key
    assert len(ran) == 2


def test_blocks_that_are_alike_are_not_measured_in_one_forward(clock):
    """Else each new size of the images would be."""
    clock["cpu"] = 0.5
    model = fused(net(*(ResBlock(16, 16) for _ in range(3))))
    for size in (6, 7, 8):
        step(model, image(4, 16, size, size))
    assert user_timings.table(CPU).rows == {}
    step(model, image(4, 16, 8, 8))
    assert len(user_timings.table(CPU).rows) == 1


def test_the_measurement_changes_nothing_of_the_model(clock):
    torch.manual_seed(0)
    model, x = fused(net()), image(4, 16, 8, 8)
    plain = net()
    plain.load_state_dict(model.state_dict())
    flags = torch.backends.cudnn.allow_tf32, torch.get_rng_state()
    for m in (model, plain):
        for _ in range(2):
            step(m, x)
    assert torch.backends.cudnn.allow_tf32 == flags[0]
    assert torch.equal(torch.get_rng_state(), flags[1])
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_wrong_kernel_behind_the_fastest_candidate_is_never_used(
    clock, ran, monkeypatch, tmp_path
):
    """Planted in the op that the candidate calls: a wrong gradient of one weight."""
    from fused_res.ops import res_block

    real = res_block._backward

    def planted(*args):
        grads = real(*args)
        grads[-3][0, 0] = 0
        return grads

    monkeypatch.setattr(res_block, "_backward", planted)
    clock["cpu"] = 0.01
    model, x = fused(net()), image(4, 16, 8, 8)
    for _ in range(3):
        step(model, x)
    ran.clear()
    step(model, x)
    assert not ran
    assert {f.candidate for f in user_timings.faults(CPU)} == {"cpu"}
    text = doctor.render(doctor.report())
    assert "cpu is not used for block_train 4x16x8x8x16" in text and "has an error of" in text
    assert cli.main(["doctor", "--report", str(tmp_path / "report.json")]) == 0
    faults = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert len(faults) == 2 and all(f["shape"] and "allows" in f["error"] for f in faults)
    assert cli.main(["doctor", "--report", str(tmp_path)]) == 2


def test_a_block_left_to_pytorch_runs_its_own_forward(clock, monkeypatch):
    clock["cpu"] = 2.0
    model, x = fused(net()), image(4, 16, 8, 8)
    for _ in range(2):
        step(model, x)
    monkeypatch.setattr(
        fused_res.nn.blocks.FusedForward, "_is_as_recorded", lambda self: pytest.fail("a guard")
    )
    step(model, x)
    assert all(own_forward.runs_own_forward(block, t) for block, t in [(model[0], x)])


def test_what_is_tuned_later_is_followed(clock, ran):
    clock["cpu"] = 2.0
    model, x = fused(net(ResBlock(16, 16))), image(4, 16, 8, 8)
    for _ in range(3):
        step(model, x)
    assert own_forward.runs_own_forward(model[0], x)
    (row,) = user_timings.table(CPU).rows.values()
    user_timings.keep(CPU, [row._replace(ms={"eager": 2.0, "cpu": 1.0})])
    inference_conv.forget()
    ran.clear()
    step(model, x)
    assert len(ran) == 1


@pytest.fixture
def interpreted(monkeypatch):
    """Triton runs in its interpreter, and is the only backend."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends.STATUS, "triton", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "triton", ("cpu",))
    monkeypatch.setitem(backends.STATUS, "cpu", "left out")
    for name, value in {"MOST_SAMPLES": 1, "WARM_UPS": 0, "RUNS": 1}.items():
        monkeypatch.setattr(first_use, name, value)  # it takes a second a step


def test_triton_in_its_interpreter_is_a_real_candidate(clock, ran, monkeypatch, interpreted):
    monkeypatch.setattr(first_use, "settings", first_use.settings._replace(autotune="full"))
    clock.update({"triton": 0.5, "triton 1x1": 0.4, "triton convolutions": 0.6})
    model, x = fused(net(ResBlock(16, 16, kind="single"))), image(2, 16, 4, 4)
    for _ in range(2):
        step(model, x)
    (row,) = user_timings.table(CPU).rows.values()
    names = {"eager", "triton", "triton 1x1", "triton convolutions"}
    assert row.ms.keys() == names, user_timings.faults(CPU)
    ran.clear()
    step(model, x)
    assert [of.convolutions for of in ran] == ["1x1"]
    with fused_res.backend("triton"):  # which follows the timings too
        step(model, x)
    assert ran[-1].convolutions == "1x1"


def test_checkpointed_blocks_are_not_measured_inside(clock, ran):
    from torch.utils.checkpoint import checkpoint

    clock["cpu"] = 0.5
    model, x = fused(net(ResBlock(16, 16))), image(4, 16, 8, 8)
    for _ in range(3):
        checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert not ran and user_timings.files() == []
    step(model, x)
    step(model, x)
    ran.clear()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert len(ran) == 2  # forward, and again in backward


def test_compiled_blocks_measure_nothing(clock, ran):
    clock["cpu"] = 0.5
    model, x = fused(net(ResBlock(16, 16))), image(4, 16, 8, 8)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        step(compiled, x)
    assert not ran and user_timings.files() == []


def test_a_norm_by_itself(clock):
    clock["cpu"] = 0.5
    x = image(4, 16, 8, 8)
    weight = torch.ones(16, requires_grad=True)
    for _ in range(3):
        bn_act(x, None, None, weight, torch.zeros(16), training=True, residual=x)
    (row,) = user_timings.table(CPU).rows.values()
    assert (row.op, row.like) == ("bn_act", "training, add, relu")
    call = norm.Call(x, fused_res.Norm(None, None, weight, torch.zeros(16), True), x, None, "relu")
    assert norm.choose(call) == "cpu"


@pytest.mark.parametrize("like", ["", "training, add, relu"])
def test_the_packages_timings_are_followed_without_a_measurement(clock, monkeypatch, like):
    """Those of the suite ``ops`` say nothing of what is added."""
    shape, ms = (8, 16, 8, 8), {"eager": 2.0, "cpu": 1.0}
    row = Row("cpu", "cpu", "bn_act", "float32", "channels_last", shape, ms, like)
    monkeypatch.setattr(shipped_timings, "rows", lambda: (row,))
    shipped_timings.verdict.cache_clear()
    x, weight = image(4, 16, 8, 8), torch.ones(16)
    call = norm.Call(x, fused_res.Norm(None, None, weight, weight, True), x, None, "relu")
    assert norm.choose(call) == "cpu" and first_use._spent.calls == 0
    shipped_timings.verdict.cache_clear()


def test_convolutions_for_inference(clock):
    clock["direct"] = 0.5
    model, x = fused(net()).eval(), image(4, 16, 8, 8)
    with torch.no_grad():
        before = model(x)
        model(x)
        after = model(x)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    rows = user_timings.table(CPU).rows.values()
    assert len(rows) == 4 and {row.op for row in rows} == {"conv_bn_act"}
    assert all(first_use.by_row(row, ["direct"]).name == "direct" for row in rows)


def test_a_later_process_reads_the_rows(clock, tmp_path):
    clock["cpu"] = 0.5
    model, x = fused(net()), image(4, 16, 8, 8)
    for _ in range(2):
        step(model, x)
    code = """
import torch, fused_res
from fused_res.dispatch import first_use, training_block, user_timings
first_use.DEVICE_TYPES = ("cpu",)
first_use.measure = None
from fused_res.ops.bn_act import bn_act
from fused_res.reference import ResBlock
model = torch.nn.Sequential(ResBlock(16, 16), ResBlock(16, 24, 2))
model.to(memory_format=torch.channels_last)
fused_res.fuse_(model)
x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
model(x).sum().backward()
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "FUSED_RES_LOG": "dispatch",
             "FUSED_RES_CACHE": str(user_timings.settings.cache)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("runs cpu: measured here: 500 ms, 2.00x PyTorch") == 2


def test_tune_measures_whole_blocks_in_all_candidates(clock, ran, monkeypatch, interpreted):
    clock.update({"triton": 0.5, "triton convolutions": 0.4})
    model, x = net(ResBlock(16, 16, kind="single")), image(2, 16, 4, 4)
    report = fused_res.tune(model, x, train=True, seconds=0)
    (row,) = [row for row in report.rows if row.op == "block_train"]
    assert row.ms.keys() == {"eager", "triton", "triton 1x1", "triton convolutions"}
    assert report.chosen[report.rows.index(row)] == "triton convolutions"
    assert "triton convolutions ms" in str(report)
    fused(model)
    ran.clear()
    step(model, x)
    assert [of.convolutions for of in ran] == ["all"]  # the first call follows it


def test_a_kernel_that_ends_the_process_is_not_run_again(clock, tmp_path):
    """An illegal address ends a CUDA context for good, and some kernels never end."""
    code = """
import os, torch, fused_res
from fused_res.dispatch import first_use, training_block
first_use.DEVICE_TYPES = ("cpu",)
run = training_block._runner
training_block.register(lambda call, of: run(call, of) if of is None else os._exit(7))
block = fused_res.FusedResBlock(16, 16)
for _ in range(3):
    block(torch.randn(4, 16, 8, 8, requires_grad=True)).sum().backward()
"""
    environ = {**os.environ, "FUSED_RES_CACHE": str(user_timings.settings.cache)}
    codes = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ).returncode
        for _ in range(2)
    ]
    assert codes == [7, 0]
    user_timings.forget()
    (fault,) = user_timings.faults(CPU)
    assert fault.candidate == "cpu" and "ended before it came back" in fault.error


def test_what_another_process_measures_now_is_no_fault(clock):
    fault = user_timings.Fault(*user_timings.key_of(ROW), "fast", "", user_timings.this_process())
    user_timings.keep(CPU, [], [fault])
    assert user_timings.faults(CPU) == []
    clock["fast"] = 0.5
    assert decide(Toy("fast"), times=2).name == "fast"
    assert user_timings.table(CPU).faults == {}


def test_ddp_with_different_batches_measures_nothing_and_ends(tmp_path):
    """A collective in one process's measurement would wait for ever."""
    code = """
import os, sys, torch, torch.distributed as dist, fused_res
from torch.nn.parallel import DistributedDataParallel
from fused_res.dispatch import first_use, user_timings
first_use.DEVICE_TYPES = ("cpu",)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
model = torch.nn.Sequential(fused_res.reference.ResBlock(16, 16))
fused_res.fuse_(model)
model = DistributedDataParallel(model)
for step in range(4):
    x = torch.randn(4 + 3 * rank, 16, 8 + step % 2, 8)
    model(x).sum().backward()
assert first_use._spent.calls == 0 and user_timings.files() == []
dist.barrier()
os._exit(0)  # gloo's threads may abort while Python shuts down
"""
    environ = {**os.environ, "FUSED_RES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")], env=environ
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_the_precision_of_float32_is_restored(tmp_path):
    """Of all ways to set it; PyTorch refuses to read some of them after others."""
    code = """
import torch
from fused_res.dispatch import first_use
cuda = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
def state():
    return [of.fp32_precision for of in cuda]
def holds():
    before = state()
    with first_use._exact_float32():
        assert [of.fp32_precision for of in cuda[:2]] == ["ieee"] * 2
    assert state() == before
holds()
assert torch.backends.cudnn.allow_tf32
for precision in ("high", "medium", "highest"):
    torch.set_float32_matmul_precision(precision)
    holds()
    assert torch.get_float32_matmul_precision() == precision
torch.backends.cudnn.conv.fp32_precision = "ieee"
holds()
torch.backends.cuda.matmul.fp32_precision = "tf32"
holds()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no start times")
def test_another_process_of_the_same_number_is_another_process(clock):
    """As in a container that starts again after a kernel has ended the process."""
    host, pid, start = user_timings.this_process().split(":")
    fault = user_timings.Fault(*user_timings.key_of(ROW), "fast", "", f"{host}:{pid}:{start}0")
    user_timings.keep(CPU, [], [fault])
    assert user_timings.faults(CPU) == [fault]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no states")
def test_a_process_that_nobody_waited_for_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    name = f"{user_timings.platform.node()}:{child.pid}:{user_timings._start_of(child.pid)}"
    child.stdout.read()  # until it has ended
    while user_timings._start_of(child.pid):
        time.sleep(0.01)
    assert not user_timings._lives(name)
    child.wait()
