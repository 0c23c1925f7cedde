"""``fused-res train`` and ``fused-res evaluate``, as a user calls them."""

import argparse
import copy
import json
import math
import os
import random
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_commands import failed, same, train

import fused_res.train.evaluate
from fused_res import cli, models
from fused_res.train import checkpoint, data, engine, report
from fused_res.train.settings import Settings

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

# Each system of the source texts, as small as it may be.
SEEDS = {
    "plain_block": ["width=8"],
    "two_blocks": ["width=4"],
    "resnet18_cifar": ["width=8"],
    "resnet": ["width=8", "kind=bottleneck", "counts=1,2"],
    "bn_block": ["width=8"],
    "concat_block": ["width=8"],
    "projection_block": ["width=8"],
    "deep_cnn": [],
    "net": [],
    "net_functional": [],
    "net_width": ["n_chans1=24"],
    "net_dropout": [],
    "net_batchnorm": [],
    "net_depth": [],
    "net_res": [],
    "net_res_deep": ["n_blocks=12"],
}
TINY = ["resnet", "--model-arg", "counts=1,1", "--model-arg", "width=8", "--size", "8",
        "--images", "48", "--batch-size", "16", "--epochs", "2"]  # fmt: skip


PAGE = report.page


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(report, "page", lambda records: "")


def weights(out, net="fused", part="model"):
    return checkpoint.load(out / "last.pt")["nets"][net][part]


def records(out, event):
    return [r for r in report.read_log(out / "log.jsonl") if r["event"] == event]


# --- every model


@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_trains_is_saved_and_evaluated(name, tmp_path, capsys):
    arguments = [word for argument in SEEDS[name] for word in ("--model-arg", argument)]
    out = train(
        tmp_path / "out", name, *arguments, "--compare", "--images", "16", "--batch-size", "8",
        "--epochs", "1", "--classes", "3,5,7",
    )  # fmt: skip
    text = capsys.readouterr().out
    for net in ("fused", "plain"):
        assert f"\n{net} " in text
    ends = {r["net"]: r for r in records(out, "end")}
    (start,) = records(out, "start")
    assert start["nets"]["fused"]["parameters"] == start["nets"]["plain"]["parameters"]
    assert not start["nets"]["plain"]["fused"]
    for net, flags in {"fused": [], "plain": ["--plain"]}.items():
        assert cli.main(["evaluate", str(out / "last.pt"), "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["net"] == net
        assert found["validation"]["confusion"] == ends[net]["confusion"]
        assert found["training"]["accuracy"] == ends[net]["train_accuracy"]
    arguments = torch.load(out / "best.pt", weights_only=True)["arguments"]
    models.create(name, **arguments).load_state_dict(weights(out))  # as any state_dict


def test_blocks_of_a_model_of_ones_own_are_fused(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(
        "from torch import nn\n"
        "from fused_res.reference import ResBlock\n"
        "def net(num_classes, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), ResBlock(width, width),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))\n"
    )
    out = train(tmp_path / "out", f"{source}:net", "--model-arg", "width=9", "--compare", *TINY[5:])
    (start,) = records(out, "start")
    assert start["nets"]["fused"]["fused"] == ["1"] and start["nets"]["plain"]["fused"] == []
    assert weights(out)["0.weight"].shape == (9, 3, 3, 3)
    mine = ["--model", f"{source}:net", "--model-arg", "width=9"]
    assert cli.main(["evaluate", str(out / "best.pt"), *mine]) == 0


def test_it_learns(tmp_path):
    out = train(tmp_path / "out", "net_res", "--epochs", "4", "--lr", "0.02", "--augment",
                "--no-flip", "--crop", "1")  # fmt: skip
    (end,) = records(out, "end")
    assert end["val_accuracy"] > 0.7 and end["train_accuracy"] > 0.7
    assert sum(map(sum, end["confusion"])) == 360
    assert sum(row[i] for i, row in enumerate(end["confusion"])) == 360 * end["val_accuracy"]


# --- the arithmetic


def reference(pictures, flags):
    """Two steps on all images, in the words of PyTorch's documentation."""
    mean, std = (t.view(3, 1, 1) for t in data.statistics(pictures.train_images))
    x, y = (pictures.train_images / 255 - mean) / std, pictures.train_labels
    torch.manual_seed(0)
    model = models.create("net_width", fused=False)
    if flags.get("optimizer") == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.1, weight_decay=flags.get("weight-decay", 0)
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=flags.get("momentum", 0.9),
            weight_decay=flags.get("weight-decay", 0),
        )  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(flags.get("amp"))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y, label_smoothing=flags.get("label-smoothing", 0.0))
        if "l2" in flags:
            loss = loss + flags["l2"] * sum(p.pow(2.0).sum() for p in model.parameters())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if "clip-grad" in flags:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), flags["clip-grad"])
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
    return model.state_dict(), average.state_dict()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"momentum": 0, "weight-decay": 0.1},
        {"optimizer": "adamw", "weight-decay": 0.1},
        {"label-smoothing": 0.2, "l2": 0.01, "grad-accumulation": 2},
        {"clip-grad": 0.05, "grad-accumulation": 3},
        {"amp": "bf16", "ema": 0.5},
        {"amp": "fp16", "clip-grad": 0.05},
        {"ema": 0.5, "momentum": 0.5},
    ],
    ids=lambda flags: "-".join(flags) or "default",
)
def test_two_steps_are_pytorchs(flags, tmp_path):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    batch = 24 // flags.get("grad-accumulation", 1)
    out = train(tmp_path, "net_width", "--images", "24", "--batch-size", str(batch), "--epochs",
                "2", "--lr", "0.1", *words)  # fmt: skip
    pictures = data.load(images=24)
    expected, average = reference(pictures, flags)
    # Adam divides by the gradient's size; 16-bit gradients are rounded in another order
    large = 2e-3 if "amp" in flags else 2e-4 if "optimizer" in flags else 1e-5
    tolerance = {"rtol": 1e-4, "atol": large}
    torch.testing.assert_close(weights(out), expected, **tolerance)
    torch.manual_seed(0)
    before = models.create("net_width").state_dict()
    assert not same(before, weights(out))
    if "ema" in flags:
        torch.testing.assert_close(weights(out, part="average"), average, **tolerance)
    else:
        assert weights(out, part="average") is None


