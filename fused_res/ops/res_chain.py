"""Residual blocks one after the other in one call: the op ``res_chain``, for inference.

A net of many small blocks spends its time on starting kernels and on moving maps that a core's
cache could keep.

- CPU (``csrc/cpu/res_chain.cpp``): each thread takes a few images through all blocks. With fewer
  images than threads, all threads share each convolution and wait for each other after it.
- CUDA (``csrc/cuda/res_chain.cu``), where backend ``cuda`` is named: a thread block takes a few
  images through all blocks, with their maps in its shared memory.
- Elsewhere: one ``conv_bn_act`` for each convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch.backends import asked_for, why_not
from ..dispatch.cpu_rules import MOST_CHANNELS_OF_CHAIN, chain_pays, expected_tile
from ..dispatch.inference_conv import IMPLEMENTATIONS, allows_tf32
from ..reference import ACTS, Act, ConvNorm
from . import library
from .conv_bn_act import PLAIN, Call, conv_bn_act, out_shape, under_modes
from .convolutions import nhwc

# Packs a chain for inputs of so many channels into one tensor of bytes, which res_chain reads.
# program has for each convolution: Winograd's tile, or 0 for a direct one; kernel size, 1 or 3;
# channels out; act, an index in reference.ACTS; 1 for a block's last one, which adds the block's
# input.
library.define(
    "packed_chain(Tensor[] weights, Tensor?[] biases, int[] program, int channels) -> Tensor"
)
library.define("res_chain(Tensor x, Tensor chain) -> Tensor")
# A chain of parameters that are not packed. norms has for each convolution: the BatchNorm's running
# mean, running variance, weight and bias (None: no BatchNorm). program has for each: kernel size,
# channels out, act, 1 for a block's last one.
library.define(
    "res_chain_params(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, float[] eps, "
    "int[] program, bool tf32) -> Tensor"
)
# Whether res_chain_params can run on such maps on a CUDA device; bytes: of an element.
library.define(
    "res_chain_fits(int device, int bytes, int channels, int height, int width, int[] program) "
    "-> bool"
)


@torch.library.register_fake("fused_res::res_chain", lib=library)
def _(x, chain):
    return torch.empty_like(x)


@torch.library.register_fake("fused_res::res_chain_params", lib=library)
def _(x, weights, biases, norms, eps, program, tf32):
    return torch.empty_like(x)


class Link(NamedTuple):
    """A residual block with an identity shortcut.

    convs: its convolutions; a ReLU follows each but the last.
    act: after the last one: ``relu`` (after the add), ``relu_before_add``, or ``none``.
    """

    convs: Sequence[ConvNorm]
    act: Act = "relu"


class Chain:
    """``x -> y`` with packed weights; valid while the parameters stay unchanged."""

    def __init__(self, weights: list, biases: list, program: list[int], channels: int) -> None:
        pack = torch.ops.fused_res.packed_chain
        self.convolutions = len(weights)
        self._packed = pack(weights, biases, program, channels)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.fused_res.res_chain.default(nhwc(x), self._packed)


def _implementation(call: Call) -> tuple[str, int]:
    """The implementation that the rules expect to be the fastest in a chain, and its tile or 0."""
    names = {0: "direct", 2: "winograd2", 4: "winograd4"}
    able = [tile for tile, name in names.items() if IMPLEMENTATIONS[name].why_not(call) is None]
    tile = expected_tile(call.x.shape, call.conv.weight.shape, able, in_chain=True)
    return names[tile], tile


def _keeps_size(conv: ConvNorm) -> bool:
    size = conv.weight.size(2)
    return (
        size in (1, 3)
        and conv.weight.size(3) == size
        and conv.groups == 1
        and tuple(conv.stride) == (1, 1) == tuple(conv.dilation)
        and tuple(conv.padding) == (size // 2, size // 2)
    )


def is_for(x: Tensor) -> bool:
    """Whether a kernel can run on such a tensor; on a CUDA device only where ``cuda`` is named."""
    return (
        (x.is_cuda or (x.is_cpu and x.dtype == torch.float32))
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and why_not("conv_bn_act", x.device.type, x.device.type, x.dtype) is None
    )


def fits(x: Tensor, block: Link) -> bool:
    """Whether the kernel can run a block on inputs of x's size."""
    if x.is_cuda:
        return _is_identity(block, x.size(1)) and all(_belongs(conv, x) for conv in block.convs)
    widest = max((n for conv in block.convs for n in conv.weight.shape[:2]), default=0)
    return _is_identity(block, x.size(1)) and chain_pays(widest, x[0, 0].numel())


def _is_identity(block: Link, channels: int) -> bool:
    """Whether the kernels can run a block's convolutions, from and to so many channels."""
    first = channels
    for conv in block.convs:
        weight = conv.weight
        tensors = (weight, conv.bias, *(conv.norm or ())[:4])
        if any(t is not None and type(t) not in PLAIN for t in tensors):
            return False
        if weight.dim() != 4 or weight.size(1) != channels or not _keeps_size(conv):
            return False
        if max(weight.shape[:2]) > MOST_CHANNELS_OF_CHAIN:
            return False
        channels = len(weight)
    return channels == first


