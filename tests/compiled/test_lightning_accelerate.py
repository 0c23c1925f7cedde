"""Trainers that wrap a model: Lightning and Hugging Face Accelerate, beside a loop by hand."""

import copy

import model_libraries  # noqa: F401  torchvision, before torchmetrics imports it
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_res
from fused_res.nn.blocks import FusedForward
from fused_res.reference import ResBlock

STEPS, BATCH = 2, 4


@pytest.fixture
def data():
    return TensorDataset(torch.randn(STEPS * BATCH, 3, 8, 8), torch.randint(4, (STEPS * BATCH,)))


@pytest.fixture
def net():
    layers = nn.Conv2d(3, 16, 3), ResBlock(16, 16), ResBlock(16, 32, stride=2)
    made = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    assert len(fused_res.fuse_(made).fused) == 2
    return made


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def by_hand(net, data, autocast=False):
    """What the net is after an epoch."""
    net = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    for images, labels in DataLoader(data, batch_size=BATCH):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    return net


def same(net, expected):
    """Bit by bit: sums have a fixed order."""
    assert sum(isinstance(m, FusedForward) for m in net.modules()) == 2
    ours, theirs = net.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert ours["1.bn1.num_batches_tracked"] == STEPS


def test_lightning_trains_as_a_loop_does(net, data, one_thread, tmp_path):
    L = pytest.importorskip("pytorch_lightning")

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return optimizer_of(self.net)

    expected = by_hand(net, data)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=BATCH))
    same(net, expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_as_a_loop_does(net, data, one_thread, precision):
    accelerate = pytest.importorskip("accelerate")
    expected = by_hand(net, data, autocast=precision == "bf16")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    try:
        prepared, optimizer, loader = accelerator.prepare(
            net, optimizer_of(net), DataLoader(data, batch_size=BATCH)
        )
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(prepared(images), labels))
            optimizer.step()
        same(accelerator.unwrap_model(prepared), expected)
    finally:  # it is the process's
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
