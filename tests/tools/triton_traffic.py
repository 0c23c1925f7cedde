"""Watches Triton's interpreter: which kernels ran, the bytes each read and wrote, and that none
touched memory outside the tensors it was given."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fused_res.kernels import launch

_cast = InterpreterBuilder.cast_impl


def _cast_as_gpus_do(builder, src, dst_type):
    """GPUs round float32 to the nearest bfloat16; the interpreter cuts it off."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        data = np.ascontiguousarray(src.data)
        rounded = torch.from_numpy(data.reshape(-1)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16).reshape(data.shape), dst_type.scalar)
    return _cast(builder, src, dst_type)


InterpreterBuilder.cast_impl = _cast_as_gpus_do


class OutOfBounds(AssertionError):
    """A kernel touched memory outside its arguments."""


def extent(t: torch.Tensor) -> tuple[int, int]:
    """The addresses from t's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class Traffic:
    """Context manager. ``read`` and ``written``: bytes by kernel, of tensors of ``least`` bytes or
    more (a table of the channels stays in a cache); an address that one load or store touches more
    than once counts once.

    """

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self.launches: list[str] = []
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._ranges = np.empty((0, 2), dtype=np.int64)

    def name_of(self, kernel, arguments: dict) -> str:
        return kernel.fn.__name__

    def given(self, tensors: list[torch.Tensor]) -> None:
        """What the launch that begins may touch."""
        self._ranges = np.array([extent(t) for t in tensors])

    def _count(self, counter, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address = np.unique(pointers.data[np.asarray(mask.data, dtype=bool)].astype(np.int64))
        begin, end = self._ranges[:, 0], self._ranges[:, 1]
        inside = (address[:, None] >= begin) & (address[:, None] + size <= end)
        outside = int((~inside.any(axis=1)).sum())
        if outside:
            raise OutOfBounds(f"{self.launches[-1]} touched {outside} addresses")
        self.touched(counter, address, size, inside)

    def touched(self, counter, address: np.ndarray, size: int, inside: np.ndarray) -> None:
        """By one load or store; ``inside``: of each address, in which of the tensors it is."""
        large = self._ranges[:, 1] - self._ranges[:, 0] >= self.least
        counter[self.launches[-1]] += size * int(inside[:, large].any(axis=1).sum())

    def __enter__(self) -> Traffic:
        self._load = InterpreterBuilder.create_masked_load
        self._store = InterpreterBuilder.create_masked_store
        self._launch = launch.run

        def load(builder, pointers, mask, *rest, **options):
            self._count(self.read, pointers, mask)
            return self._load(builder, pointers, mask, *rest, **options)

        def store(builder, pointers, value, mask, *rest):
            self._count(self.written, pointers, mask)
            return self._store(builder, pointers, value, mask, *rest)

        def run(kernel, *given, **arguments):
            self.launches.append(self.name_of(kernel, arguments))
            tensors = [getattr(a, "base", a) for a in arguments.values()]  # of descriptors theirs
            self.given([t for t in tensors if isinstance(t, torch.Tensor)])
            self._launch(kernel, *given, **arguments)

        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        launch.run = run
        return self

    def __exit__(self, *_) -> None:
        InterpreterBuilder.create_masked_load = self._load
        InterpreterBuilder.create_masked_store = self._store
        launch.run = self._launch