def prepared_chain(
    x: Tensor, blocks: Sequence[Link], backend: str | None
) -> Chain | CudaChain | None:
    """A function that runs the blocks on inputs of x's size, without gradients.

    On a CPU it is valid while the parameters stay unchanged, on a CUDA device while they stay the
    same tensors. None: the blocks must run one by one.

    Raises:
        as ``conv_bn_act``, for any of the convolutions.
    """
    if not is_for(x) or not all(fits(x, block) for block in blocks):
        return None
    name = asked_for("conv_bn_act", backend, x)
    if x.is_cuda:  # not for `auto`: there are no timings of it
        return _cuda_chain(x, blocks) if name == "cuda" else None
    if name not in ("auto", "cpu"):
        return None
    weights, biases, program = [], [], []
    for block in blocks:
        shape = x.shape
        for i, conv in enumerate(block.convs):
            last = i + 1 == len(block.convs)
            z = x.new_empty(()).expand(shape)  # stands for the activation; has its size alone
            call = Call(z, conv, x if last else None, act=block.act if last else "relu")
            shape = out_shape(z, conv)
            implementation, tile = _implementation(call)
            found = IMPLEMENTATIONS[implementation].prepare(call)
            weights += found.weights
            biases += found.biases
            program += tile, conv.weight.size(2), shape[1], ACTS.index(call.act), int(last)
    return Chain(weights, biases, program, x.size(1))


class CudaChain(NamedTuple):
    """``x -> y`` with the parameters themselves, not packed."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    norms: list[Tensor | None]
    eps: list[float]
    program: list[int]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.fused_res.res_chain_params.default(x, *self, allows_tf32())


def parameters(blocks: Sequence[Link]) -> CudaChain:
    found = CudaChain([], [], [], [], [])
    for block in blocks:
        for i, conv in enumerate(block.convs):
            last, norm = i + 1 == len(block.convs), conv.norm
            found.weights.append(conv.weight)
            found.biases.append(conv.bias)
            found.norms.extend(norm[:4] if norm else (None,) * 4)
            found.eps.append(norm.eps if norm else 0.0)
            k, _, size, _ = conv.weight.shape
            found.program.extend((size, k, ACTS.index(block.act if last else "relu"), int(last)))
    return found


def _cuda_chain(x: Tensor, blocks: Sequence[Link]) -> CudaChain | None:
    chain, sizes = parameters(blocks), (x.element_size(), *x.shape[1:])
    fits = torch.ops.fused_res.res_chain_fits(x.device.index, *sizes, chain.program)
    return chain if fits else None


def _belongs(conv: ConvNorm, x: Tensor) -> bool:
    """Whether the dtypes, shapes and devices of a convolution suit the CUDA kernel and ``x``."""
    if conv.norm is not None and (conv.norm.training or conv.norm.running_mean is None):
        return False
    channels = [t for t in (conv.bias, *(conv.norm or ())[:4]) if t is not None]
    return (
        conv.weight.dtype == x.dtype
        and all(t.shape == conv.weight.shape[:1] for t in channels)
        and all(t.dtype in (x.dtype, torch.float32) for t in channels)
        and all(t.device == x.device for t in (conv.weight, *channels))
    )


def res_chain(x: Tensor, blocks: Sequence[Link], backend: str | None = None) -> Tensor:
    """Residual blocks with identity shortcuts (He et al., 2016), one after the other, BatchNorm by
    its running statistics.

    It is one kernel for channels_last tensors without gradients, if every convolution is 1x1 or 3x3
    and keeps the map's size: on a CPU in float32, for small maps and weights; on a CUDA device in
    float32, bfloat16 or float16, if backend ``cuda`` is named and a map fits in shared memory.
    Otherwise it is one ``conv_bn_act`` for each convolution.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, NCHW or channels_last.
        blocks: at least one; the ``Norm`` of each convolution has ``training=False`` or is None.
        backend: auto, cpu, cuda, triton or eager; default: set by ``fused_res.backend`` or
            ``FUSED_RES_BACKEND``, else auto.

    Returns:
        (N, C, H, W) of x's dtype, in the memory format PyTorch gives it.

    Raises:
        ValueError: a shape, device or value does not fit; a BatchNorm with ``training=True``.
        TypeError: a dtype does not fit.
        BackendUnavailable: the backend was named and cannot run this.

    Examples:
        >>> norm = Norm(torch.zeros(16), torch.ones(16))  # running mean and variance
        >>> conv = ConvNorm(torch.randn(16, 16, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, norm)
        >>> y = res_chain(torch.randn(8, 16, 32, 32), 3 * [Link([conv, conv])])  # three blocks
    """
    if not blocks or not all(block.convs for block in blocks):
        raise ValueError("blocks must be at least one, each of at least one convolution")
    if not torch.compiler.is_compiling() and not under_modes(x) and not _wants_grad(x, blocks):
        chain = prepared_chain(x, blocks, backend)
        if chain is not None:
            return chain(x)
    for block in blocks:
        z, (*inner, last) = x, block.convs
        for conv in inner:
            z = conv_bn_act(z, conv, backend=backend)
        x = conv_bn_act(z, last, x, act=block.act, backend=backend)
    return x


def _wants_grad(x: Tensor, blocks: Sequence[Link]) -> bool:
    if not torch.is_grad_enabled():
        return False
    convs = [c for block in blocks for c in block.convs]
    tensors = [t for c in convs for t in (c.weight, c.bias, *(c.norm or ())[:4])]
    return any(t is not None and t.requires_grad for t in (x, *tensors))
