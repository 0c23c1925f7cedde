"""``fused-res train --cuda-graph`` without a GPU: a stand-in for ``torch.cuda`` runs a step again
where a GPU would replay it."""

import contextlib
import os
import signal
import types

import pytest
import torch
from torch import nn
from train_commands import contents, failed, same, train

from fused_res.cli import CommandError, UsageError
from fused_res.train import engine, graphed, report
from fused_res.train.graphed import WARM_UPS, Graphed
from fused_res.train.place import Place
from fused_res.train.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["resnet", "--model-arg", "counts=1,1", "--model-arg", "width=8", "--size", "8",
        "--images", "80", "--batch-size", "8", "--epochs", "2"]  # fmt: skip


class Cuda:
    """``torch.cuda`` for one net: a step in a capture is only kept, with the learning rates that it
    would read; a replay runs it.

    says: what happened, in order.
    """

    def __init__(self, optimizer, learn):
        self.optimizer, self.does, self.says = optimizer, learn, []
        self.capturing, self.stream_now = False, "main"

    def learn(self, batches, count):
        if self.capturing:
            self.captured = batches, count, [g["lr"] for g in self.optimizer.param_groups]
        else:
            self.says.append(f"step on {self.stream_now}")
            self.does(batches, count)

    def replay(self):
        self.says.append("replay")
        batches, count, rates = self.captured
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.does(batches, count)
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate

    def CUDAGraph(self):
        return self

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.says.append(f"capture on {stream.name}")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def Stream(self):
        return Waits("side", self.says)

    def current_stream(self):
        return Waits("main", self.says)

    @contextlib.contextmanager
    def stream(self, stream):
        self.stream_now = stream.name
        yield
        self.stream_now = "main"


class Waits:
    def __init__(self, name, says):
        self.name, self.says = name, says

    def wait_stream(self, other):
        self.says.append(f"{self.name} waits for {other.name}")


def on_cpu(name, model, optimizer, learn, count):
    cuda = Cuda(optimizer, learn)
    found = Graphed(name, model, optimizer, cuda.learn, count, cuda)
    found.cuda = cuda
    return found


@pytest.fixture
def stand_in(monkeypatch):
    """The trainer's graphs are those of the stand-in, on a CPU; those made."""
    made = []

    def make(*args):
        made.append(on_cpu(*args))
        return made[-1]

    monkeypatch.setattr(graphed, "check", lambda settings, place: None)
    monkeypatch.setattr(engine, "Graphed", make)
    monkeypatch.setattr(report, "page", lambda records: "")
    return made


@pytest.fixture
def toy():
    """A net that a step of one batch of two images trains, and what the steps got."""
    model, got = nn.Linear(3, 2), []
    optimizer = torch.optim.SGD(model.parameters(), 0.5, fused=True)

    def learn(batches, count):
        rate = optimizer.param_groups[0]["lr"]
        got.append((batches[0][0].data_ptr(), batches[0][0].clone(), batches[0][1].clone(), rate))
        for x, _ in batches:
            model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = on_cpu("toy", model, optimizer, learn, 1)
    found.got, found.model, found.optimizer = got, model, optimizer
    return found


def batch(value, images=2):
    return torch.full((images, 3), float(value)), torch.full((images,), value)


def test_eager_steps_on_a_side_stream_then_one_capture_then_replays(toy):
    for i in range(WARM_UPS + 2):
        toy([batch(i)])
    warm_up = ["side waits for main", "step on side", "main waits for side"]
    assert toy.cuda.says == [*warm_up * WARM_UPS, "capture on side", "replay", "replay"]
    assert WARM_UPS >= 3


def test_every_step_reads_its_batch_from_the_same_memory(toy):
    given = [batch(i) for i in range(WARM_UPS + 2)]
    for one in given:
        toy([one])
    assert len({address for address, *_ in toy.got}) == 1
    assert toy.got[0][0] not in {x.data_ptr() for x, _ in given}
    assert same([(x, y) for _, x, y, _ in toy.got], given)


def test_steps_of_another_size_run_eagerly(toy):
    toy([batch(0), batch(1)])  # decides no sizes: it has another number of batches
    for i in range(WARM_UPS + 1):
        toy([batch(i)])
    del toy.cuda.says[:]
    toy([batch(7, images=1)])
    toy([batch(8), batch(9)])
    toy([batch(5)])
    aside = ["side waits for main", "step on side", "main waits for side"]
    assert toy.cuda.says == [*aside, *aside, "replay"]
    assert [x.shape[0] for _, x, *_ in toy.got[-3:]] == [1, 2, 2]
    assert same(toy.got[-1][2], batch(5)[1])


def test_the_learning_rate_is_a_number_between_steps_and_one_tensor_in_them(toy):
    (group,) = toy.optimizer.param_groups
    for i in range(WARM_UPS + 3):
        group["lr"] = 0.5**i
        before = toy.model.bias.detach().clone()
        toy([batch(0)])
        assert group["lr"] == 0.5**i and type(group["lr"]) is float
        torch.testing.assert_close(toy.model.bias.detach(), before - 2 * 0.5**i)
    rates = [rate for *_, rate in toy.got]
    assert all(rate is rates[0] for rate in rates) and rates[0].dtype == torch.float32


