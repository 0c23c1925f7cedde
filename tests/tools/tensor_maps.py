"""What ``cuTensorMapEncodeTiled`` asks of a tensor map, asked of every tensor descriptor that is
made: the interpreter, where the tests run, takes any."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import pytest

RANKS = range(1, 6)
ALIGNMENT = 16  # bytes: of the base, and what global strides and the box's row are multiples of
MOST_STRIDE = 1 << 40  # bytes
MOST_SIZE = 1 << 32
MOST_BOX = 256
SWIZZLES = (128, 64, 32)


class BadTensorMap(AssertionError):
    """The driver would refuse it."""


def wrong(base: int, element: int, shape, strides, block, swizzle: int | None = None) -> list[str]:
    """What the driver would refuse.

    Args:
        base: address of the first element.
        element: bytes of one.
        shape, strides, block: in elements, the fastest dimension last. A row of the block longer
            than the swizzle is copied in several boxes, as Triton does; None: the widest swizzle.
        swizzle: bytes, or None for what Triton picks.
    """
    found = []
    if len(shape) not in RANKS or not len(shape) == len(strides) == len(block):
        found.append(f"{len(shape)} sizes, {len(strides)} strides, {len(block)} of the box")
        return found
    if base % ALIGNMENT:
        found.append(f"the base {base:#x} is not aligned")
    if strides[-1] != 1:
        found.append(f"the last stride is {strides[-1]}")
    for stride in strides[:-1]:
        if stride * element % ALIGNMENT or not 0 <= stride * element < MOST_STRIDE:
            found.append(f"a stride of {stride * element} bytes")
    found += [f"a size of {size}" for size in shape if not 1 <= size <= MOST_SIZE]
    row = block[-1] * element
    if swizzle is None:
        swizzle = next((s for s in SWIZZLES if row % s == 0), 0)
    elif swizzle and row > swizzle:
        found.append(f"a row of {row} bytes is longer than the swizzle of {swizzle}")
    box = [*block[:-1], min(block[-1], swizzle // element) if swizzle else block[-1]]
    found += [f"a box of {size}" for size in box if not 1 <= size <= MOST_BOX]
    if row % ALIGNMENT:
        found.append(f"a row of {row} bytes")
    if any(size & (size - 1) for size in block):
        found.append(f"a box that is no power of 2: {block}")
    return found


def check(descriptor) -> None:
    """Of Triton's ``TensorDescriptor``.

    Raises:
        BadTensorMap: it breaks a rule.
    """
    base = descriptor.base
    if base.device.type == "meta" or base.numel() == 0:
        return
    shape, strides, block = descriptor.shape, descriptor.strides, descriptor.block_shape
    found = wrong(base.data_ptr(), base.element_size(), shape, strides, block)
    if found:
        raise BadTensorMap(f"{'; '.join(found)}: {shape}, {strides}, {block}")


def checked(make: Callable) -> Callable:
    """``TensorDescriptor`` that is checked; ``made`` counts them."""

    @functools.wraps(make, updated=())
    def describe(*arguments, **options):
        descriptor = make(*arguments, **options)
        check(descriptor)
        describe.made += 1
        return descriptor

    describe.made = 0
    return describe


@pytest.fixture(autouse=True)
def tensor_maps(monkeypatch):
    """Every descriptor that the kernels' host side makes is checked; None without Triton."""
    conv_tiles = sys.modules.get("fused_res.kernels.conv_tiles")
    if conv_tiles is None:
        return None
    describe = checked(conv_tiles.TensorDescriptor)
    monkeypatch.setattr(conv_tiles, "TensorDescriptor", describe)
    return describe
