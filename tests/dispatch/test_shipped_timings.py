"""The table of measurements that backend auto follows: fused_res/shipped_timings.py."""

import json
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fused_res import FusedResBlock
from fused_res.cli import doctor
from fused_res.dispatch import backends, first_use, inference_conv, shipped_timings
from fused_res.dispatch.inference_conv import IMPLEMENTATIONS
from fused_res.dispatch.shipped_timings import Row, verdict
from fused_res.ops.conv_bn_act import fuses_convolutions

H100 = ("NVIDIA H100 80GB HBM3", "sm_90")
H200 = ("NVIDIA H200", "sm_90")
BOTH = ("cuda", "triton")


def row(shape, eager, device=H100, layout="channels_last", **ms):
    return Row(*device, "bn_act", "bfloat16", layout, shape, {"eager": eager, **ms})


@pytest.fixture
def table(monkeypatch):
    """Sets the table's rows; nothing computed from others is left before or after."""

    def clear():
        for cached in (shipped_timings.knows, shipped_timings.verdict):
            cached.cache_clear()
        inference_conv.forget()

    def use(*rows):
        monkeypatch.setattr(shipped_timings, "rows", lambda: rows)
        clear()

    clear()
    yield use
    monkeypatch.undo()
    clear()


def ask(shape, device=H100, dtype="bfloat16", layout="channels_last", able=BOTH):
    return verdict("bn_act", device, dtype, layout, shape, able)


def test_the_fastest_is_taken_and_the_reason_says_why(table):
    table(row((256, 64, 56, 56), 1.0, cuda=0.5, triton=0.6))
    backend, reason, _ = ask((256, 64, 56, 56))
    assert backend == "cuda"
    assert "2.00x PyTorch at 256x64x56x56 channels_last on NVIDIA H100" in reason
    assert ask((256, 64, 56, 56), able=("triton",)).backend == "triton"


def test_a_kernel_that_does_not_win_is_not_taken(table):
    table(row((256, 64, 56, 56), 1.0, cuda=0.99, triton=1.2))
    backend, reason, _ = ask((256, 64, 56, 56))
    assert backend == "eager"
    assert "1.01x PyTorch" in reason


def test_other_shapes_follow_the_nearest(table):
    table(
        row((256, 64, 56, 56), 1.0, cuda=0.5),
        row((64, 32, 8, 8), 0.010, cuda=0.020),
    )
    assert ask((128, 96, 56, 56)).backend == "cuda"
    assert ask((64, 16, 8, 8)).backend == "eager"
    for far in ((1, 512, 14, 14), (256, 2048, 56, 56), (4096, 64, 112, 112)):
        backend, reason, _ = ask(far)
        assert backend is None and "was not measured" in reason


def test_dtypes_and_layouts_do_not_answer_for_each_other(table):
    table(row((256, 64, 56, 56), 1.0, cuda=0.5))
    assert ask((256, 64, 56, 56), layout="NCHW").backend is None
    assert ask((256, 64, 56, 56), dtype="float32").backend is None


def test_a_sibling_answers_with_a_margin(table):
    shape = (256, 64, 56, 56)
    table(row(shape, 1.0, cuda=0.95))
    assert ask(shape).backend == "cuda"
    assert ask(shape, device=H200).backend == "eager"  # 1.05x: siblings differ by as much
    table(row(shape, 1.0, cuda=0.8))
    assert ask(shape, device=H200).backend == "cuda"
    table(row(shape, 1.0, cuda=0.8), row(shape, 1.0, device=H200, cuda=1.1))
    assert ask(shape, device=H200).backend == "eager"  # its own measurement is better
    assert ask(shape, device=("NVIDIA A100-SXM4-80GB", "sm_80")).backend is None


LIKE = "3x3 stride 1x1 padding 1x1, add, relu"


def conv(shape, like=LIKE, config=None, **ms):
    of = (*H100, "conv_bn_act", "bfloat16", "channels_last")
    return Row(*of, shape, ms, like, config)


def ask_conv(shape, like=LIKE, able=("cudnn", "triton"), device=H100):
    return verdict("conv_bn_act", device, "bfloat16", "channels_last", shape, able, like)


def test_a_convolution_follows_the_nearest_of_its_kind(table):
    wins = conv((32, 64, 56, 56, 64), config={"M": 128}, eager=1.0, cudnn=0.9, triton=0.5)
    loses = conv((32, 512, 7, 7, 512), eager=1.0, cudnn=0.9, triton=1.5)
    table(row((32, 64, 56, 56), 1.0, cuda=0.5), wins, loses)
    name, reason, config = ask_conv((16, 64, 56, 56, 96))
    assert (name, config) == ("triton", {"M": 128})
    assert f"triton 2.00x PyTorch at 32x64x56x56x64 {LIKE} channels_last on NVIDIA H1" in reason
    assert ask_conv((32, 256, 14, 14, 512)).backend == "cudnn"
    assert ask_conv((32, 64, 56, 56, 64), able=()).backend is None
    assert ask_conv((32, 64, 56, 56, 512)).backend is None  # so many channels out are far
    assert ask_conv((32, 64, 56, 56, 64), like=LIKE.replace("add", "concat 64")).backend is None
    assert ask((32, 64, 56, 56)).backend == "cuda"  # another op's rows


