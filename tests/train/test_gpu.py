"""On a GPU (`make gpu`): ``fused-res train --cuda-graph``."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from train_commands import contents, train

from fused_res.train import engine, graphed, nets, report

pytestmark = pytest.mark.gpu
# 12 batches an epoch, two epochs
NET = ["resnet", "--model-arg", "counts=(1,1)", "--model-arg", "width=16", "--images", "192",
       "--batch-size", "16", "--epochs", "2", "--lr", "0.02", "--device", "cuda",
       "--cuda-graph"]  # fmt: skip
ADAMW = ["--optimizer", "adamw", "--lr", "0.002"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(report, "page", lambda records: "")


def assert_equal_within_rounding(out, other):
    """The weights of two runs differ by less than a hundredth of what training has changed."""
    ours, theirs = (contents(folder)[0]["last.pt"] for folder in (out, other))
    assert ours["nets"].keys() == theirs["nets"].keys()
    start = nets.make("resnet", theirs["arguments"], False, 0)[0].state_dict()
    for name, net in theirs["nets"].items():
        found = ours["nets"][name]
        assert found["schedule"] == net["schedule"]
        for key in [key for key, t in start.items() if t.is_floating_point()]:
            for part, prefix in [("model", ""), ("average", "module.")]:
                if net[part] is not None:
                    t = net[part][prefix + key]
                    apart = (found[part][prefix + key] - t).norm()
                    assert apart <= 0.01 * (t - start[key]).norm() + 1e-6, (name, part, key)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [*ADAMW, "--schedule", "cosine", "--clip-grad", "1", "--ema", "0.9"],
        ["--compare", "--grad-accumulation", "2", "--schedule", "onecycle", "--l2", "0.001"],
        ["--amp", "bf16", "--dropout", "0.2", "--augment"],
    ],
    ids=" ".join,
)
def test_replayed_steps_train_as_eager_ones(flags, tmp_path, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay

    def counted(graph):
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    with monkeypatch.context() as patch:
        patch.setattr(graphed, "WARM_UPS", 1000)
        eager = train(tmp_path / "eager", *NET, *flags)
    assert not replays
    out = train(tmp_path / "out", *NET, *flags)
    steps = 12 if "--grad-accumulation" in flags else 24
    each = 2 if "--compare" in flags else 1
    assert len(replays) == each * (steps - graphed.WARM_UPS)
    assert_equal_within_rounding(out, eager)


def test_resumed(tmp_path, monkeypatch):
    argv = [*NET, *ADAMW, "--dropout", "0.2"]
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
    assert_equal_within_rounding(out, whole)


def test_a_net_that_waits_for_the_gpu(tmp_path):
    """In a process of its own, because a capture has failed in it."""
    source = tmp_path / "waits.py"
    source.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x * (x.sum().item() < 1e30))\n"
        "def net(num_classes):\n"
        "    return Net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "fused_res", "train", f"{source}:net", "--plain", "--images", "64",
         "--batch-size", "8", "--epochs", "1", "--device", "cuda", "--cuda-graph", "--out",
         str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert "--cuda-graph: a step of the plain net cannot be captured: " in found.stderr
