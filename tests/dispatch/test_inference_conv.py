"""Choosing how conv_bn_act runs: the tables, their precedence, fused_res.tune and its command."""

import contextlib
import copy
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fused_res
from fused_res import cli, env, reference
from fused_res.cli import doctor
from fused_res.dispatch import backends, inference_conv, shipped_timings, tuning, user_timings
from fused_res.dispatch.shipped_timings import Row
from fused_res.ops import conv_bn_act as op
from fused_res.reference import ResBlock

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        backends.STATUS["cpu"] is not None, reason=f"no CPU library: {backends.STATUS['cpu']}"
    ),
]
SHAPE = (2, 16, 9, 11)
CALLS = 4  # distinct convolutions of `net`
WINOGRAD = 3  # of those, 3x3 with stride 1
EXPECTED = {"expected to win at this shape"}  # said where nothing was measured


@pytest.fixture
def said(monkeypatch, caplog):
    """Runs a function and returns what is logged of the convolutions it runs, for the first time
    or again."""

    def run(function, *args):
        monkeypatch.setattr(backends, "_logged", set())
        inference_conv.forget()
        caplog.clear()
        with caplog.at_level(logging.INFO, "fused_res"), torch.no_grad():
            function(*args)
        return [m for m in caplog.messages if m.startswith("conv_bn_act")]

    return run


def net(**options):
    """Two blocks, the second with a projection."""
    return nn.Sequential(ResBlock(16, 16, **options), ResBlock(16, 24, stride=2, **options)).eval()


def fused(model):
    model = copy.deepcopy(model)
    fused_res.fuse_(model)
    return model.eval()


def the_file():
    (path,) = user_timings.files()
    return path


def edit(change):
    """Changes the JSON of the one table there is, for a process that has not read it."""
    path = the_file()
    found = json.loads(path.read_text())
    changed = change(found)
    path.write_text(json.dumps(found if changed is None else changed))
    user_timings.forget()


def make_fastest(name):
    def change(found):
        for row in found["rows"]:
            row["ms"] = {n: 0.1 if n == name else 1.0 for n in row["ms"]}

    edit(change)


def how(messages):
    return [re.search(r" runs (\w+): ", m).group(1) for m in messages]


def why(messages):
    return {re.search(r" runs \w+: (.*)", m).group(1).split(":")[0] for m in messages}


