"""Whole fused models under torch.compile: one graph, compiled once for all steps and batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import randomise
from model_libraries import timm, torchvision
from sweeps import sweep
from torch.func import functional_call

import fused_res
from fused_res import fuse_

pytestmark = pytest.mark.usefixtures("one_thread")

SE = {"block_args": {"attn_layer": "se"}}
MODELS = {
    "torchvision resnet": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 10, width_per_group=8
    ),
    "timm, in parts": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), 10, channels=(8, 8, 16, 16), **SE
    ),
    "resnet8": lambda: fused_res.models.create("resnet20", counts=(1, 2, 1)),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused(name):
    model = randomise(MODELS[name]())
    fuse_(model)
    return model


def images(batch):
    return torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def steps(model, call, batches):
    """Losses of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    losses = []
    for batch in batches:
        torch.manual_seed(batch)
        loss = F.cross_entropy(call(images(batch)), torch.randint(10, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("dynamic", [False, True], ids=["steps", "dynamic batch"])
@pytest.mark.parametrize("name", sweep(MODELS, quick=["timm, in parts"]))
def test_trains_in_one_graph(name, dynamic):
    model = fused(name)
    eager = copy.deepcopy(model)
    batches = (4, 6, 5) if dynamic else (4, 4, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        call = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        losses = steps(model, call, batches)
    torch.testing.assert_close(losses, steps(eager, eager, batches), rtol=1e-3, atol=1e-3)
    for (key, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, msg=key)


@pytest.mark.parametrize("name", sweep(MODELS, quick=["timm, in parts"]))
def test_serves_in_one_graph(name):
    model = fused(name).eval()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        call = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (2, 5, 3):
            torch.testing.assert_close(call(x := images(batch)), model(x), rtol=1e-4, atol=1e-4)


def test_inductor():
    model = fused("resnet8").eval()
    with torch.no_grad():
        call = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(call(x := images(2)), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_export_with_a_dynamic_batch(name):
    model = fused(name).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 7):
        torch.testing.assert_close(exported(x := images(size)), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_functional_call(name, train):
    """Other parameters and buffers than its own, and gradients of them."""
    model, other = fused(name).train(train), fused(name).train(train)
    values = {n: t.detach().clone() for n, t in other.state_dict().items()}
    for n, p in other.named_parameters():
        values[n] = p.detach().clone().requires_grad_()
    before = copy.deepcopy(model.state_dict())
    x = images(3)
    out, expected = functional_call(model, values, (x,)), other(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    expected.square().mean().backward()
    for n, p in other.named_parameters():
        torch.testing.assert_close(values[n].grad, p.grad, rtol=1e-2, atol=1e-4, msg=n)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_cuda_graph_of_a_training_step(name):
    model = fused(name).cuda().to(memory_format=torch.channels_last)
    eager = copy.deepcopy(model)
    call = torch.cuda.make_graphed_callables(model, (images(4).cuda(),))
    for _ in range(3):
        x = images(4).cuda()
        a, b = call(x), eager(x)
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        a.square().mean().backward()
