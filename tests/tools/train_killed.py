"""A process of tests/train/test_resume.py: trains, is killed at random moments, and resumes."""

import contextlib
import importlib
import io
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch
from train_commands import contents, same

from fused_res import cli
from fused_res.train import checkpoint, engine, report
from fused_res.train.log import Log

NET = ["resnet", "--model-arg", "counts=1,1", "--model-arg", "width=8", "--size", "8",
       "--images", "64", "--batch-size", "8", "--epochs", "3", "--dropout", "0.2"]  # fmt: skip
RUNS = {
    "fp32": [*NET, "--augment", "--cutout", "3", "--schedule", "onecycle", "--save-every", "1",
             "--grad-accumulation", "3"],
    "bf16": [*NET, "--compare", "--ema", "0.9", "--amp", "bf16", "--optimizer", "adamw",
             "--schedule", "cosine", "--warmup", "1", "--save-every", "3"],
}  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(function):
    return lambda *args: die()


def after(function):
    def call(*args):
        function(*args)
        die()

    return call


def half_a_checkpoint(save):
    def call(state, file):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    return call


def half_a_line(write):
    def call(log, record):
        log._file.write(json.dumps(record).encode()[:20])
        log._file.flush()
        die()

    return call


# where a process may be killed, and how often a run comes there before it saves anew
PLACES = [
    (torch, "save", half_a_checkpoint, 3),
    (os, "fsync", before, 6),
    (os, "replace", before, 3),
    (os, "replace", after, 3),
    (Log, "write", half_a_line, 3),
    (Log, "write", after, 3),
    (engine.Trainer, "_train_step", after, 8),
    (engine, "evaluate", before, 2),
]


def doom(place, count):
    """Lets the process be killed when it comes to a place for the ``count``-th time."""
    owner, name, way, _ = place
    function, calls = getattr(owner, name), iter(range(count - 1))

    def call(*args):
        return (function if next(calls, None) is not None else way(function))(*args)

    setattr(owner, name, call)


def start(argv, doomed=None):
    """Runs the command in a fork; its process id."""
    pid = os.fork()
    if pid:
        return pid
    if doomed is not None:
        doom(*doomed)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        os._exit(cli.main(argv))


def ended(pid, seconds):
    """Its exit code if it ends in time; else it is killed."""
    handle = os.pidfd_open(pid)
    select.select([handle], [], [], seconds)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_and_resume(name, most, folder):
    """Prints what was killed and how often."""
    argv = ["train", *RUNS[name], "--threads", "1", "--out"]
    assert len(os.listdir("/proc/self/task")) == 1, "threads would be missing in forks"
    begin = time.perf_counter()
    assert ended(start([*argv, str(folder / "whole")]), 100) == 0
    whole = time.perf_counter() - begin
    expected = contents(folder / "whole")
    chance = random.Random(name)
    kills, found, runs = 0, [], 0
    while kills < most or found[-1] != 0:
        out = folder / str(runs)
        if kills >= most:
            doomed, seconds = None, 100
        elif chance.random() < 0.5:
            doomed, seconds = None, chance.uniform(0, whole / 2)
        else:
            place = chance.choice(PLACES)
            doomed, seconds = (place, chance.randint(1, place[-1])), 100
        found.append(ended(start([*argv, str(out), "--resume"], doomed), seconds))
        assert found[-1] in (0, -signal.SIGKILL), found
        kills += found[-1] != 0
        for path in out.glob("*.pt"):
            checkpoint.load(path)
        if found[-1] == 0:
            assert not list(out.glob("*.tmp"))
            assert same(contents(out), expected), f"{name}: differs after {found}"
            runs += 1
    print(f"{kills} kills, {runs} runs")


if __name__ == "__main__":
    for module in ("sklearn.datasets", "torch._dynamo"):  # once, not in every fork
        importlib.import_module(module)
    report.page = lambda records: ""  # drawing takes longer than all the rest
    kill_and_resume(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
