"""tests/tools/traffic.py: a block's training step in Triton moves the bytes of its plan, and of the
design's within 5 %; and the counter and the plan can be wrong."""

from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on a GPU here: make gpu", allow_module_level=True)

import suites
import traffic

from fused_res.dispatch.training_conv_candidates import Steps
from fused_res.kernels import bn_act, res_block

README = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def small(monkeypatch):
    """name -> (channels in and out, stride, kind, image and batch)"""
    cases = {"basic": (16, 16, 1, "basic", 8, 4), "projection": (16, 32, 2, "basic", 8, 4)}
    monkeypatch.setattr(traffic, "CASES", cases)


def within(counted, plan, share):
    return abs(traffic.total(counted) / traffic.total(plan) - 1) <= share


@pytest.mark.parametrize("case", ["basic", "projection"])
def test_bytes_are_those_of_the_plan(small, case):
    counted, ours, design = traffic.measure(case)
    assert counted == ours
    assert within(counted, design, 0.05) and counted != design


def test_a_pass_too_many_is_counted(small, monkeypatch):
    real = res_block.convolve
    monkeypatch.setattr(res_block, "convolve", lambda *args: (real(*args)[0], None))
    counted, ours, design = traffic.measure("basic")
    assert counted["_bn_act_fwd_statistics_kernel"][0] > 0
    assert not within(counted, ours, 0.05) and not within(counted, design, 0.05)


def test_the_figure_in_the_readme():
    text = " ".join(README.read_text().split())
    assert traffic.of_net("ResNet-50", 256, 224) in text


def test_bytes_of_single_convolutions():
    """Those that the rows of training-convs have. In steps a gradient reads dy again."""
    for workload in suites.workloads("training-convs", gpu=True, quick=True):
        call = workload.call
        if call.backward and call.stride != (1, 1) and call.weight[2:] != (1, 1):
            continue
        steps = Steps(call, workload.values())
        with mock.patch.object(bn_act, "SMALL_VALUES", 0), traffic.Once() as counted:
            steps.run(steps.candidates()[1])
        moved = sum(counted.read.values()) + sum(counted.written.values())
        assert moved == workload.moved_bytes(""), workload.name
