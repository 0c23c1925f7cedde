"""What is kept for each size of the inputs is bounded."""

import gc
import tracemalloc

import pytest
import torch
from sweeps import sweep

import fused_res
from fused_res import FusedResBlock, Norm
from fused_res.dispatch import shipped_timings, user_timings
from fused_res.ops.bn_act import bn_act_norms
from fused_res.ops.conv_bn_act import conv_bn_act
from fused_res.reference import ConvNorm

WEIGHT, CHANNEL = torch.ones(8, 8, 1, 1), torch.ones(8)
FEW = 800  # more than are kept
BYTES = 64 * 1024


def convolve(x):
    norm = Norm(CHANNEL, CHANNEL, CHANNEL, CHANNEL)
    with torch.no_grad():
        conv_bn_act(x, ConvNorm(WEIGHT, None, (1, 1), (0, 0), (1, 1), 1, norm))


def normalise(x):
    bn_act_norms(x, Norm(CHANNEL, CHANNEL, CHANNEL, CHANNEL))


class Inference:
    def __init__(self):
        self.block = FusedResBlock(8, 8, kind="single").eval()

    @torch.no_grad()
    def __call__(self, x):
        self.block(x)


class Training:
    def __init__(self):
        self.block = FusedResBlock(8, 8, kind="single")

    def __call__(self, x):
        self.block(x).sum().backward()


class Served:
    def __init__(self):
        net = torch.nn.Sequential(FusedResBlock(8, 16, kind="single"), FusedResBlock(16, 16))
        self.net = fused_res.optimize_for_inference(net, torch.zeros(1, 8, 1, 1), tune=False)

    def __call__(self, x):
        self.net(x.view(-1, 8, 1, 1))


CALLS = {  # and the number of sizes
    "conv_bn_act": (lambda: convolve, 5000),
    "bn_act": (lambda: normalise, 5000),
    "inference": (Inference, 1500),
    "training": (Training, 1500),
    "served": (Served, 1200),
}


@pytest.mark.parametrize("name", sweep(CALLS, quick=["training", "served"]))
def test_memory_of_many_sizes_is_bounded(name, one_thread):
    make, most = CALLS[name]
    run = make()

    def kept(sizes):
        for i in sizes:
            run(torch.zeros(1, 8, 1 + i % 80, 2 + i // 80))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = kept(range(FEW))
        assert kept(range(FEW, most)) - before < BYTES
    finally:
        tracemalloc.stop()


def test_measurements_are_bounded(monkeypatch):
    monkeypatch.setattr(user_timings, "MOST_ROWS", 3)
    cpu = torch.device("cpu")

    def row(i, ms):
        return shipped_timings.Row("", "", "bn_act", "float32", "NCHW", (1, 8, i, i), {"eager": ms})

    user_timings.keep(cpu, [row(i, 1.0) for i in (1, 2, 3)])
    user_timings.keep(cpu, [row(1, 2.0), row(4, 1.0)])  # what was measured again is not the oldest
    path = user_timings.write(cpu, [row(i, 1.0) for i in (1, 2, 3)])
    user_timings.write(cpu, [row(1, 2.0), row(4, 1.0)])
    for rows in (user_timings.table(cpu).rows.values(), user_timings.load(path)[1]):
        assert [(r.shape[2], r.ms["eager"]) for r in rows] == [(3, 1.0), (1, 2.0), (4, 1.0)]
