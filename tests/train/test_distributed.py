"""``fused-res train`` in several processes, against one process; FSDP."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from agreement import agree
from train_commands import contents, same
from train_processes import CASES, DRAWS, FUSED, PROCESSES, RUN, gradients, main

from fused_res import cli
from fused_res.cli import CommandError
from fused_res.dispatch import backends
from fused_res.train.place import Place

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"),
]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder):
    """What each process found, all in one start of them: it takes seconds."""
    pytest.importorskip("sklearn")
    mp.start_processes(main, (str(folder), free_port()), PROCESSES, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name, fused", CASES)
def test_gradients_are_those_of_one_process(found, name, fused, tmp_path):
    alone = Place(torch.device("cpu"))
    ours, others = (process["gradients"][name, fused] for process in found)
    assert same(ours, others)
    theirs, exact = (
        [gradients(name, draw, alone, tmp_path, False, double) for draw in range(DRAWS)]
        for double in (False, True)
    )
    agree(ours, theirs, exact, name, largest=False)


@pytest.mark.parametrize("name", FUSED)
def test_fsdp(found, name):
    for process in found:
        for pairs in process["sharded"][name].values():
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# gloo's threads that are left: one that frees tensors while Python shuts down aborts the process
COUNT_THREADS = """
import pathlib
import sys
from fused_res import cli
code = cli.main()
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(f"{names.count('pt_gloo_runloop')} threads are left")
sys.exit(code)
"""


def launch(*argv, program=("-m", "fused_res"), interrupt=None):
    """torchrun; its exit code and output. ``interrupt``: the line after which it gets a SIGINT."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}",
         f"--master-port={free_port()}", *program, *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if interrupt is not None and line.startswith(interrupt):
            process.send_signal(signal.SIGINT)
    return process.wait(), "".join(lines)


def test_torchrun_trains_and_resumes(found, folder, capsys):
    out = folder / "resumed"
    code, text = launch(*RUN, "--out", str(out), interrupt="epoch 1/3  plain")
    assert code != 0 and f"torchrun ... -m fused_res train --out {out} --resume" in text, text
    assert cli.main(["train", "--out", str(out), "--resume"]) == 2
    assert f"{out}/last.pt was trained by 2 processes, now there are 1" in capsys.readouterr().err
    program = folder / "count_threads.py"
    program.write_text(COUNT_THREADS)
    code, text = launch("train", "--out", str(out), "--resume", program=(str(program),))
    assert code == 0, text
    assert text.count("0 threads are left") == PROCESSES, text
    assert text.count("epoch 3/3  fused") == text.count("wrote ") == 1  # by the first process
    assert same(contents(out), contents(folder / "whole"))


def test_fewer_images_in_a_batch_than_processes(tmp_path):
    with pytest.raises(CommandError, match="--batch-size 5 must be at least the number of process"):
        gradients("resnet", 0, Place(torch.device("cpu"), 0, 6), tmp_path)