def test_accumulated_batches_are_one(tmp_path):
    argv = ["net_res", "--images", "80", "--epochs", "1", "--seed", "3"]
    two = train(tmp_path / "2", *argv, "--batch-size", "8", "--grad-accumulation", "2")
    one = train(tmp_path / "1", *argv, "--batch-size", "16")
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-6)
    # the last step of an epoch takes what is left: 10 batches by 4, 4 and 2
    train(tmp_path / "4", *argv, "--batch-size", "8", "--grad-accumulation", "4")
    assert (
        checkpoint.load(tmp_path / "4" / "last.pt")["nets"]["fused"]["schedule"]["last_epoch"] == 3
    )


LR, STEPS, EPOCHS = 0.4, 3, 4


def onecycle(epoch):
    optimizer = torch.optim.SGD([torch.zeros(1)], LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, epochs=EPOCHS, steps_per_epoch=STEPS, pct_start=0.25, cycle_momentum=False
    )
    for _ in range(STEPS * epoch):
        optimizer.step()
        schedule.step()
    return schedule.get_last_lr()[0]


SCHEDULES = {
    "none": ([], lambda epoch: LR),
    "cosine": ([], lambda epoch: LR * (1 + math.cos(math.pi * epoch / 4)) / 2),
    "step": ([], lambda epoch: LR * (1 if epoch < 2 else 0.1 if epoch < 3 else 0.01)),
    "onecycle": (["--warmup", "1"], onecycle),
    "cosine after warmup": (
        ["--warmup", "1"],
        lambda epoch: LR * (1 + math.cos(math.pi * (epoch - 1) / 3)) / 2,
    ),
    "none after warmup": (["--warmup", "2"], lambda epoch: LR if epoch > 1 else LR * 4 / 7),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, tmp_path):
    words, rate = SCHEDULES[name]
    out = train(
        tmp_path, *TINY[:-1], str(EPOCHS), "--schedule", name.split()[0], "--lr", str(LR), *words
    )
    found = [r["learning_rate"] for r in records(out, "epoch")]
    expected = [rate(epoch) for epoch in range(1, EPOCHS + 1)]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


# --- what else flags do


