"""The driver's rules of tensor maps, asked of every descriptor that tests make, and broken ones."""

import pytest
import torch

pytest.importorskip("triton")

import tensor_maps as rules

from fused_res.kernels import conv_bn_act, conv_tiles
from fused_res.reference import ConvNorm, Norm

CONFIG = conv_tiles.Config("descriptor", 64, 64, 32, 4, 2, 1)
GOOD = dict(base=1 << 12, element=2, shape=[4, 8, 8, 64], strides=[4096, 512, 64, 1],
            block=[1, 8, 8, 64])  # fmt: skip


def image(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("swizzle", [None, 128])
def test_a_good_map_is_taken(swizzle):
    assert not rules.wrong(**GOOD, swizzle=swizzle)
    assert not rules.wrong(**GOOD | dict(block=[1, 8, 4, 256]))  # in four copies


@pytest.mark.parametrize(
    "planted",
    [
        dict(base=(1 << 12) + 8),
        dict(strides=[4096, 512, 60, 1]),
        dict(strides=[1 << 39, 512, 64, 1]),
        dict(strides=[-4096, 512, 64, 1]),
        dict(strides=[4096, 512, 64, 2]),
        dict(shape=[(1 << 32) + 1, 8, 8, 64]),
        dict(shape=[0, 8, 8, 64]),
        dict(block=[512, 8, 8, 64]),
        dict(block=[1, 0, 8, 64]),
        dict(block=[1, 8, 8, 4]),
        dict(block=[1, 3, 8, 64]),
        dict(swizzle=64),
        dict(block=[1, 8, 8]),
        dict(shape=[1] * 6, strides=[64] * 5 + [1], block=[1] * 5 + [64]),
        dict(shape=[], strides=[], block=[]),
    ],
    ids=str,
)
def test_a_bad_map_is_refused(planted):
    assert rules.wrong(**GOOD | planted)


def test_the_kernels_descriptors_are_checked(tensor_maps, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available() or not conv_tiles.INTERPRETED:
        pytest.skip("the kernels run on a GPU here: make gpu")
    x, norm = image(2, 16, 8, 8), Norm(*[torch.ones(16)] * 4)
    conv = ConvNorm(image(16, 16, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, norm)
    conv_bn_act.forward(x, conv)
    assert tensor_maps.made == 3


@pytest.mark.parametrize("fault", ["base", "channels", "stride", "box"])
def test_a_planted_descriptor_is_caught(fault):
    """Of what the kernels' host side makes of a tensor; some of it by Triton itself."""
    c = 20 if fault == "channels" else 32
    x = image(2, c, 8, 8)
    if fault == "base":
        x = (
            torch.zeros(2 * 64 * c + 1, dtype=torch.bfloat16)[1:]
            .view(2, 8, 8, c)
            .permute(0, 3, 1, 2)
        )
    block = [1, 512, 1, 32] if fault == "box" else [1, 8, 8, 32]
    channels = 33 if fault == "stride" else c
    with pytest.raises(AssertionError):
        conv_tiles.describe_pixels(x, channels, (1, 1), (2, 8, 8), block)


def test_what_triton_takes_and_the_driver_does_not():
    t = torch.zeros(64 * 64, dtype=torch.bfloat16)
    for shape, strides in (([8, 64], [1 << 40, 1]), ([8, 64], [-64, 1])):
        with pytest.raises(rules.BadTensorMap):
            conv_tiles.TensorDescriptor(t, shape, strides, [8, 64])
    with pytest.raises(rules.BadTensorMap):
        conv_tiles.TensorDescriptor(t, [8, 64], [64, 1], [512, 64])


def test_each_way_to_describe_is_checked():
    with pytest.raises(AssertionError):
        conv_tiles.describe_filters(image(8, 12, 1, 1), CONFIG)
    with pytest.raises(AssertionError):
        conv_tiles.describe_pairs(image(2, 2, 8, 8), [1, 4, 1, 4, 2])