def test_a_fused_kernel_must_beat_cudnn_too(table):
    table(conv((32, 64, 56, 56, 64), eager=1.0, cudnn=0.8, triton=0.79))
    assert ask_conv((32, 64, 56, 56, 64)).backend == "cudnn"
    table(conv((32, 64, 56, 56, 64), eager=1.0, cudnn=0.8, triton=0.75))
    assert ask_conv((32, 64, 56, 56, 64)).backend == "triton"
    assert ask_conv((32, 64, 56, 56, 64), device=H200).backend == "cudnn"  # a sibling's margin


def test_auto_follows_the_table(table, monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    x = torch.randn(4, 8, 6, 6)
    of_cpu = ("cpu", "cpu", "bn_act", "float32")
    assert backends.choose("bn_act", "auto", x) == "cpu"
    table(Row(*of_cpu, "NCHW", (4, 8, 6, 6), {"eager": 1.0, "cpu": 2.0}))
    with caplog.at_level(logging.INFO, "fused_res"):
        assert backends.choose("bn_act", "auto", x) == "eager"
    assert "0.50x PyTorch at 4x8x6x6" in caplog.text
    assert backends.choose("bn_act", "cpu", x) == "cpu"  # a name is a name
    assert backends.choose("bn_act", "auto", x.to(memory_format=torch.channels_last)) == "cpu"
    assert backends.choose("bn_act", "auto", x.double()) == "eager"
    table(Row(*of_cpu, "NCHW", (4, 8, 6, 6), {"eager": 1.0, "cpu": 0.5}))
    assert backends.choose("bn_act", "auto", x) == "cpu"


def test_tensors_that_no_measurement_is_for(table, monkeypatch):
    """Empty ones, symbolic sizes, fake ones of a device that is not there."""
    slow = Row("cpu", "cpu", "bn_act", "float32", "NCHW", (4, 8, 6, 6), {"eager": 1.0, "cpu": 2.0})
    table(row((4, 8, 6, 6), 1.0, cuda=0.5), slow)
    empty = torch.empty(0, 8, 6, 6)
    assert backends.choose("bn_act", "auto", empty) == "cpu"
    block = FusedResBlock(8, 8).eval()
    assert block(empty).shape == empty.shape
    make_fx(block, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(4, 8, 6, 6))
    with FakeTensorMode():
        x = torch.empty(4, 8, 6, 6, device="cuda")
        assert backends.choose("bn_act", "auto", x) == "eager"


def test_the_shipped_table_is_valid():
    shipped_timings.rows.cache_clear()
    for r in shipped_timings.rows():
        of_convolutions = {"conv_bn_act": IMPLEMENTATIONS, "training_convolution": ["triton"]}
        known = of_convolutions.get(r.op) or backends.SUPPORT[r.op]
        assert len(r.shape) == (5 if r.like else 4)
        assert r.ms["eager"] > 0 and set(r.ms) <= {"eager", *known}


def test_doctor_says_what_auto_takes_and_why(table, monkeypatch, capsys):
    assert "bn_act on cpu: auto takes cpu for float32" in doctor.render(doctor.report())
    table(row((256, 64, 56, 56), 1.0, cuda=0.5), row((64, 32, 8, 8), 0.01, cuda=0.02))
    monkeypatch.setattr(shipped_timings, "device_of", lambda *_: H100)
    lines = shipped_timings.summary(torch.device("cuda", 0))
    assert lines[0].startswith("bn_act bfloat16: auto takes cuda; cuda 2.00x PyTorch at 256x64")
    assert lines[1].startswith("bn_act bfloat16: auto takes eager; cuda 0.50x PyTorch at 64x32")
    json.dumps(doctor.report()["choices"])


def test_without_a_measurement_a_gpu_runs_pytorchs_ops(table, monkeypatch):
    table()
    monkeypatch.setattr(shipped_timings, "device_of", lambda *_: H100)
    assert not shipped_timings.knows(torch.device("cuda", 0), "bn_act")
    assert shipped_timings.summary(torch.device("cuda", 0)) == []


def test_a_gpu_where_only_bn_act_was_measured_keeps_to_it_in_inference(table, monkeypatch):
    monkeypatch.setattr(shipped_timings, "device_of", lambda *_: H100)
    monkeypatch.setattr(first_use, "may_measure", lambda device: False)
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda")
        of_bn_act = row((256, 64, 56, 56), 1.0, cuda=0.5)
        table(of_bn_act)
        assert not fuses_convolutions(x, None)
        assert fuses_convolutions(x, "triton")
        table(of_bn_act, of_bn_act._replace(op="conv_bn_act", shape=(8, 64, 56, 56, 64)))
        assert fuses_convolutions(x, None)
