"""On a GPU (`make gpu`): bn_act's kernels at real sizes, streams, graphs, and a training run."""

import pytest
import torch
from bn_act_cases import LAYOUTS, Case, assert_rule, on_cuda, on_triton
from torch import nn

import fused_res
from fused_res import backend, reference
from fused_res.dispatch import backends
from fused_res.models import ResNet
from fused_res.ops.bn_act import bn_act, unpack_mask
from fused_res.reference import ACTS, Norm

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(32, 64, 56, 56), (8, 256, 14, 14), (64, 32, 8, 8), (32, 512, 7, 7), (5, 13, 9, 7),
          (2, 1030, 6, 5)]  # fmt: skip


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    reason = backends.why_not("bn_act", request.param, "cuda", torch.float32)
    if reason:
        pytest.skip(reason)
    return request.param


def on(name):
    return {"cuda": on_cuda, "triton": on_triton}[name]


@pytest.mark.parametrize("kind", ["none", "tensor", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_the_rule(name, shape, layout, dtype, kind):
    for training in (True, False):
        for act in ACTS:
            n = max(1, -(-256 // shape[1]))
            cases = [Case(shape, dtype, layout, act, kind, training, device="cuda")
                     for _ in range(n)]  # fmt: skip
            assert_rule(cases, on(name))


@pytest.fixture(params=["whole", "cooperative", "split"])
def plan(request):
    reason = backends.why_not("bn_act", "cuda", "cuda", torch.float32)
    if reason:
        pytest.skip(reason)
    torch.ops.fused_res.cuda_plan(
        ["automatic", "whole", "cooperative", "split"].index(request.param)
    )
    yield request.param
    torch.ops.fused_res.cuda_plan(0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (128, 64, 56, 56), (16, 24, 64, 64)])
def test_every_plan_of_the_cuda_kernels(plan, shape, layout):
    """Those that `automatic` would not take too; the second shape is more than a chip holds."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("tensor", "norm"):
            cases = [Case(shape, dtype, layout, "relu", kind, True, device="cuda")
                     for _ in range(4)]  # fmt: skip
            assert_rule(cases, on_cuda)
    x, r = (torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            .contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))  # fmt: skip
    first = step(x, r, "cuda")
    for _ in range(20):  # a race between blocks would show in some
        again = step(x, r, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def step(x, r, name, act="relu"):
    """Output, gradients, running statistics of one training step, all from fresh leaves."""
    c = x.size(1)
    leaves = [t.detach().clone().requires_grad_() for t in (x, r)]
    w = torch.linspace(0.5, 1.5, c, device=x.device).requires_grad_()
    b = torch.linspace(-1, 1, c, device=x.device).requires_grad_()
    rm, rv = torch.zeros(c, device=x.device), torch.ones(c, device=x.device)
    y = bn_act(leaves[0], rm, rv, w, b, True, residual=leaves[1], act=act, backend=name)
    grads = torch.autograd.grad(y, [*leaves, w, b], torch.ones_like(y))
    return [y.detach(), *grads, rm, rv]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bitwise_the_same_on_every_run_and_stream(name, shape, layout):
    x, r = (torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            .contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))  # fmt: skip
    first = step(x, r, name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = [step(x, r, name) for _ in range(5)]
    torch.cuda.current_stream().wait_stream(stream)
    for again in other:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_masks_hold_the_relus_bits(name):
    op = torch.ops.fused_res.bn_act_fwd if name == "cuda" else torch.ops.fused_res.bn_act_fwd_triton
    for shape in SHAPES:
        for layout in LAYOUTS.values():
            x = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
            c = torch.ones(shape[1], device="cuda")
            y, mask, _ = op(x, c, c, c.clone(), c.clone(), True, 0.1, 1e-5, x, False, None, None,
                            None, None, False, 0.0, 1.0, 1, True)  # fmt: skip
            assert torch.equal(unpack_mask(mask, x), y > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(name, layout):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    shape = (1025, 64, 181, 181)
    x = torch.randn(1, 64, 181, 181, device="cuda", dtype=torch.bfloat16)
    x = x.expand(shape).contiguous(memory_format=LAYOUTS[layout])
    x[-1] *= 2
    rm, rv = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y = bn_act(x, rm, rv, training=True, momentum=1.0, backend=name)
    mean = x[:-1].mean((2, 3), dtype=torch.float64).sum(0) + x[-1].double().mean((1, 2))
    torch.testing.assert_close(rm.double(), mean / 1025, rtol=1e-4, atol=1e-5)
    last = reference.bn_act(x[-1:].float(), Norm(rm, rv, None, None, False, 0.1, 1e-5))
    torch.testing.assert_close(y[-1:].float(), last, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (64, 32, 8, 8), (8, 64, 28, 28)])
def test_a_training_step_in_a_cuda_graph(name, shape):
    block = fused_res.FusedResBlock(shape[1], shape[1], backend=name).cuda()
    block = block.to(memory_format=torch.channels_last)
    x = torch.randn(shape, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    state = {k: t.clone() for k, t in block.state_dict().items()}
    graphed = torch.cuda.make_graphed_callables(block, (x,))
    block.load_state_dict(state)
    y = graphed(x)
    y.sum().backward()
    twin = reference.ResBlock(shape[1], shape[1]).cuda()
    twin.load_state_dict(state)
    z = x.detach().clone().requires_grad_()
    expected = twin(z)
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    for (key, p), q in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["single", "basic", "bottleneck"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_whole_block_in_one_call(dtype, kind, stride):
    reason = backends.why_not("bn_act", "cuda", "cuda", dtype)
    if reason:
        pytest.skip(reason)
    results = []
    x = torch.randn(16, 64, 28, 28, device="cuda").to(dtype, memory_format=torch.channels_last)
    args = (64, 64 * stride, stride)
    exact = reference.ResBlock(*args, kind=kind).cuda()
    for module, factory, d in (
        ("ours", fused_res.FusedResBlock, dtype),
        ("theirs", reference.ResBlock, dtype),
        ("exact", reference.ResBlock, torch.float64),
    ):
        block = factory(*args, kind=kind).cuda()
        block.load_state_dict(exact.state_dict())
        for part in block.modules():
            if isinstance(part, nn.Conv2d) or d == torch.float64:
                part.to(d)
        block = block.to(memory_format=torch.channels_last)
        leaf = x.to(d).requires_grad_()
        with backend("cuda" if module == "ours" else "eager"):
            y = block(leaf)
        if module == "ours":
            assert type(y.grad_fn).__name__ == "_ResBlockBackward"
        grads = torch.autograd.grad(y, [leaf, *block.parameters()], torch.ones_like(y) / 64)
        assert block.bn1.num_batches_tracked == 1
        results.append([t.double() for t in (y.detach(), *grads, *block.buffers())])
    # by RMS: a ReLU that rounds to the other side of zero moves a value by more than rounding does
    for ours, theirs, true in zip(*results, strict=True):
        mine, other = ((t - true).square().mean().sqrt() for t in (ours, theirs))
        assert mine <= 1.5 * other + 1e-6 * true.abs().max()


def test_reduce_overhead(name):
    block = fused_res.FusedResBlock(32, 32, backend=name).cuda()
    compiled = torch.compile(block, mode="reduce-overhead")
    x = torch.randn(8, 32, 16, 16, device="cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x).square().mean()
        loss.backward()
    assert torch.isfinite(loss)


def net():
    torch.manual_seed(0)
    return ResNet(stem="cifar", init="default").to("cuda", memory_format=torch.channels_last)


def test_autocast_training_follows_pytorch(name):
    """A ResNet-18, 200 steps from the same seed: the same losses, to what bfloat16 lets differ."""
    torch.manual_seed(1)
    centres = torch.randn(10, 3, 32, 32, device="cuda")
    losses = {}
    for fused in (False, True):
        model = net()
        if fused:
            assert len(fused_res.fuse_(model).fused) == 8
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator("cuda").manual_seed(2)
        seen = []
        with backend(name if fused else "eager"):
            for _ in range(200):
                target = torch.randint(10, (64,), device="cuda", generator=generator)
                noise = torch.randn(64, 3, 32, 32, device="cuda", generator=generator)
                x = (centres[target] + noise).to(memory_format=torch.channels_last)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append(loss.detach())
        losses[fused] = torch.stack(seen)
    ours, theirs = losses[True], losses[False]
    assert torch.allclose(ours[:3], theirs[:3], rtol=0.05, atol=0.02)
    assert abs(ours[-20:].mean() - theirs[-20:].mean()) < 0.1
    assert ours[-20:].mean() < 0.5 * ours[:5].mean()