def test_what_tune_finds_is_written_and_followed(said, cache):
    model, x = net(), torch.randn(SHAPE)
    assert why(said(fused(model), x)) == EXPECTED
    report = fused_res.tune(model, x)
    assert report.paths == [the_file()] and the_file().parent == Path(cache)
    found = json.loads(the_file().read_text())
    made = found["made_by"]
    assert made["fused_res"] == fused_res.__version__ and made["torch"] == torch.__version__
    for word in (user_timings.processor(), backends.cpu_isa(), "threads: 1"):
        assert word in made["device"]
    assert len(found["rows"]) == len(report.rows) == len(report.chosen) == CALLS
    for row in found["rows"]:
        winograd = {"winograd2", "winograd4"} if row["like"].startswith("3x3 stride 1x1") else set()
        assert set(row["ms"]) == {"eager", "onednn", "direct", "bn_act"} | winograd
    assert sum("winograd2" in row["ms"] for row in found["rows"]) == WINOGRAD
    user_timings.forget()  # as a new process
    messages = said(fused(model), x)
    assert how(messages) == report.chosen and why(messages) == {"tuned"}
    text = str(report).splitlines()
    assert len(text) == 2 + CALLS
    assert [name for name in tuning.IMPLEMENTATIONS if f" {name} ms " in text[0]] == [
        name for name in tuning.IMPLEMENTATIONS if any(name in row.ms for row in report.rows)
    ]
    assert "2x16x9x11 to 16, 3x3 stride 1x1 padding 1x1, add, relu, float32 NCHW" in str(report)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "name",
    ["eager", *(name for name, i in inference_conv.IMPLEMENTATIONS.items() if i.backend == "cpu")],
)
def test_the_fastest_runs_and_is_right(said, name, layout):
    model = net().to(memory_format=layout)
    x = torch.randn(SHAPE).to(memory_format=layout)
    report = fused_res.tune(model, x)
    make_fastest(name)
    ours = fused(model)
    got = []
    messages = said(lambda: got.append(ours(x)))
    # of equals the one that the rules expect to win, which comes first
    assert how(messages) == [name if name in row.ms else next(iter(row.ms)) for row in report.rows]
    assert name in how(messages)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    assert got[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(got[0], exact.float(), rtol=1e-5, atol=1e-5)


def test_a_named_backend_chooses_among_its_own(said):
    model, x = net(), torch.randn(SHAPE)
    fused_res.tune(model, x)
    make_fastest("eager")
    ours = fused(model)
    assert set(how(said(ours, x))) == {"eager"}
    with fused_res.backend("cpu"):
        assert set(how(said(ours, x))) == {"direct", "winograd2"}  # as the rules expect
    make_fastest("onednn")
    with fused_res.backend("cpu"):
        assert set(how(said(ours, x))) == {"onednn"}
    with fused_res.backend("eager"):
        assert said(ours, x) == []


def test_a_small_gain_is_not_taken(said):
    model, x = net(), torch.randn(SHAPE)
    fused_res.tune(model, x)

    def change(found):
        for row in found["rows"]:
            times = {"eager": 1.02, "winograd2": 0.98, "winograd4": 0.96}
            row["ms"] = {n: times.get(n, 1.0) for n in row["ms"]}

    edit(change)
    assert sorted(how(said(fused(model), x))) == ["direct"] + ["winograd2"] * WINOGRAD


def test_the_users_table_is_asked_before_the_shipped_one(said, monkeypatch):
    model, x = net(), torch.randn(SHAPE)
    ours = fused(model)
    fused_res.tune(model, x)

    def shipped():
        """Rows of shapes nearby, in which eager wins."""
        for row in user_timings.table(torch.device("cpu")).rows.values():
            n, *sizes = row.shape
            ms = {name: 1.0 if name == "eager" else 2.0 for name in row.ms}
            yield row._replace(device="cpu", isa="cpu", shape=(2 * n, *sizes), ms=ms)

    rows = tuple(shipped())
    make_fastest("onednn")
    assert set(how(said(ours, x))) == {"onednn"}
    monkeypatch.setattr(shipped_timings, "rows", lambda: rows)
    shipped_timings.verdict.cache_clear()
    messages = said(ours, x)
    assert set(how(messages)) == {"onednn"} and why(messages) == {"tuned"}
    the_file().unlink()
    user_timings.forget()
    messages = said(ours, x)
    assert set(how(messages)) == {"eager"} and why(messages) == {"measured"}
    shipped_timings.verdict.cache_clear()
    monkeypatch.undo()
    inference_conv.forget()
    assert why(said(ours, x)) == EXPECTED


def test_only_the_very_call_is_decided(said):
    model, x = net(), torch.randn(SHAPE)
    fused_res.tune(model, x)
    make_fastest("eager")
    ours = fused(model)
    for other in (
        torch.randn(3, *SHAPE[1:]),
        torch.randn(SHAPE).to(memory_format=torch.channels_last),
    ):
        assert "eager" not in how(said(ours, other))
    assert "eager" not in how(said(ours.bfloat16(), x.bfloat16()))
    ours = ours.float()
    assert set(how(said(ours, x))) == {"eager"}
    with inference_conv.recording() as calls, torch.no_grad():
        ours(x)
    call = next(iter(calls.values()))._replace(x=x)
    for threads in (1, 2, 1):  # as it runs, nothing is read or chosen anew
        torch.set_num_threads(threads)
        assert inference_conv.choose(call, "auto") is inference_conv.choose(call, "auto")
        assert (inference_conv.choose(call, "auto").implementation == "eager") == (threads == 1)


def test_calls_that_differ_only_in_what_is_added():
    """Each has a row of its own: identity, projection, concatenation, ReLU before, groups."""
    blocks = [
        ResBlock(16, 16),
        ResBlock(16, 16, skip="projection"),
        ResBlock(16, 16, skip="concat"),
        ResBlock(16, 16, skip="concat", relu="after"),
        ResBlock(16, 16, relu="before"),
        ResBlock(16, 16, groups=2, dilation=2),
    ]
    x = torch.randn(1, 16, 5, 5)
    rows = [fused_res.tune(block, x).rows for block in blocks]
    likes = [row.like for found in rows for row in found]
    assert likes == [
        "3x3 stride 1x1 padding 1x1, relu",
        "3x3 stride 1x1 padding 1x1, add, relu",
        "3x3 stride 1x1 padding 1x1, relu",
        "3x3 stride 1x1 padding 1x1, shortcut of 16: 1x1 stride 1x1 padding 0x0, relu",
        "3x3 stride 1x1 padding 1x1, relu",
        "3x3 stride 1x1 padding 1x1, concat 16, none",
        "3x3 stride 1x1 padding 1x1, relu",
        "3x3 stride 1x1 padding 1x1, concat 16, relu",
        "3x3 stride 1x1 padding 1x1, relu",
        "3x3 stride 1x1 padding 1x1, add, relu_before_add",
        "3x3 stride 1x1 padding 2x2 dilation 2x2 groups 2, relu",
        "3x3 stride 1x1 padding 2x2 dilation 2x2 groups 2, add, relu",
    ]
    assert len(json.loads(the_file().read_text())["rows"]) == len(set(likes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_that_run_in_one_way(dtype):
    report = fused_res.tune(net().to(dtype), torch.randn(SHAPE, dtype=dtype))
    assert report.rows == report.chosen == report.paths == user_timings.files() == []
    assert str(report).startswith("convolution")
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_res.tune(net(), torch.randn(SHAPE)).rows == []


# --- files that cannot be used


def replaced(**fields):
    return lambda found: {**found, **fields}


def in_first_row(**fields):
    return lambda found: {**found, "rows": [{**found["rows"][0], **fields}, *found["rows"][1:]]}


def other(**made):
    return lambda found: {**found, "made_by": {**found["made_by"], **made}}


BAD = {
    "empty": lambda path: path.write_text(""),
    "cut off": lambda path: path.write_text(path.read_text()[:-40]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    **{
        name: lambda path, change=change: path.write_text(
            json.dumps(change(json.loads(path.read_text())))
        )
        for name, change in {
            "a list": lambda found: [found],
            "a number": lambda found: 3,
            "no rows": lambda found: {"made_by": found["made_by"]},
            "rows of text": replaced(rows=["fast"]),
            "rows are a number": replaced(rows=1),
            "a time is text": in_first_row(ms={"eager": "1.0"}),
            "a time is nan": in_first_row(ms={"eager": float("nan")}),
            "a time is 0": in_first_row(ms={"eager": 0}),
            "a shape is text": in_first_row(shape="1x2"),
            "a shape of text": in_first_row(shape=["1"]),
            "more fields": in_first_row(color="red"),
            "a config is a number": in_first_row(config=1),
            "another version": other(fused_res="0.0.1"),
            "another torch": other(torch="1.4.0"),
            "another device": other(device="Z80"),
            "made by nobody": replaced(made_by=None),
        }.items()
    },
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_table_that_cannot_be_used_is_ignored(said, spoil):
    model, x = nn.Sequential(ResBlock(16, 16)).eval(), torch.randn(1, 16, 5, 5)
    fused_res.tune(model, x)
    make_fastest("eager")
    path = the_file()
    spoil(path)
    user_timings.forget()
    ours = fused(model)
    with pytest.warns(UserWarning) as caught:
        messages = said(ours, x) + said(ours, x)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{path} is ignored: ")
    assert "eager" not in how(messages) and why(messages) == EXPECTED
    if path.is_dir():
        with pytest.raises(fused_res.TableNotWritten):
            fused_res.tune(model, x)
        path.rmdir()
        return
    report = fused_res.tune(model, x)  # writes it anew
    user_timings.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert how(said(ours, x)) == report.chosen


def test_a_table_that_cannot_be_read_is_ignored(said, monkeypatch):
    model, x = net(), torch.randn(SHAPE)
    fused_res.tune(model, x)
    user_timings.forget()

    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match="is ignored: .*Permission denied") as caught:
        assert "tuned" not in why(said(fused(model), x))
    assert len(caught) == 1


def test_unknown_implementations_in_a_table_are_ignored(said):
    model, x = net(), torch.randn(SHAPE)
    fused_res.tune(model, x)
    make_fastest("onednn")
    edit(lambda found: [row["ms"].update(warp9=1e-9) for row in found["rows"]] and found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(how(said(fused(model), x))) == {"onednn"}
    edit(lambda found: [row.update(ms={"warp9": 1e-9}) for row in found["rows"]] and found)
    assert why(said(fused(model), x)) == EXPECTED


class Config(NamedTuple):
    tile: int


def test_configurations(monkeypatch, said):
    """The fastest is kept and run; one that is no longer there is not."""
    ran, tiles = [], [1, 3, 2]  # the best is in the middle

    def prepare(call, config=None):
        ran.append(config)
        return lambda x, residual: reference.conv_bn_act(*call)

    mine = inference_conv.Implementation(
        "cpu", prepare, lambda call: None, lambda call: [*map(Config, tiles)]
    )
    for name in inference_conv.IMPLEMENTATIONS.keys() - {"onednn"}:
        monkeypatch.delitem(inference_conv.IMPLEMENTATIONS, name)
    monkeypatch.setitem(inference_conv.IMPLEMENTATIONS, "mine", mine)
    monkeypatch.setattr(
        tuning,
        "_time",
        lambda call, ways, seconds: [w.config.tile % 3 + 1.0 if w.config else 9.0 for w in ways],
    )
    model, x = net(), torch.randn(SHAPE)
    report = fused_res.tune(model, x)
    assert {row.ms["mine"] for row in report.rows} == {1.0}
    assert {tuple(row.config.items()) for row in report.rows} == {(("tile", 3),)}
    user_timings.forget()
    ours = fused(model)
    said(ours, x)
    assert ran == [Config(3)] * CALLS
    tiles.remove(3)
    said(ours, x)
    assert ran[CALLS:] == [None] * CALLS
    make_fastest("onednn")  # which has none
    assert set(how(said(ours, x))) == {"onednn"}


def test_tritons_configurations_are_told_apart(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as other tests import it
    kernels = pytest.importorskip("fused_res.kernels.conv_bn_act")
    weight = torch.empty(16, 16, 3, 3, device="meta")
    conv = reference.ConvNorm(weight, None, (1, 1), (1, 1), (1, 1), 1, None)
    call = op.Call(torch.empty(2, 16, 9, 9, dtype=torch.bfloat16, device="meta"), conv)
    assert len(kernels.candidates(*call)) > 1
    for config in kernels.candidates(*call):
        in_file = json.loads(json.dumps(config._asdict()))
        assert inference_conv._config(call, "triton", in_file) == config
    assert inference_conv._config(call, "triton", {**in_file, "M": 7}) is None


# --- writing


@pytest.mark.parametrize("function", ["os.replace", "tempfile.mkstemp", "pathlib.Path.mkdir"])
def test_without_permission_to_write(said, monkeypatch, function):
    model, x = net(), torch.randn(SHAPE)
    fused_res.tune(model, torch.randn(1, *SHAPE[1:]))
    before = the_file().read_bytes()

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(function, refuse)
        with pytest.raises(OSError, match="FUSED_RES_CACHE must name a folder") as caught:
            fused_res.tune(model, x)
    assert isinstance(caught.value, fused_res.TableNotWritten)
    assert str(the_file()) in str(caught.value) and "Permission denied" in str(caught.value)
    assert the_file().read_bytes() == before
    assert os.listdir(the_file().parent) == [the_file().name]
    messages = said(fused(model), x)
    assert how(messages) == caught.value.report.chosen and why(messages) == {"tuned"}
    user_timings.forget()  # a new process knows nothing of it
    assert "tuned" not in why(said(fused(model), x))


def test_the_folder_is_made_and_may_be_impossible(monkeypatch, tmp_path):
    def use(folder):
        monkeypatch.setattr(
            user_timings, "settings", user_timings.settings._replace(cache=str(folder))
        )

    use(tmp_path / "a" / "b")
    assert fused_res.tune(net(), torch.randn(SHAPE)).paths[0].parent == tmp_path / "a" / "b"
    (tmp_path / "file").write_text("")
    use(tmp_path / "file" / "b")
    with pytest.raises(fused_res.TableNotWritten, match=re.escape(str(tmp_path / "file"))):
        fused_res.tune(net(), torch.randn(SHAPE))


def test_the_next_tune_adds_to_the_table(said):
    model = net()
    first, second = torch.randn(SHAPE), torch.randn(1, *SHAPE[1:])
    fused_res.tune(model, first)
    user_timings.forget()
    fused_res.tune(model, second)
    user_timings.forget()
    assert len(json.loads(the_file().read_text())["rows"]) == 2 * CALLS
    for x in (first, second):
        assert why(said(fused(model), x)) == {"tuned"}
    fused_res.tune(model, first)
    assert len(json.loads(the_file().read_text())["rows"]) == 2 * CALLS


def test_writers_at_once_leave_a_whole_table():
    device = torch.device("cpu")

    def row(i):
        return Row("", "", "conv_bn_act", "float32", "NCHW", (i, 1, 1, 1, 1), {"eager": 1.0}, "x")

    user_timings.write(device, [row(0)])
    path, wrong, done = the_file(), [], threading.Event()

    def read():
        while not done.is_set():
            try:
                user_timings.load(path)
            except (OSError, ValueError) as error:
                wrong.append(error)

    def write(first):
        for i in range(first, first + 40):
            user_timings.write(device, [row(i)])

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(first,)) for first in (100, 200, 300)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not wrong
    assert row(0) in user_timings.load(path)[1] and os.listdir(path.parent) == [path.name]


# --- tune and the model


def test_the_model_is_as_it_was():
    model = net().train()
    model[0].bn1.eval()
    model[1].conv1.weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *args: calls.append("hook"))
    parameters = dict(model.named_parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = [
        (type(m), m.training, sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()
    ]
    x, generator = torch.randn(SHAPE), torch.get_rng_state()
    copied = x.clone()
    fused_res.tune(model, x)
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(x, copied)
    assert torch.is_grad_enabled()
    for name, p in model.named_parameters():
        assert p is parameters[name] and p.grad is None
        assert p.requires_grad == (name != "1.conv1.weight")
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name
    assert before == [
        (type(m), m.training, sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()
    ]


def test_a_buffer_that_forward_changes_is_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ResBlock(16, 16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.block(x)

    model = Counts()
    fused_res.tune(model, torch.randn(SHAPE))
    assert model.calls == 0


@pytest.mark.parametrize("make", [fused, lambda model: model, lambda m: fused(m).train()])
def test_fused_or_not_and_in_any_mode(make):
    model = make(net())
    assert len(fused_res.tune(model, torch.randn(SHAPE)).rows) == CALLS


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ResBlock(16, 16)

        def forward(self, x, y):
            return self.block(x) + y

    x = torch.randn(SHAPE)
    assert len(fused_res.tune(Two(), (x, x)).rows) == 2


def test_what_does_not_run_is_left_out(monkeypatch, caplog):
    def fail(call):
        raise RuntimeError("no such instruction")

    def fail_later(call):
        return lambda x, residual: fail(call)

    for name in inference_conv.IMPLEMENTATIONS.keys() - {"onednn"}:
        prepare = fail if name == "direct" else fail_later
        broken = inference_conv.IMPLEMENTATIONS[name]._replace(prepare=prepare)
        monkeypatch.setitem(inference_conv.IMPLEMENTATIONS, name, broken)
    report = fused_res.tune(net(), torch.randn(SHAPE))
    assert [set(row.ms) for row in report.rows] == [{"eager", "onednn"}] * CALLS
    assert "winograd4 None does not run: no such instruction" in caplog.text


def test_runs_are_in_turns_and_the_fastest_counts(monkeypatch):
    """At least and at most so many rounds."""
    monkeypatch.setattr(tuning, "ROUNDS", (2, 4))
    for name in inference_conv.IMPLEMENTATIONS.keys() - {"onednn"}:
        monkeypatch.delitem(inference_conv.IMPLEMENTATIONS, name)
    ran = []

    def clock(run, device):
        ran.append(run.args[1].implementation)  # NCHW: of run_as
        disturbed = ran.count(ran[-1]) in (4, 9)
        return {"eager": 3.0, "onednn": 2.0}[ran[-1]] + disturbed

    monkeypatch.setattr(tuning, "_clock", clock)
    block = nn.Sequential(ResBlock(9, 9))
    report = fused_res.tune(block, torch.randn(1, 9, 5, 5), seconds=1e6)
    assert ran == ["eager", "onednn"] * 5 * 2
    assert [row.ms for row in report.rows] == [{"eager": 3000.0, "onednn": 2000.0}] * 2
    assert report.chosen == ["onednn"] * 2
    ran.clear()
    fused_res.tune(block, torch.randn(1, 9, 5, 5), seconds=0)
    assert ran == ["eager", "onednn"] * 3 * 2


class Unwilling(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResBlock(16, 16)

    def forward(self, x):
        raise KeyError("no such thing")

    def __deepcopy__(self, memo):
        raise RuntimeError("not twice")


def test_errors(monkeypatch):
    x = torch.randn(SHAPE)
    for model, example, kind, words in [
        ("resnet", x, TypeError, "model must be a torch.nn.Module, got str"),
        (net(), "image", TypeError, "example must be a tensor or a tuple of tensors, got 'image'"),
        (net(), (x, 3), TypeError, "example must be a tensor or a tuple of tensors"),
        (net(), x[:, :3], ValueError, r"example must be what model takes, .*\(2, 3, 9, 11\)"),
        (net(), x[0], ValueError, r"shape \(16, 9, 11\), float32 on cpu, for which it raised"),
        (net(), x.long(), ValueError, "int64 on cpu, for which it raised"),
        (net(), (x, x), ValueError, "example must be what model takes"),
        (nn.Linear(11, 2), x, ValueError, "must have a residual block that can be fused, got Lin"),
        (Unwilling(), x, ValueError, "model must be one that can be copied.*not twice"),
        (nn.DataParallel(net()), x, ValueError, "model must not be wrapped.*tune"),
    ]:
        with pytest.raises(kind, match=words):
            fused_res.tune(model, example)
    with pytest.raises(ValueError, match="seconds=-1 must be at least 0"):
        fused_res.tune(net(), x, seconds=-1)
    assert user_timings.files() == []


def test_tune_refuses_to_measure_in_a_graph(monkeypatch):
    model, x = net(), torch.randn(SHAPE)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        fused_res.tune(model, x)
        return x + 1

    with pytest.raises(Exception, match="inside torch.compile"):
        compiled(x)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        fused_res.tune(model, x)
    assert user_timings.files() == []


def test_nothing_is_measured_in_a_forward(monkeypatch):
    model, x = fused(net()), torch.randn(SHAPE)

    def never(*args):
        raise AssertionError("measured in a forward")

    for name in ("_clock", "_time", "_measure"):
        monkeypatch.setattr(tuning, name, never)
    with pytest.raises(AssertionError, match="measured"):
        fused_res.tune(model, x)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
    model(x.requires_grad_()).sum().backward()
    assert user_timings.files() == []


# --- what is said


def test_each_distinct_call_is_logged_once(said):
    model, x = fused(net()), torch.randn(SHAPE)
    messages = said(lambda: [(model(x), inference_conv.forget()) for _ in range(3)])
    assert len(messages) == CALLS
    assert messages[0].startswith(
        "conv_bn_act 2x16x9x11 to 16, 3x3 stride 1x1 padding 1x1, relu, float32 NCHW runs "
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)  # what is logged at run time is of sizes; nothing breaks the graph
    assert all("s0" not in m for m in messages)


def test_where_there_is_no_kernel_the_reason_is_logged(said, monkeypatch):
    monkeypatch.setitem(backends.STATUS, "cpu", "_C.abi3.so was not built")
    messages = said(fused(net()), torch.randn(SHAPE))
    assert set(how(messages)) == {"eager"}
    assert why(messages) == {"no fused kernel is preferred for torch.float32 on 'cpu'"}


def test_doctor_tells_of_the_table():
    path = user_timings.path_of(user_timings.made_by(torch.device("cpu")))
    text = doctor.render(doctor.report())
    assert f"cpu: conv_bn_act: not tuned (fused-res tune MODEL --shape ... would write {path})" in (
        text
    )
    fused_res.tune(net(), torch.randn(SHAPE))
    make_fastest("winograd2")
    text = doctor.render(doctor.report())
    assert (
        f"cpu: conv_bn_act: auto takes what was measured for {CALLS} calls: {WINOGRAD} by "
        f"winograd2, {CALLS - WINOGRAD} by direct ({path})"
    ) in text


def test_where_the_cache_is():
    home = os.path.expanduser("~")
    for variables, expected in [
        ({}, os.path.join(home, ".cache", "fused_res")),
        ({"XDG_CACHE_HOME": "/x"}, "/x/fused_res"),
        ({"XDG_CACHE_HOME": "/x", "FUSED_RES_CACHE": "/y"}, "/y"),
        ({"FUSED_RES_CACHE": "~/z"}, os.path.join(home, "z")),
        ({"FUSED_RES_CACHE": ""}, os.path.join(home, ".cache", "fused_res")),
    ]:
        assert env.read(variables).cache == expected


# --- the command

FILE = """
from torch import nn
from fused_res.reference import ResBlock

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), ResBlock(16, 16))

made = net()

def broken():
    raise OSError("no checkpoint")
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    return path


def test_command_in_a_process_of_its_own(model_file, said, cache):
    found = subprocess.run(
        [sys.executable, "-m", "fused_res", "tune", f"{model_file}:net", "--shape", "1x3x9x9"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].split()[0] == "convolution" and lines[-1] == f"wrote {the_file()}"
    assert len(lines) == 2 + 3 + 1 and "1x3x9x9 to 16, 3x3 stride 1x1 padding 0x0" in lines[2]
    assert "tune: 3 of 3: " in found.stderr
    # this process reads what that one wrote
    model = nn.Sequential(ResBlock(16, 16)).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 16, 7, 7).to(memory_format=torch.channels_last)
    assert why(said(fused(model), x)) == {"tuned"}


def test_command_lists_and_clears(model_file, capsys, cache):
    run = ["tune", f"{model_file}:made", "--shape", "1x3x9x9", "--no-channels-last"]
    assert cli.main([*run, "--dtype", "float64", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "nothing to choose: float64 runs in one way here\n"
    assert cli.main(run) == 0
    assert "float32 NCHW" in capsys.readouterr().out
    other = the_file().with_name("tuned-Z80-00000000.json")
    other.write_text(the_file().read_text().replace(user_timings.processor(), "Z80"))
    assert cli.main(["tune", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2 and lines[0].endswith("yes") and lines[1].endswith("no")
    assert "Z80" in lines[1]
    assert cli.main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out.count("removed ") == 2
    assert user_timings.files() == [] and os.listdir(cache) == []
    assert cli.main(["tune", "--list"]) == 0 and capsys.readouterr().out.count("\n") == 2


def test_command_errors_are_one_line(model_file, capsys):
    def fails(*argv):
        with contextlib.suppress(SystemExit):  # argparse's own
            assert cli.main(["tune", *argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("fused-res tune: error: ")
        return lines[-1]

    shape = ["--shape", "1x3x9x9"]
    assert "MODEL and --shape must be given" in fails()
    assert "MODEL and --shape must be given" in fails(f"{model_file}:net")
    assert "'1,3' must be sizes as in 1x3x224x224" in fails("a:b", "--shape", "1,3")
    assert "MODEL 'resnet18' must be torchvision:NAME" in fails("resnet18", *shape)
    assert "No module named 'nonesuch'" in fails("nonesuch:net", *shape)
    assert "no attribute 'nonesuch'" in fails(f"{model_file}:nonesuch", *shape)
    assert "FileNotFoundError" in fails("/nonesuch.py:net", *shape)
    assert "OSError: no checkpoint" in fails(f"{model_file}:broken", *shape)
    assert "must be or make a module, got dict" in fails("builtins:dict", *shape)
    assert "expected input[1, 4, 9, 9] to have 3 channels" in fails(
        f"{model_file}:net", "--shape", "1x4x9x9"
    )
    assert "nonesuch" in fails(f"{model_file}:net", *shape, "--device", "nonesuch")
    assert "must have a residual block" in fails("torch.nn:Identity", *shape)
    if not torch.cuda.is_available():
        assert "CUDA" in fails(f"{model_file}:net", *shape, "--device", "cuda")


def test_command_without_permission_to_write(model_file, capsys, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    assert cli.main(["tune", f"{model_file}:net", "--shape", "1x3x9x9"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fused-res tune: error: tune could not write ")


def test_tune_keeps_to_the_rule_unless_it_is_clearly_beaten(monkeypatch):
    """On a noisy machine three runs chose three kernels."""
    sizes = (1, 1), (1, 1), (1, 1), 1
    conv = reference.ConvNorm(torch.randn(64, 64, 3, 3), None, *sizes, None)
    x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    call = op.Call(x, conv)
    key = inference_conv.key_of(call)
    rule = inference_conv.expected(call, key)
    other = next(
        n for n, why in inference_conv.why_not(call, "auto").items() if not why and n != rule
    )

    def chosen(faster):
        monkeypatch.setattr(
            tuning, "_time", lambda call, of, seconds: [
                1.0 if c.implementation == rule else 1.0 / faster if c.implementation == other
                else 2.0 for c in of
            ],
        )  # fmt: skip
        row = tuning._measure(key, call, 0.0)
        assert next(iter(row.ms)) == rule
        user_timings.keep(torch.device("cpu"), [row])
        inference_conv.forget()
        assert inference_conv.choose(call, "auto").implementation == inference_conv.taken(row)
        return inference_conv.taken(row)

    assert rule not in ("eager", other)
    assert [chosen(faster) for faster in (1.02, 1.05)] == [rule, other]


def test_tune_repeats_until_its_minimum_settles(monkeypatch):
    """One run in ten is undisturbed: the minimum of a few runs would be anything."""
    monkeypatch.setattr(tuning, "ROUNDS", (3, 3))
    busy = [90.0, 70.0, 50.0, 1.0, 30.0, 1.01, *[9.0] * 9]
    seconds = {"quiet": iter([1.0] * 100), "busy": iter([9.0, *busy])}  # the first: for its cost
    monkeypatch.setattr(tuning, "_clock", lambda run, device: next(seconds[run()]))
    makers = {name: lambda name=name: lambda: name for name in seconds}
    assert tuning._time_in_turns(makers, [torch.zeros(1)], 0.0) == [1000.0, 1000.0]
