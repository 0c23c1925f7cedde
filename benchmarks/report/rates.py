"""What GPUs do in a clock, and how fast their memory is, as NVIDIA publishes it: for
``report/bound.py``. Nothing here was timed.

Sources, by field:

- arithmetic of a multiprocessor and clock: CUDA C++ Programming Guide, "Performance guidelines,
  Arithmetic instructions", table "Throughput of native arithmetic instructions", columns 8.0, 8.9
  and 9.0;
- ``shared``: the same guide, "Compute capability 8.x, Shared memory" and "9.0": 32 banks of 4
  bytes;
- ``issue``: the same guide, "Hardware multithreading": 4 schedulers, each with a warp of 32 threads
  a clock;
- ``tensor``: the peaks of 16-bit products with sums in float32, without sparsity, over
  multiprocessors and clock: A100 whitepaper (312 TFLOPS), Hopper whitepaper (twice an
  A100's, of a multiprocessor and clock), Ada whitepaper (RTX 4090: 165.2 TFLOPS), L4
  datasheet (242 TFLOPS with sparsity: half). TF32's peaks there are half of them;
- multiprocessors, clocks, memory: the same whitepapers and datasheets; of an H100 (SXM, HBM3) the
  clock that its tensor cores keep, 1.755 GHz, not the 1.98 GHz it may reach.
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Of one multiprocessor, in one clock. Instructions are those of single threads."""

    fp32: int  # additions, multiplications, both in one; products of integers use the same units
    fp64: int
    convert64: int  # conversions from and to float64
    integer: int  # additions, logic, comparisons, selections
    convert: int  # other conversions
    special: int  # reciprocals, square roots
    shuffle: int
    shared: int = 128  # bytes
    issue: int = 128


class Gpu(NamedTuple):
    name: str
    capability: str  # "8.9"
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # GB/s, of its memory
    tensor: int  # multiply-adds of bf16 or fp16, of a multiprocessor in a clock; half of TF32


RATES = {
    "8.0": Rates(64, 32, 16, 64, 16, 16, 32),
    "8.9": Rates(128, 2, 2, 64, 16, 16, 32),
    "9.0": Rates(128, 64, 16, 64, 64, 16, 32),
}
GPUS = (
    Gpu("H100", "9.0", 132, 1.755, 3350, 2048),
    Gpu("A100", "8.0", 108, 1.410, 2039, 1024),
    Gpu("L4", "8.9", 58, 2.040, 300, 512),
    Gpu("RTX 4090", "8.9", 128, 2.520, 1008, 256),
)
# Which architecture's code the figures of a GPU are from: 8.9 runs 8.0's.
CODE = {"9.0": ("sm_90", "sm_90a"), "8.0": ("sm_80",), "8.9": ("sm_80",)}
