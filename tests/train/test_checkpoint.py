"""Checkpoints of strangers and folders of others: what must not be run, opened, or written."""

import copy
import functools
import math
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys

import pytest
import torch
from model_libraries import timm  # noqa: F401  with torchvision, before a checkpoint names it
from train_commands import contents, failed, same, train

from fused_res import cli
from fused_res.cli import model as cli_model
from fused_res.train import checkpoint, data, engine, lock, nets, report
from fused_res.train.settings import Settings

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

NET = ["bn_block", "--model-arg", "width=2", "--size", "4", "--images", "8", "--batch-size", "8",
       "--classes", "1,2"]  # fmt: skip
MINE = """
import pathlib
from torch import nn

def net(num_classes, width=4, name=""):
    pathlib.Path(__file__).with_suffix(".ran").touch()
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(report, "page", lambda records: "")
    monkeypatch.setattr(data, "_digits", digits)


digits = functools.cache(data._digits)


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    """No network, no other program."""

    def never(*args, **keywords):
        raise AssertionError(f"{args} was reached")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(os, "system", never)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def trained(request, tmp_path_factory):
    """Runs that are over: to resume them is to look at all of the checkpoint."""
    flags = {
        "sgd": ["--epochs", "1"],
        "adamw": ["--epochs", "2", "--optimizer", "adamw", "--ema", "0.9", "--schedule", "cosine",
                  "--warmup", "1", "--amp", "fp16"],
    }[request.param]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "page", lambda records: "")
        return train(tmp_path_factory.mktemp(request.param), *NET, *flags)


def commands(out):
    return ["train", "--resume", "--out", str(out)], ["evaluate", str(out / "last.pt")]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- every value of a checkpoint


DELETED = object()


def paths(value, path=()):
    """The keys that lead to everything in a checkpoint, of long rows to their ends alone."""
    if path:
        yield path
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
        items = items if len(items) < 30 else [items[0], items[-1]]
    else:
        return
    for key, inner in items:
        yield from paths(inner, (*path, key))


def put(value, path, new):
    """A copy of ``value`` with ``new`` at the end of ``path``."""
    key, *rest = path
    changed = copy.copy(value) if isinstance(value, dict) else list(value)
    if rest or new is not DELETED:
        changed[key] = put(value[key], rest, new) if rest else new
    else:
        del changed[key]
    return changed if isinstance(value, dict) else type(value)(changed)


def get(value, path):
    for key in path:
        value = value[key]
    return value


def hostile(old):
    """Values that no key may have, given the right one."""
    itself = []
    itself.append(itself)
    often = [0]
    for _ in range(50):
        often = [often] * 10
    values = [
        DELETED, "x\ny\x1b[2J", "os:system", -3, 10**400, -(10**400), math.nan, math.inf, -math.inf,
        itself, often, {"a": 1}, b"x", 1j, [[]], torch.ones(7), torch.eye(7).to_sparse(),
        torch.tensor(math.nan).expand(10**9), torch.empty(3, device="meta"),
    ]  # fmt: skip
    if isinstance(old, torch.Tensor):
        values += [None, old[None], old.half(), old.to(torch.complex64)]
        if old.is_floating_point():
            values += [torch.full_like(old, math.nan), torch.full_like(old, -math.inf)]
    elif isinstance(old, (list, tuple, dict)):
        values += [None, 1, type(old)()]
    elif type(old) in (str, int, float):
        values += [[], torch.tensor(1)]
    return values


def is_harmless(where, value):
    """Whether a run may go on with it."""
    if value is DELETED:  # constants that not every version of PyTorch keeps; what one lacks
        constant = r".*\.(schedule|_schedulers\.\d|param_groups\.0|scaler)\.[a-zA-Z]\w*"
        return re.fullmatch(constant + r"|ranks\.0\.rng\.numpy|.*\.optimizer\.state\..*", where)
    if where.endswith("scaler"):  # of a run without one
        return value == {"a": 1}
    if ".optimizer.state" in where:  # as before the first step
        return value is None or value == {}
    return re.fullmatch(r"ranks\.0\.rng\.(python\.2|numpy\.4)", where)  # any number


def test_hostile_values_are_one_line(trained, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in files(trained).items():
        (out / name).write_bytes(content)
    whole = torch.load(trained / "last.pt", weights_only=True)
    chance, tried, refused = random.Random(0), 0, 0
    for path in paths(whole):
        where = ".".join(map(str, path))
        tensors = {"model", "average", "state"} & {*path}
        if (tensors or trained.name.startswith("adamw")) and chance.random() < 0.7:
            continue
        for value in chance.sample(hostile(get(whole, path)), 2 if len(path) > 2 else 3):
            torch.save(put(whole, path, value), out / "last.pt")
            before = files(out)
            for argv in commands(out)[: 1 if len(path) > 2 else 2]:
                capsys.readouterr()
                code = cli.main(argv)
                found, tried = capsys.readouterr(), tried + 1
                if code == 0:
                    assert argv[0] == "evaluate" or is_harmless(where, value), (where, value)
                    (out / "log.jsonl").write_bytes(before["log.jsonl"])
                    continue
                refused += 1
                assert re.fullmatch(r"fused-res \w+: error: [^\n\x1b]+\n", found.err), where
                assert str(out / "last.pt") in found.err and len(found.err) < 1500, where
                assert not found.out and files(out) == before, where
    assert refused > 0.85 * tried > 100, (refused, tried)


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("settings.lr", math.nan, "lr must be a number at least 0, is nan"),
        ("settings.epochs", -1, "epochs must be a whole number at least 1 and at most"),
        ("settings.batch_size", 10**12, "batch_size must be a whole number at least 1"),
        ("settings.size", 2**14, "GiB of memory"),
        ("settings.warmup", 10, "--warmup 10 must be less than --epochs 1"),
        ("settings.plain", True, "key 'plain' is missing"),
        ("settings.classes", ("1", "3"), "classes must be ['1', '3'], is ['1', '2']"),
        ("classes", ["1", "2", "3"], "classes must be ['1', '2'], is ['1', '2', '3']"),
        ("arguments", {"num_classes": 9}, "arguments must be {"),
        ("arguments", {"num_classes": 2, "width": torch.ones(3)}, "arguments must be {"),
        ("processes", 3, "ranks must have 3 entries"),
        ("epoch", 0, "nets.fused.schedule.last_epoch must be 0, by epoch, net and step, is 1"),
        ("step", 1, "step must be a whole number at least 0 and at most 0, is 1"),
        ("std", torch.zeros(3), "std must be a tensor of float32, shape (3,), values from 1e-06"),
        ("log", 10, "log is 10: no line of the log ends there"),
        ("nets.fused.optimizer.param_groups.0.lr", 7.0, "param_groups.0.lr must be a number at"),
        ("nets.fused.optimizer.param_groups.0.momentum", 0.1, "momentum must be 0.9, is 0.1"),
        ("nets.fused.optimizer.state", {99: {}}, "state has no parameter 99"),
        ("nets.fused.optimizer.state.0", {"hook": 1}, "state.0 must have keys momentum_buffer"),
        ("nets.fused.model.fc.bias", torch.ones(2).half(), "fc.bias must be a dense tensor of"),
        ("nets.fused.model.fc.bias", torch.full((2,), math.nan), "a value that cannot be: nan"),
        ("nets.fused.model.blocks.0.bn1.running_var", -torch.ones(2), "that cannot be: -1"),
        ("ranks.0.sums", torch.ones(3).double(), "sums must be of 0 images"),
        ("ranks.0.rng.torch", torch.zeros(5056, dtype=torch.uint8), "rng must be states of"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_a_value_must_be(path, value, words, tmp_path, capsys):
    if trained_once.folder is None:
        trained_once.folder = train(tmp_path / "out", *NET, "--epochs", "1")
        trained_once.state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    out, keys = tmp_path / "other", []
    out.mkdir()
    state, rest = trained_once.state, path
    while rest:  # names of tensors have dots
        found = get(state, keys)
        key = rest if rest in found else rest.partition(".")[0]
        rest = rest[len(key) + 1 :]
        keys.append(int(key) if key not in found else key)
    torch.save(put(state, keys, value), out / "last.pt")
    (out / "log.jsonl").write_text("0123456789" + "\n" * 5000)
    assert words in failed(capsys, "train", "--out", out, "--resume")


class trained_once:
    folder = state = None


# --- what it names


@pytest.mark.parametrize(
    "model, arguments",
    [
        ("os:system", {"command": "echo ran"}),
        ("os:mkdir", {"path": "ran"}),
        ("subprocess:check_call", {"args": "touch ran", "shell": True}),
        ("builtins:exec", {"source": "open('ran', 'w')"}),
        ("mine.py:net", {}),
        ("{tmp_path}/mine.py:net", {}),
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:resnet18", {"pretrained": True}),
        ("torchvision.datasets.utils:download_url", {"url": "http://127.0.0.1/", "root": "."}),
        ("torch.hub:load", {"repo_or_dir": ".", "model": "net", "source": "local"}),
        ("timm:test_resnet", {"pretrained": 1}),
        ("timm:test_resnet", {"checkpoint_path": "last.pt"}),
        ("timm:test_resnet", {"pretrained_cfg": {"file": "last.pt"}, "pretrained": True}),
        ("timm:test_resnet", {"act_layer": "../relu"}),
        ("torchvision:mine.py:net", {}),
        ("torchvision:os:system", {"command": "echo ran"}),
        ("transformers:/mine.py:net", {}),
        ("timm:hf-hub:someone/net", {}),
        ("timm:local-dir:.", {}),
        ("timm:someone/net", {}),
        ("timm.models:load_checkpoint", {"checkpoint_path": "last.pt"}),
        ("transformers:pipeline", {"task": "x", "model": "someone/net", "trust_remote_code": True}),
        ("transformers:ResNetModel", {"config": "someone/net"}),
        ("transformers:no_such", {}),
        ("fused_res.train.checkpoint:load", {"path": "last.pt"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_no_code_is_run_and_no_file_opened(model, arguments, mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        cli_model, "named_model", lambda *args, **keywords: pytest.fail("it was made")
    )
    monkeypatch.setattr(nets, "named_model", cli_model.named_model)
    model = model.format(tmp_path=tmp_path)
    settings = Settings(model=model, model_arg=tuple(arguments.items()), epochs=1)
    put_checkpoint(tmp_path / "last.pt", settings)
    for argv in commands(tmp_path):
        text = failed(capsys, *argv, code=2)
        assert text.count("\n") == 1 and "name it again: fused-res " in text
        assert "echo ran" not in text and "touch" not in text  # nothing to be run by copying it
        assert "MODEL" in text or "--model-arg" in text
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py", "last.pt"}


def put_checkpoint(path, settings, **changed):
    """What ``load`` takes, of a run of ``settings`` that is over, without anything in its net."""
    classes = [str(i) for i in range(10)]
    net = {"model": {}, "average": None, "optimizer": {}, "schedule": {}, "scaler": {}}
    state = {
        "settings": vars(settings), "arguments": nets.arguments(settings, len(classes)),
        "classes": classes, "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.5),
        "data": 64 * "0", "processes": 1, "epoch": settings.epochs, "net": 0, "step": 0,
        "nets": {"fused": {**net, "accuracy": 0.5}}, "best": 0.5, "log": 1,
        "ranks": [{"rng": checkpoint.rng_state(), "seconds": 0.0,
                   "sums": torch.zeros(3, dtype=torch.float64)}],
    }  # fmt: skip
    checkpoint.save(path, {**state, **changed})


def test_a_folder_of_images_is_named_again(tmp_path, capsys):
    put_checkpoint(tmp_path / "last.pt", Settings(data="/secret/images", epochs=1))
    for argv in commands(tmp_path):
        text = failed(capsys, *argv, code=2)
        assert "names --data '/secret/images': a checkpoint alone" in text
        assert "--data /secret/images" in text.partition("again: ")[2]
        assert "elsewhere: not a folder" in failed(capsys, *argv, "--data", "elsewhere")


@pytest.mark.parametrize(
    "model, arguments",
    [
        ("net_res_deep", {"n_blocks": 2**20}),
        ("net_res_deep", {"n_blocks": 2**20, "shared": True}),
        ("resnet", {"counts": (2**20,) * 4}),
        ("resnet", {"width": 2**20}),
        ("resnet", {"width": "wide"}),
        ("resnet", {"counts": 5}),
        ("bn_block", {"stride": "x", "dropout": ()}),
        ("net", {"num_classes": 2**20}),
        ("resnet21", {}),
        ("torchvision:no_such", {}),
        ("torchvision:resnet18", {"width_per_group": 2**20}),
        ("timm:no_such", {}),
        ("transformers:ResNetModel", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_models_of_any_size_and_kind(model, arguments, tmp_path, capsys):
    settings = Settings(model=model, model_arg=tuple(arguments.items()), epochs=1)
    pictures = data.load(seed=0)
    put_checkpoint(tmp_path / "last.pt", settings, data=pictures.fingerprint)
    for argv in commands(tmp_path):
        text = failed(capsys, *argv)
        assert text.count("\n") == 1 and f"{tmp_path}/last.pt: " in text


@pytest.mark.parametrize(
    "model, arguments", [("timm:test_resnet", ["drop_rate=0.1"]), ("torchvision:resnet18", [])]
)
def test_models_of_libraries_are_made_again(model, arguments, tmp_path, capsys):
    flags = [word for argument in arguments for word in ("--model-arg", argument)]
    out = train(
        tmp_path,
        model,
        *flags,
        "--size",
        "16",
        "--images",
        "4",
        "--batch-size",
        "4",
        "--epochs",
        "1",
    )
    for argv in commands(out):
        assert cli.main(argv) == 0


def test_a_model_of_ones_own_is_named_again(mine, tmp_path, capsys, monkeypatch):
    flags = [f"{mine}:net", "--model-arg", "width=5", "--model-arg", "name=a b", *NET[3:]]
    whole = train(tmp_path / "whole", *flags, "--epochs", "2")
    out = stopped(monkeypatch, tmp_path / "out", *flags, "--epochs", "2")
    ran = mine.with_suffix(".ran")
    ran.unlink()
    texts = [failed(capsys, *argv, code=2) for argv in commands(out)]
    assert not ran.exists()
    for text in texts:
        words = shlex.split(text.partition("name it again: ")[2])
        assert words[0] == "fused-res" and "name=..." in words and "width=5" in words
        assert cli.main([word.replace("...", "a b") for word in words[1:]]) == 0
    assert ran.exists() and same(contents(out), contents(whole))
    text = failed(capsys, "train", f"{mine}:other", "--out", out, "--resume", code=2)
    assert "MODEL is '" in text and ":net': a resumed run keeps its settings" in text
    text = failed(capsys, "train", f"{mine}:net", "--out", out, "--resume", code=2)
    assert "names --model-arg width, name: " in text
    text = failed(capsys, "evaluate", out / "last.pt", "--model", f"{mine}:net",
                  "--model-arg", "width=6")  # fmt: skip
    assert "nets.fused.model.0.weight has shape (5, 3, 3, 3), the model's is (6, 3, 3, 3)" in text


def test_a_model_of_ones_own_may_make_and_drop_large_parts(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(MINE.replace("    return", "    nn.Linear(2**11, 2**10)\n    return"))
    out = train(tmp_path / "out", f"{source}:net", *NET[3:], "--epochs", "1")
    assert cli.main(["evaluate", str(out / "last.pt"), "--model", f"{source}:net"]) == 0


def stopped(monkeypatch, out, *argv, code=130):
    """A run that ends after its first epoch is saved."""
    write = engine.Trainer._write

    def stop(trainer, record):
        if record["event"] == "epoch" and record["epoch"] == 2:
            raise KeyboardInterrupt
        write(trainer, record)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "_write", stop)
        return train(out, *argv, code=code)


# --- the folder


def test_a_second_trainer_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    with lock.locked(out):
        for flags in (["--overwrite"], ["--resume"], []):
            text = failed(capsys, "train", *NET, "--epochs", "1", "--out", out, *flags)
            assert f"{out} is in use: process {os.getpid()} trains there" in text
        train(tmp_path / "other", *NET, "--epochs", "1")
    assert not out.exists()  # nothing came of it
    train(out, *NET, "--epochs", "1")
    assert not (out / ".lock").exists()


HOLD = """
import pathlib, sys
from fused_res.train.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_trainer_holds_nothing(tmp_path, capsys):
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        text = failed(capsys, "train", *NET, "--epochs", "1", "--out", tmp_path)
        assert f"process {process.pid} trains there" in text
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    train(tmp_path, *NET, "--epochs", "1")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_a_full_disk_leaves_the_old_checkpoint(share, tmp_path, capsys, monkeypatch):
    """A real one: the system refuses files of more than so many bytes."""
    flags = [*NET, "--epochs", "2"]
    out = stopped(monkeypatch, tmp_path / "out", *flags)
    before = (out / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        text = failed(capsys, "train", "--out", out, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = text.splitlines()[-1]
    assert error.startswith("fused-res train: error: [Errno 27] File too large: ")
    assert error.endswith((f"{out}/last.pt'", f"{out}/best.pt'"))
    assert (out / "last.pt").read_bytes() == before
    assert not list(out.glob("*.tmp")) and not (out / ".lock").exists()
    train(out, "--resume")
    assert same(contents(out), contents(train(tmp_path / "whole", *flags)))


@pytest.mark.parametrize("name", ["last.pt", "report.html"])
def test_no_space_left(name, tmp_path, capsys, monkeypatch):
    """Some file systems say so when a file is put on the disk, not when it is written."""
    fsync = os.fsync

    def full(file):
        path = tmp_path / "out" / f"{name}.tmp"
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            raise OSError(28, "No space left on device")
        fsync(file)

    out = stopped(monkeypatch, tmp_path / "out", *NET, "--epochs", "2")
    before = (out / "last.pt").read_bytes()
    monkeypatch.setattr(report, "page", lambda records: "page")
    monkeypatch.setattr(os, "fsync", full)
    text = failed(capsys, "train", "--out", out, "--resume")
    last = text.splitlines()[-1]
    assert last == f"fused-res train: error: [Errno 28] No space left on device: '{out}/{name}'"
    assert name == "report.html" or (out / "last.pt").read_bytes() == before
    assert not list(out.glob("*.tmp"))


def test_what_is_no_checkpoint_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "last.pt")
    for argv in commands(tmp_path):
        assert f"{tmp_path}/last.pt is not a file" in failed(capsys, *argv)
