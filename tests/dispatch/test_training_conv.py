"""Which convolutions of a block in training run in Triton: the tables, their precedence,
``fused_res.tune(..., train=True)`` and its command. Kernels run in Triton's interpreter."""

import copy
import json
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_res
from fused_res import FusedResBlock, cli
from fused_res.cli import doctor
from fused_res.dispatch import (
    backends,
    inference_conv,
    shipped_timings,
    training_conv,
    tuning,
    user_timings,
)
from fused_res.dispatch.shipped_timings import Row
from fused_res.ops import conv_halo
from fused_res.reference import ResBlock

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on a GPU here: make gpu", allow_module_level=True)

from fused_res.dispatch.training_conv_candidates import Steps, values
from fused_res.kernels import conv_tiles, training_convolution

CPU = torch.device("cpu")
SHAPE = 2, 8, 6, 5
CALLS = 9  # of `net`: forward the first block's two are alike
TIMES = {"eager": 3.0, "triton": 1.0}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends.STATUS, "triton", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "triton", ("cpu",))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def shipped(monkeypatch):
    """Sets the rows of measured.json, in the first of which bn_act is fastest in Triton."""

    def clear():
        for cached in (shipped_timings.knows, shipped_timings.verdict):
            cached.cache_clear()
        inference_conv.forget()

    def use(*rows):
        of = "cpu", "cpu", "bn_act", "float32"
        ms = {"eager": 2.0, "triton": 1.0}
        bn_act = [Row(*of, layout, SHAPE, ms) for layout in ("NCHW", "channels_last")]
        monkeypatch.setattr(shipped_timings, "rows", lambda: (*bn_act, *rows))
        clear()

    use()
    yield use
    monkeypatch.undo()
    clear()


@pytest.fixture
def timed(monkeypatch):
    """Nothing is measured: Triton takes the milliseconds given, in one configuration longer."""

    def use(own=1.0, aten=3.0, slower=lambda name: False):
        def time(makers, inputs, seconds):
            names = list(makers)
            return [aten, *(own + slower(name) for name in names[1:])]

        monkeypatch.setattr(tuning, "_time_in_turns", time)

    use()
    return use


@pytest.fixture
def said(monkeypatch, caplog):
    """Trains for a step and returns what is logged of the convolutions."""

    def run(model, x):
        monkeypatch.setattr(backends, "_logged", set())
        inference_conv.forget()
        caplog.clear()
        with caplog.at_level(logging.INFO, "fused_res"):
            model(x.requires_grad_()).sum().backward()
        return [m for m in caplog.messages if m.startswith(training_conv.OP)]

    return run


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def net():
    """Two blocks, the second with a projection."""
    return nn.Sequential(ResBlock(8, 8), ResBlock(8, 12, stride=2))


def fused(model):
    model = copy.deepcopy(model)
    fused_res.fuse_(model)
    return model.train()


def own(messages):
    """Of each convolution whether Triton runs it."""
    runs = [re.search(r" runs (a fused kernel|ATen's convolution): ", m) for m in messages]
    return [found.group(1) == "a fused kernel" for found in runs]


def why(messages):
    return {re.search(r" runs [A-Za-z' ]+: (\w+)", m).group(1) for m in messages}


# --- the choice


def test_cudnn_where_nothing_is_known(said):
    messages = said(fused(net()), image(*SHAPE))
    assert len(messages) == CALLS and not any(own(messages))
    assert "was not measured on cpu" in messages[0]


def test_what_is_measured_is_written_and_followed(said, timed, monkeypatch):
    model, x = net(), image(*SHAPE)
    rows = fused_res.tune(model, x, train=True).rows
    assert len(rows) == CALLS and all(row.ms == TIMES for row in rows)
    (path,) = user_timings.files()
    found = json.loads(path.read_text())
    for row in found["rows"]:
        if "relu and sums" in row["like"]:
            row["ms"]["triton"] = 2.95  # too little
    path.write_text(json.dumps(found))
    user_timings.forget()  # as a new process
    ran = []
    for name in ("convolve", "input_gradient"):
        real = getattr(training_convolution, name)

        def spy(x, conv, *args, name=name, real=real):
            ran.append((name, tuple(conv.weight.shape), tuple(conv.stride), args[-1]))
            return real(x, conv, *args)

        monkeypatch.setattr(training_convolution, name, spy)
    messages = said(fused(model), x)
    assert why(messages) == {"tuned"}
    assert [m for m, mine in zip(messages, own(messages), strict=True) if not mine] == [
        m for m in messages if "relu and sums" in m
    ]
    assert "runs a fused kernel: tuned: 1 ms, 3.00x PyTorch" in messages[0]
    # in the fused order of the blocks: forward, then backward
    wide, narrow, point = (12, 8, 3, 3), (8, 8, 3, 3), (12, 8, 1, 1)
    assert [(name, *sizes) for name, *sizes, _ in ran] == [
        ("convolve", narrow, (1, 1)),
        ("convolve", narrow, (1, 1)),
        ("convolve", wide, (2, 2)),
        ("convolve", (12, 12, 3, 3), (1, 1)),
        ("convolve", point, (2, 2)),
        ("input_gradient", wide, (2, 2)),
        ("input_gradient", point, (2, 2)),
        ("input_gradient", narrow, (1, 1)),
    ]