def test_the_same_command_gives_the_same_weights(tmp_path):
    argv = [*TINY, "--augment", "--dropout", "0.3"]
    first, again = (train(tmp_path / name, *argv, "--seed", "5") for name in "ab")
    assert same(weights(first), weights(again))
    assert records(first, "end") == records(again, "end")
    other = train(tmp_path / "c", *argv, "--seed", "6")
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize(
    "flags",
    [
        ["--augment"],
        ["--dropout", "0.5"],
        ["--no-channels-last"],
        ["--batch-size", "24"],
        ["--amp", "bf16"],
        ["--dtype", "fp16"],
        ["--l2", "0.1"],
        ["--grad-accumulation", "2"],
    ],
    ids=" ".join,
)
def test_flags_change_the_numbers(flags, tmp_path):
    out = train(tmp_path / "out", *TINY, *flags)
    assert not same(weights(out), weights(train(tmp_path / "without", *TINY)))


def test_compared_nets_are_those_trained_alone(tmp_path):
    argv = [*TINY, "--augment", "--dropout", "0.3"]
    both = train(tmp_path / "both", *argv, "--compare")
    for net, flags in {"fused": [], "plain": ["--plain"]}.items():
        alone = train(tmp_path / net, *argv, *flags)
        assert same(weights(alone, net), weights(both, net))
    (first, *_), (second, *_) = (
        [r for r in records(both, "epoch") if r["net"] == net] for net in ("fused", "plain")
    )
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)


def test_compile(tmp_path, monkeypatch):
    compiled, compile = [], nn.Module.compile

    def eagerly(module):
        compiled.append(module)
        compile(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eagerly)
    out = train(tmp_path / "out", *TINY, "--compile")
    assert len(compiled) == 1
    torch.testing.assert_close(weights(out), weights(train(tmp_path / "without", *TINY)))


def test_threads_are_put_back(tmp_path):
    assert torch.get_num_threads() == 1
    out = train(tmp_path, "net", "--images", "8", "--epochs", "1", "--threads", "2")
    assert torch.get_num_threads() == 1
    assert records(out, "start")[0]["device"].endswith("2 threads")


def test_the_best_epoch_is_kept(tmp_path):
    out = train(tmp_path, "net_res", "--images", "64", "--epochs", "6", "--lr", "0.3")
    found = [r["val_accuracy"] for r in records(out, "epoch")]
    best = checkpoint.load(out / "best.pt")
    assert best["best"] == max(found) and best["epoch"] == found.index(max(found)) + 1
    assert checkpoint.load(out / "last.pt")["epoch"] == 6
    assert best["epoch"] < 6, "this test needs a run that gets worse"


