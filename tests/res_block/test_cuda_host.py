"""The host code of whole blocks on CUDA, run on the CPU by tests/cuda_emulation/host.py: forward and
backward by the 1.5 x rule, every gradient asked for alone, counters, modules; its checks and its
launches. And faults planted, which must be caught."""

import itertools

import pytest
import torch
from cuda_emulation.host import PLANS, HostError
from errors import rule
from res_block_cases import PLANS as BLOCKS
from res_block_cases import Case
from torch import nn

import fused_res
from fused_res import reference
from fused_res.dispatch import training_block
from fused_res.ops import res_block as op
from fused_res.reference import ACTS

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# those of the tests on a GPU, with smaller maps and fewer channels
SIZES = {"single": (8, 16, 7, 7), "projection": (6, 24, 8, 8), "nothing added": (5, 13, 15, 17)}


def whole(recompute=False, counters=()):
    """A function that runs a block by these ops, whatever its size."""

    def call(x, branch, shortcut, act):
        given = training_block.Call(x, branch, shortcut, act, recompute)
        y = op._run_as(given, training_block.CANDIDATES["cpu"], [*counters], torch.is_grad_enabled())
        assert y is not None
        return y

    return call


@pytest.fixture
def block(host, monkeypatch):
    host.as_cpu(monkeypatch)
    return host


def results(case, act, **options):
    return (case.run(whole(**options), case.dtype, act),
            case.run(reference.res_block, case.dtype, act),
            case.run(reference.res_block, torch.float64, act))  # fmt: skip


def pooled(found):
    """By kind of result: output, gradients and running statistics of some blocks together."""
    for i, triples in enumerate(zip(*found, strict=True)):
        rule(*(torch.cat([t.flatten() for t in of]) for of in zip(*triples, strict=True)), f"{i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_within_the_rule(block, layout, name, dtype):
    """By all that a block gives, in training, with each act; plans of launches in turn."""
    found = []
    for i, act in enumerate(ACTS):
        block.plan(PLANS[(i + DTYPES.index(dtype)) % 4])
        case = Case(name, dtype, SIZES.get(name, (6, 16, 7, 9)), layout=LAYOUTS[layout])
        _spare_ties(case, act)
        rows = results(case, act)
        found.append([*zip(*rows, strict=True)])
    pooled(found)
    assert {(launch.device, launch.stream) for launch in block.launches} == {
        (block.of_tensors, block.stream)
    }


def _spare_ties(case, act):
    """Biases far from zero: a ReLU that rounds to the other side of it moves a value by more than
    all rounding does."""
    for stage in (*case.branch, *([case.shortcut] if case.shortcut else [])):
        stage.norm.bias.copy_(9 * torch.randn_like(stage.norm.bias).sign())