def test_the_fastest_configuration_runs(said, timed, monkeypatch):
    kinds = [c.kind for c in conv_tiles.CONFIGS]
    best = conv_tiles.CONFIGS[kinds.index("pointer") + 1]
    timed(slower=lambda name: str(best) not in name)
    block, x = nn.Sequential(ResBlock(8, 8, kind="single")), image(*SHAPE)
    rows = fused_res.tune(block, x, train=True).rows
    assert [row.config for row in rows] == [best._asdict()] * 2
    given, real = [], training_convolution._run

    def spy(*args):
        given.append(args[-1])
        return real(*args)

    monkeypatch.setattr(training_convolution, "_run", spy)
    assert own(said(fused(block), x)) == [True, True]
    assert given == [best, best]
    # one that is there no longer: the best guess
    (path,) = user_timings.files()
    path.write_text(path.read_text().replace('"M": 128', '"M": 7'))
    user_timings.forget()
    assert own(said(fused(block), x)) == [True, True] and given[2:] == [None, None]


def test_precedence(said, timed, shipped):
    block, x = nn.Sequential(ResBlock(8, 8, kind="single")), image(*SHAPE)
    ours = fused(block)
    rows = fused_res.tune(block, x, train=True).rows
    n, *sizes = rows[0].shape
    near = [
        row._replace(device="cpu", isa="cpu", shape=(2 * n, *sizes), ms={"eager": 2.0, "triton": t})
        for row, t in zip(rows, (1.0, 4.0), strict=True)
    ]
    shipped(*near)
    messages = said(ours, x)
    assert own(messages) == [True, True] and why(messages) == {"tuned"}
    for path in user_timings.files():
        path.unlink()
    user_timings.forget()
    messages = said(ours, x)
    assert own(messages) == [True, False] and why(messages) == {"measured"}
    assert "measured: triton 2.00x PyTorch at 4x8x6x5x8 3x3 stride 1x1" in messages[0]
    # of another direction, end, size or kind nothing is known
    messages = said(fused(nn.Sequential(ResBlock(8, 8))), x)
    assert own(messages) == [True, False, False] and "was not measured" in messages[2]
    assert own(said(ours.eval().train(), image(2, 8, 2, 5))) == [False, False]
    with fused_res.backend("triton"):
        messages = said(ours, x)
    assert own(messages) == [True, True] and why(messages) == {"the"}
    shipped()
    assert own(said(ours, x)) == [False, False]


def test_cudnn_runs_what_triton_cannot(said, timed):
    block, x = nn.Sequential(ResBlock(8, 8, kind="single")), torch.randn(2, 8, 4, 4)
    assert fused_res.tune(block, x, train=True).rows == []
    messages = said(fused(block), x)
    assert own(messages) == [False] * 2 and "x is not channels_last" in messages[0]
    block = nn.Sequential(ResBlock(8, 8, groups=2))
    assert fused_res.tune(block, image(*SHAPE), train=True).rows == []
    for name in ("auto", "triton"):
        with fused_res.backend(name):
            (message, *_) = said(fused(block), image(*SHAPE))
        assert "runs ATen's convolution: the convolution has groups" in message


def test_a_named_backend_runs_triton_where_the_inside_of_a_block_lets_it(monkeypatch):
    """Whatever the layout of the block's input."""
    ran, real = [], training_convolution.convolve
    monkeypatch.setattr(training_convolution, "convolve", lambda *a: ran.append(a[1]) or real(*a))
    block = FusedResBlock(8, 8).to(memory_format=torch.channels_last)
    with fused_res.backend("triton"):
        block(torch.randn(2, 8, 3, 3))
    assert len(ran) == 1


def test_sizes_that_do_not_fit():
    block = fused(nn.Sequential(ResBlock(8, 8)))
    with fused_res.backend("triton"):
        assert block(image(0, 8, 6, 5)).shape == (0, 8, 6, 5)
        with pytest.raises(RuntimeError, match="to have 8 channels, but got 7 channels instead"):
            block(image(2, 7, 6, 5))
        block[0].conv1.padding = block[0].conv2.padding = (0, 0)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than"):
            block(image(2, 8, 3, 4))
        block[0].conv1.stride = (0, 0)
        with pytest.raises(RuntimeError, match="non-positive stride is not supported"):
            block(image(2, 8, 6, 5))


