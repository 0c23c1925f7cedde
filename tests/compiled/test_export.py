"""Exported models hold plain ops, and other runtimes make the same of them: torch.export, ONNX,
TorchScript."""

import contextlib
import copy
import io

import blocks
import pytest
import torch
import torch.nn as nn
from agreement import agree, outcome, randomise
from torch.export import Dim

import fused_res
from fused_res import fuse_, optimize_for_inference

BATCH = ({0: Dim("batch")},)


def net() -> nn.Module:
    """A stem, a block of each kind of shortcut, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        blocks.BasicBlock(6, 6),
        blocks.BasicBlock(6, 9, 2),
        fused_res.FusedResBlock(9, 4, kind="single", skip="concat", dropout=0.3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(13, 5),
    )  # fmt: skip


def fused(model, x):
    fuse_(model := copy.deepcopy(model))
    return model


def optimized(model, x):
    return optimize_for_inference(model, x, tune=False)


def image(batch=3):
    return torch.randn(batch, 3, 13, 10)


def plain_ops(exported) -> set[str]:
    """Names of the ops of all graphs of an exported program; asserts that they are PyTorch's."""
    graphs = [m.graph for m in exported.graph_module.modules() if hasattr(m, "graph")]
    names = {str(n.target) for g in graphs for n in g.nodes if n.op == "call_function"}
    assert names and all(name.startswith("aten.") for name in names), names
    return names


def check_numbers(run, model, draws, what):
    """By the 1.5 x rule; what ``run`` makes of a batch."""
    exact = copy.deepcopy(model).double()
    made = [
        [
            outcome(model, x, False, False, call=run),
            outcome(model, x, False, False),
            outcome(exact, x.double(), False, False),
        ]
        for x in draws
    ]
    agree(*zip(*made, strict=True), what=what, largest=False)


@pytest.mark.parametrize(
    ("make", "strict"), [(fused, False), (optimized, False), (optimized, True)]
)
def test_export(make, strict):
    model = randomise(net()).eval()
    ours = make(model, x := image())
    exported = torch.export.export(ours, (x,), dynamic_shapes=BATCH, strict=strict)
    assert "aten.batch_norm.default" in plain_ops(exported)
    check_numbers(exported.module(), model, [image(), image(7), image()], "exported")


def test_exported_for_training_it_trains():
    ours, plain = fused(randomise(net()), None), net()
    exported = torch.export.export(ours.train(), (image(),))
    assert "aten.batch_norm.default" in plain_ops(exported)
    plain.load_state_dict(ours.state_dict())
    for m in (*plain.modules(), *ours.modules()):
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    module = torch.export.export(ours, (x := image(),)).module()
    module(x).sum().backward()
    plain(x).sum().backward()
    expected = dict(plain.named_parameters())
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        module.get_buffer("1.running_mean"), plain[1].running_mean, rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore", "error:Converting a tensor")
@pytest.mark.parametrize(("make", "dynamo"), [(fused, True), (fused, False), (optimized, False)])
def test_onnx_runtime_makes_the_same(make, dynamo, capsys):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model = randomise(net()).eval()
    ours, file = make(model, x := image()), io.BytesIO()
    batch = (
        {"dynamic_shapes": BATCH, "verbose": False}
        if dynamo
        else {"dynamic_axes": {"input": {0: "batch"}}}
    )
    torch.onnx.export(ours, (x,), file, input_names=["input"], dynamo=dynamo, **batch)
    made = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in made.graph.node} == {""}, "an op that is not ONNX's own"
    assert "Conv" in {node.op_type for node in made.graph.node}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

    def run(x):
        return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    draws = [image(), image(7), image()]
    check_numbers(run, model, draws, "ONNX Runtime")
    largest = 0.0
    for x in draws:
        theirs, y = run(x), ours(x).detach()
        torch.testing.assert_close(theirs, y, rtol=1e-4, atol=1e-5)
        largest = max(largest, (theirs - y).abs().max().item())
    with capsys.disabled():
        kind = "dynamo" if dynamo else "TorchScript"
        print(f"\n{make.__name__}, ONNX by {kind}: ONNX Runtime differs by at most {largest:.1e}")


@pytest.mark.filterwarnings("ignore", "error:Converting a tensor")
@pytest.mark.parametrize("make", [fused, optimized])
def test_torchscript(make):
    model = randomise(net()).eval()
    ours = make(model, x := image())
    traced = torch.jit.trace(ours, x)
    assert "fused_res::" not in str(traced.inlined_graph)
    check_numbers(traced, model, [image(), image(7), image()], "traced")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        out = self.bn(self.conv(x))
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize("make", [fused, optimized])
def test_a_branch_on_numbers_cannot_be_exported(make):
    with pytest.warns(UserWarning) if make is fused else contextlib.nullcontext():
        ours = make(Branching().eval(), x := image())
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(ours, (x,))


def test_a_cuda_graph_cannot_be_exported():
    ours = optimized(net(), x := image())
    ours._serving.cuda_graph = True  # needs a GPU to be made
    with pytest.raises(RuntimeError, match="cuda_graph=True cannot be exported"):
        torch.export.export(ours, (x,), strict=False)
    with pytest.raises(RuntimeError, match="cuda_graph=True cannot be exported"):
        torch.jit.trace(ours, x)
