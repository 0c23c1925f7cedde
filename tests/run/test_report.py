"""What ``fused_res.report`` says on a CPU, and that it changes nothing."""

import pytest
import torch
from torch import nn

import fused_res
from fused_res.reference import ResBlock


def called(blocks=1, training=True, times=1):
    model = nn.Sequential(*(ResBlock(16, 16) for _ in range(blocks))).train(training)
    model.to(memory_format=torch.channels_last)
    fused_res.fuse_(model)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training):
        for _ in range(times):
            model(x)
    return model, x


def row(model):
    return fused_res.report(model).blocks[0]


def test_a_block_that_was_changed_runs_pytorchs_ops():
    model, x = called()
    assert row(model).ran == "res_block on cpu"
    model[0].conv1.register_forward_hook(lambda *_: None)
    model(x)
    assert row(model)[2:4] == ("PyTorch's ops", "changed since fuse_")


def test_blocks_in_one_call():
    model, _ = called(blocks=3, training=False, times=2)
    assert {(of.mode, of.ran) for of in fused_res.report(model).blocks} == {
        ("inference", "res_chain")
    }


@pytest.mark.parametrize(
    "change, why",
    [
        (nn.Module.train, "its mode has changed since its last call"),
        (nn.Module.bfloat16, "it was cast since its last call"),
    ],
)
def test_a_block_that_is_not_as_in_its_last_call(change, why):
    model, _ = called(training=False)
    change(model)
    assert row(model).ran == "" and why in row(model).why


def test_autocast_is_asked_as_in_the_call():
    model, x = called()
    with torch.autocast("cpu"):
        model(x)
    before = row(model)
    with torch.autocast("cpu"):
        assert row(model) == before
    assert before.ran != "res_block on cpu"  # x and the branch differ in dtype


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    model, _ = called(blocks=2, training=training)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    for _ in range(2):
        fused_res.report(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not torch.is_autocast_enabled("cpu")