def test_a_frozen_norm_is_another_call(timed):
    block = nn.Sequential(ResBlock(8, 8)).train()
    block[0].bn1.eval()
    likes = [row.like for row in fused_res.tune(block, image(*SHAPE), train=True).rows]
    assert [like.partition("padding 1x1, ")[2].partition(", tf32")[0] for like in likes] == [
        "forward, frozen norm",
        "backward, add",
        "forward, statistics",
        "backward, relu",
    ]


def test_inference_does_not_go_by_it(timed, monkeypatch):
    fused_res.tune(net(), image(*SHAPE), train=True)
    assert inference_conv.knows(CPU) == shipped_timings.knows(CPU, inference_conv.OP)
    monkeypatch.setattr(user_timings, "devices", lambda: [torch.device("cpu")])
    assert "cpu: conv_bn_act: not tuned (fused-res tune MODEL" in doctor.render(doctor.report())


# --- what is timed


CASES = {
    "statistics": (False, (16, 8, 3, 3), 2, training_conv.STATISTICS),
    "frozen norm": (False, (16, 8, 1, 1), 1, training_conv.FROZEN),
    "relu": (True, (16, 8, 3, 3), 1, training_conv.RELU),
    "relu, strided": (True, (16, 8, 3, 3), 2, training_conv.RELU),
    "relu, frozen": (True, (16, 8, 1, 1), 1, training_conv.FROZEN_RELU),
    "nothing": (True, (16, 8, 3, 3), 2, ""),
    "add": (True, (16, 8, 1, 1), 1, training_conv.ADD),
    "add in place": (True, (16, 8, 1, 1), 2, training_conv.ADD_IN_PLACE),
}


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_timed_is_the_same(case, monkeypatch):
    """cuDNN, and Triton in every configuration."""
    ran, real = set(), training_convolution._run
    monkeypatch.setattr(training_convolution, "_run", lambda *a: ran.add(a[-1]) or real(*a))
    backward, weight, stride, end = CASES[case]
    pad = (weight[2] // 2,) * 2
    numbers = (stride,) * 2, pad, (1, 1), 1, True
    call = training_conv.Call(CPU, torch.float32, SHAPE, True, weight, *numbers, backward, end)
    wanted = None
    aten, *fused = Steps(call, values(call, "cpu")).candidates()
    for choice in (aten, *fused):
        steps = Steps(call, values(call, "cpu"))
        found = steps.run(choice)
        wanted = wanted or found
        assert found.keys() == wanted.keys() and found["y"].shape == wanted["y"].shape
        for name, t in found.items():
            torch.testing.assert_close(
                t, wanted[name], rtol=1e-3, atol=1e-3, msg=f"{name} {choice}"
            )
    configs = {conv_tiles.CONFIGS[choice - training_conv.TRITON - 1] for choice in fused}
    assert ran == configs and len(ran) > 2


def test_tune_runs_all_of_it(monkeypatch):
    ran, real = [], Steps.run
    monkeypatch.setattr(Steps, "run", lambda *args: ran.append(args[1]) or real(*args))
    clock = iter(range(1, 99))
    monkeypatch.setattr(tuning, "_clock", lambda run, device: next(clock))
    block = nn.Sequential(ResBlock(8, 8, kind="single"))
    report = fused_res.tune(block, image(*SHAPE), train=True)
    assert len(report.rows) == 2 and report.chosen == ["eager", "eager"]
    assert "2x8x6x5 to 8, 3x3 stride 1x1 padding 1x1, backward, add, " in str(report)
    assert ran.count(training_conv.ATEN) == 2 and len(ran) == 2 * (
        1 + len(set(ran) - {training_conv.ATEN})
    )


# --- the model


def test_the_model_is_as_it_was(timed):
    model = net().eval()
    model[0].bn1.weight.grad = torch.ones(8)
    model[1].conv1.weight.requires_grad_(False)
    model.append(nn.Dropout())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    of_parts = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    parameters, x = dict(model.named_parameters()), image(*SHAPE)
    copied, generator = x.clone(), torch.get_rng_state()
    assert len(fused_res.tune(model, x, train=True).rows) == CALLS
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(x, copied)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name
    for name, p in model.named_parameters():
        assert p is parameters[name] and (p.grad is None) == (name != "0.bn1.weight")
        assert p.requires_grad == (name != "1.conv1.weight")
    assert torch.equal(model[0].bn1.weight.grad, torch.ones(8))
    assert of_parts == [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    assert backends.named() == "auto" and training_conv._recorded is None


def test_autocast(timed):
    with torch.autocast("cpu", torch.bfloat16):
        rows = fused_res.tune(nn.Sequential(ResBlock(8, 16)), image(*SHAPE), train=True).rows
    assert {row.dtype for row in rows} == {"bfloat16"} and len(rows) == 6
    assert not any("tf32" in row.like for row in rows)


def test_errors(timed, monkeypatch):
    with pytest.raises(ValueError, match="must have a residual block that can be fused"):
        fused_res.tune(nn.Conv2d(8, 8, 1), image(*SHAPE), train=True)
    with pytest.raises(ValueError, match="example must be what model takes"):
        fused_res.tune(net(), image(2, 7, 6, 5), train=True)
    assert training_conv._recorded is None
    assert fused_res.tune(net().double(), image(*SHAPE).double(), train=True).rows == []


# --- the command


FILE = """
from torch import nn
from fused_res.reference import ResBlock

net = nn.Sequential(ResBlock(8, 8, kind="single"))
"""


def test_command(timed, monkeypatch, capsys, tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    command = ["tune", "--train", f"{path}:net", "--shape", "2x8x6x5"]
    assert cli.main(command) == 0
    out = capsys.readouterr()
    assert out.out.count(" backward, add") == 1 and f"wrote {user_timings.files()[0]}" in out.out
    assert "tune: 2 of 2: " in out.err
    nothing = "nothing to choose: "
    assert cli.main([*command, "--no-channels-last"]) == 0
    assert capsys.readouterr().out == f"{nothing}no convolution of its blocks has a fused kernel\n"
    assert cli.main([*command, "--dtype", "float64"]) == 0
    assert capsys.readouterr().out.startswith(f"{nothing}no fused kernel can run blocks in tra")
    monkeypatch.setitem(backends.DEVICE_TYPES, "triton", ("cuda", "xpu"))
    assert cli.main(command) == 0
    assert capsys.readouterr().out == (
        f"{nothing}on a CPU fixed rules say which convolutions of training are native\n"
    )


# --- convolutions of few channels in CUDA C++


@pytest.fixture
def halo(monkeypatch):
    """The ops of ``conv_halo``, computed here; lists which of them ran."""
    ran, ops = [], torch.library.Library("fused_res", "IMPL")

    def statistics(x, weight, bias, tf32):
        ran.append("forward")
        y = F.conv2d(x, weight, bias, padding=weight.size(2) // 2)
        mean, m2 = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0) * y[:, 0].numel()
        count = torch.full_like(mean, y[:, 0].numel())
        return y.contiguous(memory_format=torch.channels_last), torch.stack((mean, m2, count))[None]

    def gradient(dy, weight, a, stats, tf32):
        ran.append("backward")
        mean, _, center, scale, shift = (s[None, :, None, None] for s in stats)
        g = F.conv_transpose2d(dy, weight, padding=weight.size(2) // 2)
        g = g * ((a - center) * scale + shift > 0)
        partial = torch.stack((g.sum((0, 2, 3)), (g * (a - mean)).sum((0, 2, 3))))[None]
        return g.contiguous(memory_format=torch.channels_last), partial

    ops.impl("conv_halo_statistics", statistics, "CPU")
    ops.impl("conv_halo_gradient", gradient, "CPU")
    monkeypatch.setattr(conv_halo, "trains", lambda x, conv: conv_halo.unsuited(conv) is None)
    yield ran
    ops._destroy()


def test_conv_halo_runs_where_it_is_the_fastest(halo, said, timed):
    timed(slower=lambda name: "conv_halo" not in name)
    model, x = nn.Sequential(ResBlock(8, 8), ResBlock(8, 12, stride=2)), image(*SHAPE)
    rows = fused_res.tune(model, x, train=True).rows
    with_halo = [row for row in rows if "conv_halo" in row.ms]
    # 3x3 of stride 1, forward; backward past a ReLU
    assert len(with_halo) == 4 and all(row.ms["conv_halo"] == 1.0 for row in with_halo)
    halo.clear()
    plain = copy.deepcopy(model).train()
    ours = fused(model)
    y = plain(x)
    exact = torch.autograd.grad(y, list(plain.parameters()), torch.ones_like(y))
    messages = said(ours, x.clone())
    assert why(messages) == {"tuned"} and all(own(messages))
    assert halo == ["forward"] * 3 + ["backward"] * 2
    for p, g in zip(ours.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_conv_halo_that_was_measured_nearby_and_cannot_run(halo, said, timed, monkeypatch):
    timed(slower=lambda name: "conv_halo" not in name)
    model, x = nn.Sequential(ResBlock(8, 8)), image(*SHAPE)
    fused_res.tune(model, x, train=True)
    halo.clear()
    monkeypatch.setattr(conv_halo, "trains", lambda x, conv: False)
    messages = said(fused(model), x)
    assert all(own(messages)) and not halo