def test_a_replay_increases_version_counters(toy):
    for _ in range(WARM_UPS + 1):
        toy([batch(0)])
    toy.cuda.does = lambda *_: None
    before = [p._version for p in toy.model.parameters()]
    toy([batch(0)])
    assert all(p._version > v for p, v in zip(toy.model.parameters(), before, strict=True))


def test_a_step_that_cannot_be_captured(toy):
    for _ in range(WARM_UPS):
        toy([batch(0)])

    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    toy._learn = fail
    with pytest.raises(CommandError, match="a step of the toy net cannot be captured: operation"):
        toy([batch(0)])
    assert toy.optimizer.param_groups[0]["lr"] == 0.5


# --- the trainer


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optimizer", "adamw", "--schedule", "cosine", "--warmup", "1", "--clip-grad", "0.5"],
        ["--compare", "--ema", "0.9", "--l2", "0.01", "--augment", "--schedule", "onecycle"],
        ["--amp", "bf16", "--grad-accumulation", "3", "--schedule", "step", "--momentum", "0"],
    ],
    ids=" ".join,
)
def test_it_trains_as_without(flags, tmp_path, stand_in):
    pytest.importorskip("sklearn")
    theirs, _ = contents(train(tmp_path / "theirs", *TINY, *flags))
    ours, _ = contents(train(tmp_path / "ours", *TINY, *flags, "--cuda-graph"))
    for name, net in theirs["last.pt"]["nets"].items():
        for part in ("model", "average"):
            found = ours["last.pt"]["nets"][name][part]
            torch.testing.assert_close(found, net[part], rtol=1e-4, atol=1e-5)
        assert ours["last.pt"]["nets"][name]["schedule"] == net["schedule"]
    steps = 20 if "--grad-accumulation" not in flags else 6  # and 2 of one batch
    for one in stand_in:
        assert one.cuda.says.count("capture on side") == 1
        assert one.cuda.says.count("replay") == steps - WARM_UPS
        assert one.cuda.says.count("step on side") == WARM_UPS + (2 if steps == 6 else 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_it_is_bit_for_bit_the_same(optimizer, tmp_path, stand_in, monkeypatch):
    pytest.importorskip("sklearn")
    argv = [*TINY, "--cuda-graph", "--optimizer", optimizer, "--compare", "--ema", "0.9",
            "--dropout", "0.2", "--schedule", "cosine"]  # fmt: skip
    whole = train(tmp_path / "whole", *argv)
    step, calls = engine.Trainer._train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        step(*args)

    monkeypatch.setattr(engine.Trainer, "_train_step", interrupted)
    out = train(tmp_path / "out", *argv, code=130)
    train(out, "--resume")
    assert same(contents(out), contents(whole))


# --- what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--device", "cpu"], "needs a GPU: --device cpu is cpu here, must be cuda"),
        (["--amp", "fp16"], "--cuda-graph and --amp fp16 must not be given together"),
        (["--compile"], "--cuda-graph and --compile must not be given together"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_refused(flags, words, tmp_path, capsys):
    argv = ["train", *TINY, "--cuda-graph", *flags, "--out", tmp_path / "out"]
    assert words in failed(capsys, *argv, code=2)
    assert not (tmp_path / "out" / "last.pt").exists()


def test_several_processes_are_refused():
    place = Place(torch.device("cuda", 0), 0, 2)
    graphed.check(Settings(), place)
    graphed.check(Settings(cuda_graph=True), place._replace(world=1))
    with pytest.raises(UsageError, match="--cuda-graph runs in one process: torchrun started 2"):
        graphed.check(Settings(cuda_graph=True), place)


def test_checkpoints_of_before_have_no_such_setting(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(report, "page", lambda records: "")
    out = train(tmp_path, *TINY, "--epochs", "1")
    state = torch.load(out / "last.pt", weights_only=True)
    del state["settings"]["cuda_graph"]
    torch.save(state, out / "last.pt")
    train(out, "--resume")


# --- Triton's kernels


def test_no_kernel_is_compiled_in_a_capture(monkeypatch):
    triton = pytest.importorskip("triton")
    from fused_res.kernels import launch

    ran, capturing = [], False

    class Kernel:
        """Compiles at its first launch, as Triton's do."""

        fn = types.SimpleNamespace(__name__="_toy_kernel")

        def __getitem__(self, grid):
            def launched(**arguments):
                hook = triton.knobs.runtime.jit_cache_hook
                if not ran and hook is not None:
                    fn = types.SimpleNamespace(name="_toy_kernel")
                    hook(key="", repr="", fn=fn, compile={}, already_compiled=False)
                ran.append((grid, arguments["n"]))

            return launched

    monkeypatch.setattr(launch, "GRAPHS", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    kernel, capturing = Kernel(), True
    with pytest.raises(RuntimeError, match="_toy_kernel would be compiled while a CUDA graph is"):
        launch.run(kernel, (1,), 4, n=3)
    assert ran == [] and triton.knobs.runtime.jit_cache_hook is None
    capturing = False
    launch.run(kernel, (1,), 4, n=3)
    capturing = True
    launch.run(kernel, (1,), 4, n=3)
    assert ran == [((1,), 3)] * 2 and triton.knobs.runtime.jit_cache_hook is None