@pytest.mark.parametrize("flags, best", [([], 0.8), (["--no-ema"], 0.5)])
def test_evaluate_takes_the_average(flags, best, tmp_path, capsys):
    out = train(tmp_path, *TINY, "--ema", "0.9")
    state = checkpoint.load(out / "last.pt")
    for name, bias in {"model": 3, "average": 5}.items():  # each knows one class alone
        part = state["nets"]["fused"][name]
        key = "fc.bias" if name == "model" else "module.fc.bias"
        part[key] = F.one_hot(torch.tensor(bias), 10) * 1e6
    save(out / "last.pt", state)
    capsys.readouterr()
    assert cli.main(["evaluate", str(out / "last.pt"), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = "3" if flags else "5"
    assert {name for name, right in found["training"]["classes"].items() if right} == {wanted}


def test_evaluate_prints_a_table(tmp_path, capsys):
    out = train(tmp_path, *TINY, "--classes", "3,7")
    capsys.readouterr()
    assert cli.main(["evaluate", str(out / "best.pt"), "--batch-size", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("accuracy on 12 images of validation, 48 images of training")
    assert [line.split()[0] for line in lines[1:]] == ["class", "-----", "all", "3", "7"]


def test_log_and_board(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *args):
            written.append(args)

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    out = train(tmp_path, *TINY, "--ema", "0.9")
    epochs = records(out, "epoch")
    assert [r["epoch"] for r in epochs] == [1, 2] and {r["of"] for r in epochs} == {2}
    (start,) = records(out, "start")
    assert start["data"] == {
        "name": "digits", "classes": list("0123456789"), "train": 48, "val": 12, "size": 8,
    }  # fmt: skip
    assert start["settings"]["batch-size"] == 16 and start["settings"]["lr"] == 0.01
    assert [r["event"] for r in report.read_log(out / "log.jsonl")] == [
        "start", "epoch", "epoch", "end",
    ]  # fmt: skip
    assert written[0] == (out / "tensorboard", 1) and written[-1] == "closed"
    for name in ("loss", "train_accuracy", "val_accuracy_ema", "images_per_second"):
        assert (f"fused/{name}", epochs[1][name], 2) in written


def test_page_and_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "page", PAGE)
    train(tmp_path / "a", *TINY, "--compare")
    found = capsys.readouterr()
    assert found.err.count("\n") == 4 and "epoch 2/2  plain  loss " in found.err
    assert (tmp_path / "a" / "report.html").read_text().startswith("<!doctype html>")
    assert f"{tmp_path}/a/report.html" in found.out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(tmp_path / "b", *TINY)
    found = capsys.readouterr()
    assert "epoch 2/2 fused: " in found.err and " images/s" in found.err
    assert "no report.html" in found.err and "report.html" not in found.out


# --- interrupted and resumed


def interrupt(monkeypatch, owner, name, count):
    """Ctrl-C, when something is called for the ``count``-th time."""
    function, calls = getattr(owner, name), iter(range(count))

    def call(*args, **kwargs):
        next(calls, None)
        if not calls.__length_hint__():
            monkeypatch.setattr(owner, name, function)
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    "owner, name, count",
    [
        (engine.Trainer, "_train_step", 2),
        (engine, "evaluate", 1),
        (engine, "evaluate", 8),  # the last before the end
        (checkpoint, "save", 1),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_interrupted(owner, name, count, tmp_path, capsys, monkeypatch):
    argv = [*TINY, "--compare", "--dropout", "0.3", "--ema", "0.9"]
    whole = train(tmp_path / "whole", *argv)
    handler = signal.getsignal(signal.SIGINT)
    interrupt(monkeypatch, owner, name, count)
    out = train(tmp_path / "out", *argv, code=130)
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"to go on: fused-res train --out {out} --resume\n" in capsys.readouterr().err
    train(out, "--resume")
    for net in ("fused", "plain"):
        assert same(weights(out, net), weights(whole, net))
    assert [r["event"] for r in report.read_log(out / "log.jsonl")].count("resume") == 1
    assert records(out, "end") == records(whole, "end")


def test_a_second_interrupt_does_not_wait(tmp_path, capsys, monkeypatch):
    def twice(*args):
        for _ in range(2):  # to this thread: two to the process may come as one
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine.Trainer, "_train_step", twice)
    # a shell's background jobs, and so their tests, ignore the signal from the start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(tmp_path / "out", *TINY, code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "fused-res train: interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.pt").exists()


def test_what_was_finished_is_resumed_to_the_same(tmp_path, capsys):
    out = train(tmp_path, *TINY)
    before = (out / "last.pt").read_bytes(), records(out, "end")
    capsys.readouterr()
    train(out, *TINY, "--resume")
    assert "\nfused " in capsys.readouterr().out
    assert ((out / "last.pt").read_bytes(), records(out, "end")) == before


def test_resumed_without_its_log(tmp_path, capsys):
    out = train(tmp_path, *TINY)
    (out / "log.jsonl").unlink()
    train(out, "--resume")
    assert [r["event"] for r in report.read_log(out / "log.jsonl")] == ["start", "resume", "end"]


def test_resume_where_nothing_is_yet(tmp_path):
    train(tmp_path / "out", *TINY, "--resume")


def test_where_it_runs_may_change(tmp_path):
    out = train(tmp_path, *TINY)
    train(out, "--resume", "--threads", "1", "--save-every", "7", "--device", "cpu")


def test_overwrite(tmp_path, capsys):
    out = train(tmp_path, *TINY)
    assert f"{out}/last.pt is there: --resume" in failed(capsys, "train", "--out", out, code=2)
    train(out, *TINY, "--seed", "2", "--overwrite")
    assert records(out, "start")[0]["settings"]["seed"] == 2 and len(records(out, "start")) == 1


# --- errors


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lr", "0.2"], "--lr is 0.2, but {last} was trained with 0.01"),
        (["net"], "MODEL is 'net', but {last} was trained with 'resnet'"),
        (["--no-flip"], "--flip is False, but {last} was trained with True"),
        (["--classes", "1,2"], "--classes is ('1', '2'), but {last} was trained with None"),
        (["--model-arg", "width=9"], "--model-arg is (('width', 9),), but {last} was trained with"),
        (["--overwrite"], "--resume and --overwrite must not be given together"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resumed_with_other_settings(flags, words, tmp_path, capsys):
    out = train(tmp_path, *TINY)
    text = failed(capsys, "train", *flags, "--out", out, "--resume", code=2)
    assert words.format(last=out / "last.pt") in text


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["resnet21"], 2, "'resnet21' is not a model: did you mean "),
        (["net", "--model-arg", "depth=3"], 2, "model 'net' takes no argument depth; it takes"),
        (["net", "--dropout", "0.1"], 2, "model 'net' takes no argument dropout"),
        (["net", "--model-arg", "depth"], 2, "--model-arg: 'depth' must be key=value"),
        (["net", "--size", "8"], 2, "MODEL net does not take images of (3, 8, 8): "),
        (["nowhere:net"], 2, "MODEL 'nowhere:net': ModuleNotFoundError"),
        (["torch.nn:Flatten"], 2, "must give (2, 10) for 2 images, gave (2, 3072)"),
        (["--compare", "--plain"], 2, "--compare and --plain must not be given together"),
        (["--warmup", "3", "--epochs", "3"], 2, "--warmup 3 must be less than --epochs 3"),
        (["--lr", "-1"], 2, "--lr: '-1' must be a number at least 0"),
        (["--clip-grad", "0"], 2, "--clip-grad: '0' must be a number above 0"),
        (["--ema", "1.5"], 2, "--ema: '1.5' must be a number at least 0 and at most 1"),
        (
            ["--seed", str(2**63)],
            2,
            "--seed: '9223372036854775808' must be a whole number at",
        ),
        (["--epochs", "two"], 2, "--epochs: 'two' must be a whole number at least 1"),
        (["--classes", "1,x"], 1, "no 'x' in digits"),
        (["--data", "nowhere"], 1, "nowhere: not a folder"),
        (["net_res", "--images", "64", "--lr", "1e30"], 1, "not finite in epoch 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(argv, code, words, tmp_path, capsys):
    text = failed(capsys, "train", *argv, "--out", tmp_path / "out", code=code)
    assert words in text
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_backend_that_cannot_run(tmp_path, capsys):
    source = tmp_path / "mine.py"
    source.write_text(
        "from torch import nn\n"
        "from fused_res import BackendUnavailable\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        raise BackendUnavailable('backend cannot run')\n"
    )
    text = failed(capsys, "train", f"{source}:Net", "--out", tmp_path / "out")
    assert text == "fused-res train: error: backend cannot run\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, capsys):
    text = failed(capsys, "train", *TINY, "--device", "cuda", "--out", tmp_path, code=2)
    assert "--device cuda: PyTorch finds no GPU" in text


def save(path, state):
    """A checkpoint with something else in it."""
    state = copy.copy(state)
    state["settings"] = vars(state["settings"])
    checkpoint.save(path, state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "page", lambda records: "")
        return train(tmp_path_factory.mktemp("trained"), *TINY)


def test_a_damaged_checkpoint_is_refused(trained, tmp_path, capsys):
    """Every cut, and every byte but those that hold nothing, such as padding."""
    content, path = (trained / "last.pt").read_bytes(), tmp_path / "damaged.pt"
    whole = torch.load(trained / "last.pt", weights_only=True)
    chance, refused = random.Random(0), 0
    for i in range(60):
        damaged = bytearray(content)
        if i % 3:
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(content)) :]
        path.write_bytes(damaged)
        try:
            state = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            state["settings"] = vars(state["settings"])
            assert same(state, whole)
    assert refused > 40
    at = content.index(weights(trained)["fc.weight"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    for command in (["evaluate", path], ["train", "--out", tmp_path, "--resume"]):
        path.rename(tmp_path / "last.pt") if command[0] == "train" else None
        assert "is damaged: the checksum of " in failed(capsys, *command)


def foreign(path, what):
    if what == "legacy":
        torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    elif what == "code":
        torch.save({"format": print}, path)
    elif what == "weights":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        path.write_bytes(b"hello" if what == "text" else b"")


@pytest.mark.parametrize(
    "what, words",
    [
        ("empty", "cannot be read as a checkpoint: BadZipFile: "),
        ("text", "cannot be read as a checkpoint: BadZipFile: "),
        ("legacy", "cannot be read as a checkpoint: BadZipFile: "),
        ("code", "cannot be read as a checkpoint: UnpicklingError: "),
        (
            "weights",
            "is not a checkpoint of fused-res train: key 'format' must be ",
        ),
    ],
)
def test_a_foreign_checkpoint_is_refused(what, words, tmp_path, capsys):
    foreign(tmp_path / "last.pt", what)
    for argv in (["evaluate", tmp_path / "last.pt"], ["train", "--out", tmp_path, "--resume"]):
        assert f"{tmp_path}/last.pt {words}" in failed(capsys, *argv)


def test_no_checkpoint(tmp_path, capsys):
    assert "No such file or directory" in failed(capsys, "evaluate", tmp_path / "none.pt")


def drop(state, *keys):
    for key in keys[:-1]:
        state = state[key]
    del state[keys[-1]]


MODEL = ("nets", "fused", "model")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.update(version=2), "key 'version' is 2, must be 1"),
        (lambda s: drop(s, "ranks"), "key 'ranks' must be a list, is missing"),
        (lambda s: s.update(mean=3), "key 'mean' must be a Tensor, is int"),
        (lambda s: drop(s, "settings", "lr"), "key 'settings' does not fit"),
        (lambda s: drop(s, *MODEL, "fc.bias"), "nets.fused.model.fc.bias is missing"),
        (
            lambda s: s["nets"]["fused"]["model"].update(extra=torch.ones(1)),
            "nets.fused.model.extra is not in the model",
        ),
        (
            lambda s: s["nets"]["fused"]["model"].update({"fc.bias": torch.ones(3)}),
            "nets.fused.model.fc.bias has shape (3,), the model's is (10,)",
        ),
        (
            lambda s: drop(s, "nets", "fused", "optimizer", "param_groups"),
            "nets.fused.optimizer does not fit",
        ),
        (lambda s: drop(s, "nets", "fused", "scaler"), "nets.fused.scaler does not fit"),
        (lambda s: drop(s, "nets", "fused"), "key 'fused' is missing"),
        (lambda s: drop(s, "ranks", 0, "rng"), "key 'rng' is missing"),
        (lambda s: s.update(data="0" * 64), "was trained on other data"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, words, trained, tmp_path, capsys):
    state = torch.load(trained / "last.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "last.pt")
    text = failed(capsys, "train", "--out", tmp_path, "--resume")
    assert words in text and f"{tmp_path}/last.pt" in text
    if "model" in words and "other data" not in words:
        assert words in failed(capsys, "evaluate", tmp_path / "last.pt")


def test_evaluate_without_an_average(trained, capsys):
    text = failed(capsys, "evaluate", trained / "last.pt", "--ema", code=2)
    assert "--ema: " in text and "was trained without" in text


def test_nothing_is_half_written(tmp_path, monkeypatch):
    out = train(tmp_path, *TINY[:-1], "1")
    before = (out / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(out / "last.pt", {})
    assert (out / "last.pt").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt", "last.pt", "log.jsonl", "report.html",
    ]  # fmt: skip


# --- documentation


@pytest.mark.parametrize(
    "module, title",
    [(fused_res.train, "## Flags"), (fused_res.train.evaluate, "## Evaluating")],
    ids=["train", "evaluate"],
)
def test_the_documentation_names_every_flag_and_its_default(module, title):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = text[text.index(title) :].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)[^|]*\|\s*([^|]*?)\s*\|", section, re.MULTILINE))
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    flags = {a.option_strings[0]: a.dest for a in parser._actions if a.option_strings}
    assert rows.keys() - {"MODEL"} == flags.keys()
    for flag, name in flags.items():
        default = getattr(Settings, name, None)
        if isinstance(default, bool):
            assert rows[flag] == ("on" if default else "off")
        elif isinstance(default, str):
            assert rows[flag] == f"`{default}`"
        elif isinstance(default, (int, float)) and module is fused_res.train:
            assert float(rows[flag]) == default
