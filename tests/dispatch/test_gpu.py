"""First use on a GPU: what its first run must show."""

import os
import subprocess
import sys

import pytest
import torch

import fused_res
from fused_res.dispatch import first_use, inference_conv, user_timings

pytestmark = pytest.mark.gpu
WARM_UP = 3


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """As in a process that has measured nothing."""
    monkeypatch.setattr(first_use, "_spent", first_use.Spent())
    monkeypatch.setattr(first_use, "_seen", {})
    inference_conv.forget()


def resnet50():
    torch.manual_seed(0)
    model = fused_res.models.create("resnet50", num_classes=10, fused=False).cuda().bfloat16()
    model = model.to(memory_format=torch.channels_last)
    fused_res.fuse_(model)
    return model


def images(n=32):
    x = torch.randn(n, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def step(model, x):
    model.zero_grad(set_to_none=False)
    loss = model(x).float().square().mean()
    loss.backward()
    return loss


def test_auto_is_not_eager_after_warm_up():
    model, x = resnet50(), images()
    for _ in range(WARM_UP):
        step(model, x)
    report = fused_res.report(model)
    assert user_timings.faults(x.device) == [], str(report)
    assert any("res_block on" in block.ran for block in report.blocks), str(report)
    assert all(block.gain is None or block.gain > 1 for block in report.blocks), str(report)


CODE = """
import sys, fused_res
from fused_res.dispatch import first_use
sys.path.append(sys.argv[1])
import test_gpu
if sys.argv[2] == "later":
    first_use.measure = None
model, x = test_gpu.resnet50(), test_gpu.images()
for _ in range(test_gpu.WARM_UP):
    test_gpu.step(model, x)
print([block.ran for block in fused_res.report(model).blocks])
"""


def test_a_second_process_reads_the_rows(tmp_path):
    environ = {**os.environ, "FUSED_RES_CACHE": str(tmp_path)}
    found = []
    for which in ("first", "later"):
        run = subprocess.run(
            [sys.executable, "-c", CODE, os.path.dirname(__file__), which],
            capture_output=True, text=True, env=environ,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.splitlines()[-1])
    assert found[0] == found[1]


def test_a_graph_captured_after_warm_up_replays_right():
    model, x = resnet50(), images(8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, x)
    model.load_state_dict(state)
    graph.replay()
    graphed = loss.clone(), [p.grad.clone() for p in model.parameters()]
    model.load_state_dict(state)
    loss = step(model, x)
    torch.testing.assert_close(graphed[0], loss, rtol=1e-2, atol=1e-3)
    for found, p in zip(graphed[1], model.parameters(), strict=True):
        assert (found - p.grad).float().norm() <= 0.02 * p.grad.float().norm() + 1e-6


def test_nothing_is_measured_in_a_capture():
    model, x = resnet50(), images(8)
    before = first_use._spent.calls
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        model.eval()
        model(x)  # lazy initialisation of libraries
        with torch.cuda.graph(graph):
            model(x)
        graph.replay()
    assert first_use._spent.calls == before
