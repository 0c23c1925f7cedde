"""The memory that the CPU kernels keep for outputs."""

import threading

import pytest
import torch

import fused_res
from fused_res import FusedResBlock

BYTES = 4 * 32 * 40 * 40  # of an output of the block below, for one image


@pytest.fixture
def block():
    fused_res.empty_cache()
    yield FusedResBlock(32, 32, backend="cpu").eval()
    fused_res.empty_cache()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def images(count):
    return torch.randn(count, 32, 40, 40).to(memory_format=torch.channels_last)


def test_freed_outputs_are_used_again(block):
    x = images(2)
    block(x)
    assert fused_res.empty_cache() >= 2 * BYTES
    addresses = set()
    for _ in range(5):
        y = block(x)
        addresses.add(y.data_ptr())
        del y
    assert len(addresses) <= 2


def test_an_output_in_use_is_never_given_away(block):
    x = images(2)
    first = block(x)
    kept = first.clone()
    view = first[1:]
    del first
    for _ in range(3):
        block(x + 1)
    torch.testing.assert_close(view, kept[1:], rtol=0, atol=0)


def test_what_is_kept_is_bounded_and_can_be_freed(block):
    x, count = images(40), 1 + (300 << 20) // (40 * BYTES)
    outputs = [block(x) for _ in range(count)]
    del outputs
    assert 200 << 20 < fused_res.empty_cache() <= 256 << 20
    assert fused_res.empty_cache() == 0


def test_threads_do_not_share_outputs(block):
    inputs = [images(1) for _ in range(4)]
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
