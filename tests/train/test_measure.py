"""What the trainer measures before it trains. The CPU stands for a GPU."""

import random
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import train_processes
from torch import nn
from train_commands import same

from fused_res import models
from fused_res.dispatch import backends, first_use, inference_conv, training_block, user_timings
from fused_res.train import checkpoint
from fused_res.train.data import statistics
from fused_res.train.engine import Trainer
from fused_res.train.measure import measure
from fused_res.train.place import Place
from fused_res.train.settings import Settings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"),
]
CPU = torch.device("cpu")
ALONE = Place(CPU)
IMAGES = (4, 3, 8, 8)


@pytest.fixture(autouse=True)
def covered(monkeypatch):
    """``auto`` believes only measurements on the CPU, in a process that has measured nothing."""
    monkeypatch.setattr(first_use, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(first_use, "_spent", first_use.Spent())
    monkeypatch.setattr(first_use, "_seen", {})
    monkeypatch.setattr(first_use, "clock", lambda run, device: (run(), 1.0)[1])
    inference_conv.forget()
    yield
    monkeypatch.undo()
    inference_conv.forget()


def net(**arguments):
    torch.manual_seed(0)
    return models.create("resnet", num_classes=3, counts=(1,), width=8, **arguments)


def measure_one(model, place=ALONE):
    measure([model], IMAGES, 3, torch.float32, torch.channels_last, place)


def rows():
    return [row for row in user_timings.table(CPU).rows.values() if row.op == training_block.OP]


def test_blocks_are_measured_and_nothing_else_changes():
    model = net()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    versions = [t._version for t in model.state_dict().values()]
    layouts = [t.stride() for t in model.state_dict().values()]
    model.eval()
    before = checkpoint.rng_state()
    measure_one(model)
    assert [row.shape[0] for row in rows()] == [4]
    assert same(checkpoint.rng_state(), before)
    assert same(dict(model.state_dict()), weights) and not model.training
    assert [t._version for t in model.state_dict().values()] == versions
    assert [t.stride() for t in model.state_dict().values()] == layouts
    assert all(p.grad is None for p in model.parameters())


def test_random_numbers_are_those_of_before_where_a_step_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            random.random()
            torch.rand(1)
            raise RuntimeError("it fails")

    model = Fails()
    before = checkpoint.rng_state()
    with pytest.raises(RuntimeError, match="it fails"):
        measure_one(model)
    assert same(checkpoint.rng_state(), before)


def trained(pictures, folder):
    mean, std = statistics(pictures.train_images)
    settings = Settings(batch_size=4, epochs=1, lr=0.1)
    torch.manual_seed(1)
    trainer = Trainer({"net": net()}, pictures, settings, ALONE, folder,
                      {"mean": mean, "std": std})  # fmt: skip
    known = len(rows())
    trainer.run(None)
    return known, trainer


def test_a_trainer_measures_before_it_trains(tmp_path):
    known, trainer = trained(train_processes.data(0), tmp_path)
    assert known == len(rows()) == 1  # in training nothing was left to measure
    again = trained(train_processes.data(0), tmp_path)[1]
    assert same(dict(again.nets[0].model.state_dict()), dict(trainer.nets[0].model.state_dict()))


@pytest.mark.parametrize("why", ["not covered", "FUSED_RES_AUTOTUNE=0", "no fused block"])
def test_where_nothing_is_measured(why, monkeypatch):
    model = net(fused=why != "no fused block")
    if why == "not covered":
        monkeypatch.setattr(first_use, "DEVICE_TYPES", ("cuda",))
    if why == "FUSED_RES_AUTOTUNE=0":
        monkeypatch.setattr(first_use, "settings", first_use.settings._replace(autotune="0"))
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    measure_one(model)
    assert not ran and not rows()


def test_a_later_process_waits_and_reads_the_table():
    class Second(Place):
        def gather(self, value):
            """As if the first process measured meanwhile."""
            assert not rows()  # the table is read too early
            row = ("", "", training_block.OP, "float32", "NCHW", (1, 2, 3, 4), {"eager": 1.0}, "")
            user_timings.write(CPU, [user_timings.Row(*row)])
            return [None, None]

    measure_one(net(), Second(CPU, 1, 2))
    assert [row.shape for row in rows()] == [(1, 2, 3, 4)]
    assert first_use._spent.calls == 0


def test_two_processes(tmp_path):
    mp.start_processes(
        train_processes.measured, (str(tmp_path),), train_processes.PROCESSES, start_method="spawn"
    )
    first, second = (torch.load(Path(tmp_path, f"{rank}.pt")) for rank in range(2))
    assert first["before"] == 2 and second["before"] == 0  # batches of 3 images and of 2
    assert first["in training"] == second["in training"] == 0
    assert first["rows"] == second["rows"] and len(first["rows"]) == 2
    for found in (first, second):
        assert found["decided"] and all("measured here" in reason for reason in found["reasons"])
