"""Outputs of the CPU kernels are ordinary tensors; what ops keep for themselves is bounded."""

import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

import fused_res
from fused_res import FusedResBlock
from fused_res.ops.convolutions import convolution, joined
from fused_res.reference import ResBlock

pytestmark = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)

BYTES = 4 * 32 * 40 * 40  # of an output of the block below, for one image


@pytest.fixture
def block():
    fused_res.empty_cache()
    yield FusedResBlock(32, 32, backend="cpu").eval()
    fused_res.empty_cache()


def images(count):
    return torch.randn(count, 32, 40, 40).to(memory_format=torch.channels_last)


def by_block(**kwargs):
    with torch.no_grad():
        return FusedResBlock(32, 32, backend="cpu", **kwargs).eval()(images(2))


def by_chain():
    net = nn.Sequential(*[ResBlock(32, 32) for _ in range(2)]).eval()
    fused_res.fuse_(net)
    assert isinstance(net, fused_res.nn.sequential.FusedSequential)
    with torch.no_grad():
        return net(images(2))


def in_training(what):
    """The output of a step, a gradient, or the largest tensor that is saved for backward."""
    x, saved = images(2).requires_grad_(), []
    block = FusedResBlock(32, 32, backend="cpu").to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.detach()) or t, lambda t: t
    ):
        y = block(x)
    if what == "output":
        return y.detach()
    if what == "saved":
        saved = [t for t in saved if t.data_ptr() != x.data_ptr() and t.shape == x.shape]
        assert saved
        return saved[-1]
    y.backward(torch.randn_like(y))
    return x.grad if what == "gradient" else block.conv1.weight.grad


def by_large_block():
    """Above the size at which pages of 2 MB are asked for."""
    with torch.no_grad():
        return FusedResBlock(32, 32, backend="cpu").eval()(images(24))


MAKERS = {
    "basic block": by_block,
    "bottleneck": lambda: by_block(kind="bottleneck"),
    "concat": lambda: by_block(kind="single", skip="concat"),
    "large block": by_large_block,
    "chain": by_chain,
    "training output": lambda: in_training("output"),
    "saved for backward": lambda: in_training("saved"),
    "gradient of x": lambda: in_training("gradient"),
    "gradient of a weight": lambda: in_training("weight"),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_outputs_are_ordinary_tensors(maker):
    y = MAKERS[maker]()
    kept, storage = y.clone(), y.untyped_storage()
    sizes = [storage.nbytes()]  # pytest would print all bytes of a storage in an assert
    view = y[:1]  # another view, while the storage is freed and filled again
    for size in (0, kept.nbytes):
        storage.resize_(size)
        sizes.append(storage.nbytes())
    assert sizes == [kept.nbytes, 0, kept.nbytes]
    y.copy_(kept)
    assert torch.equal(view, kept[:1])

    flat = y.permute(0, 2, 3, 1).flatten() if y.stride(1) == 1 else y.flatten()
    y.resize_(2 * y.numel())
    assert torch.equal(y[: flat.numel()], flat)
    assert torch.equal(y.resize_(10), flat[:10])
    assert torch.equal(torch.add(torch.ones(500, 400), 1, out=y.resize_(0)), torch.full_like(y, 2))

    y.set_(kept)
    y.share_memory_()
    assert y.is_shared() and torch.equal(y, kept)


def test_another_process_writes_to_an_output():
    y = by_block()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    queue.put(y)
    received = queue.get()
    process = context.Process(target=torch.Tensor.fill_, args=(received, 7.0))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(y, torch.full_like(y, 7))


@torch.no_grad()
def test_a_view_outlives_its_output(block):
    x = images(2)
    first = block(x)
    kept = first.clone()
    view = first[1:]
    del first
    for _ in range(3):
        block(x + 1)
    assert torch.equal(view, kept[1:])


def expand_and_reduce():
    """An op of two 1x1 convolutions, 8 -> 32 -> 8 channels: much memory and little work."""

    def one(channels, out_channels):
        weight = torch.ops.fused_res.direct_weight(
            [torch.randn(out_channels, channels, 1, 1)], [None]
        )
        sizes = (channels, 1, 1, 1, 1, 0, 0, 1, 1)
        return convolution(weight, None, 0, out_channels, "none", "none", sizes)

    run = joined([one(8, 32), one(32, 8)])
    return lambda n: run(torch.zeros(n, 8, 40, 40), None)


def test_what_an_op_keeps_is_used_again():
    run = expand_and_reduce()
    fused_res.empty_cache()
    run(10)
    kept = fused_res.empty_cache()
    assert kept >= 10 * BYTES  # between the convolutions
    for _ in range(5):
        run(10)
    assert fused_res.empty_cache() == kept
    assert fused_res.empty_cache() == 0


def test_what_ops_keep_is_bounded():
    run = expand_and_reduce()
    for n in (200, 300, 450, 680):  # too large for what the smaller ones left: 330 MB in all
        run(n)
    assert 200 << 20 < fused_res.empty_cache() <= 256 << 20


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_thousand_dropped_outputs_leave_no_memory_behind():
    run = expand_and_reduce()
    for n in range(1, 21):
        run(n)
    before = resident()
    for i in range(1000):  # 540 MB of outputs, 2 GB within the op
        run(1 + i * 7 % 20)
    assert resident() - before < 150 << 20


@torch.no_grad()
def test_threads_take_and_drop_memory_at_once(block):
    inputs = [images(1 + n % 2) for n in range(8)]
    expected = [block(x).clone() for x in inputs]
    wrong = []

    def work(x, y):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(block(x), y):
                    wrong.append(x)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
