"""A convolution of few channels in CUDA C++: for ``conv_bn_act``, and for training.

It is 1x1 or 3x3 with stride 1, keeps the size of the map, has at most 64 channels in and out, and
is channels_last. ``csrc/cuda/conv_halo.cu`` keeps the weights in shared memory and reads each patch
of the map into it once. Every call reads the parameters anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch.backends import STATUS
from ..dispatch.inference_conv import allows_tf32
from ..reference import ConvNorm
from . import library

# act: of reference.ACTS; tf32: whether float32 may be multiplied in TF32.
library.define(
    "conv_halo(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? residual, int act, bool tf32) "
    "-> Tensor"
)
# partial: (blocks, 3, K), float32: mean, sum of squared deviations and number of values of each
# thread block's share of the rounded y, as in kernels/training_convolution.py.
library.define(
    "conv_halo_statistics(Tensor x, Tensor weight, Tensor? bias, bool tf32) "
    "-> (Tensor y, Tensor partial)"
)
# The convolution's input is ReLU(BatchNorm(a)), with bn_act's `stats` of a, (5, C).
# dx: the gradient of that input, times the ReLU's mask. partial: (blocks, 2, C), float32: each
# thread block's sums of dx and of dx * (a - mean).
library.define(
    "conv_halo_gradient(Tensor dy, Tensor weight, Tensor a, Tensor stats, bool tf32) "
    "-> (Tensor dx, Tensor partial)"
)
# Whether a CUDA device has enough shared memory; bytes: of an element. epilogue: which of the three
# ops above, by place: the sums of the others need more than the first.
library.define(
    "conv_halo_fits(int device, int bytes, int images, int height, int width, int channels, "
    "int out_channels, int size, int epilogue) -> bool"
)
AFFINE, STATISTICS, GRADIENT = range(3)
MOST_CHANNELS = 64


def unsuited(conv: ConvNorm) -> str | None:
    """Why the kernel cannot run a convolution of any input; None where it can run some."""
    k, c, r, s = conv.weight.shape
    if (r, s) not in ((1, 1), (3, 3)) or conv.groups != 1:
        return "the convolution is not a 1x1 or 3x3 of one group"
    if tuple(conv.stride) != (1, 1) or tuple(conv.dilation) != (1, 1):
        return "the convolution has a stride or dilation"
    if tuple(conv.padding) != (r // 2, r // 2):
        return "the output is not of the input's size"
    if max(k, c) > MOST_CHANNELS:
        return f"it has more than {MOST_CHANNELS} channels"
    return None


def why_not(x: Tensor, conv: ConvNorm, epilogue: int = AFFINE) -> str | None:
    """Why the kernel cannot run a convolution of x; None where it can. Ignores its norm."""
    if not x.is_cuda:
        return "it is not on a CUDA device"
    reason = unsuited(conv)
    if reason is not None or x.size(0) == 0:
        return reason
    (n, _, h, w), (k, c, r, _) = x.shape, conv.weight.shape
    sizes = x.element_size(), n, h, w, c, k, r
    if not torch.ops.fused_res.conv_halo_fits(x.device.index, *sizes, epilogue):
        return "its weights do not fit in the device's shared memory"
    return None


def trains(x: Tensor, conv: ConvNorm) -> bool:
    """Whether the kernel can run a convolution of x in training, forward and backward."""
    here = x.is_cuda and STATUS["cuda"] is None and x.numel() > 0 and conv.weight.dtype == x.dtype
    if not here or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    turned = conv._replace(weight=conv.weight.transpose(0, 1))
    dy = x[:, :1].expand(-1, len(conv.weight), -1, -1)
    return why_not(x, conv, STATISTICS) is None and why_not(dy, turned, GRADIENT) is None


def convolve(x: Tensor, conv: ConvNorm) -> tuple[Tensor, Tensor]:
    """The convolution and its partial statistics: ``conv_halo_statistics``."""
    op = torch.ops.fused_res.conv_halo_statistics
    return op(x, conv.weight, conv.bias, allows_tf32())


def input_gradient(dy: Tensor, conv: ConvNorm, a: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """The masked gradient of the input and its partial sums: ``conv_halo_gradient``."""
    return torch.ops.fused_res.conv_halo_gradient(dy, conv.weight, a, stats, allows_tf32())


def _map(x, channels: int):
    n, _, h, w = x.shape
    return x.new_empty((n, channels, h, w)).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("fused_res::conv_halo", lib=library)
def _(x, weight, bias, mean, var, norm_weight, norm_bias, eps, residual, act, tf32):
    return _map(x, weight.size(0))


@torch.library.register_fake("fused_res::conv_halo_statistics", lib=library)
def _(x, weight, bias, tf32):
    blocks = torch.library.get_ctx().new_dynamic_size()
    return _map(x, weight.size(0)), x.new_empty((blocks, 3, weight.size(0)), dtype=torch.float32)


@torch.library.register_fake("fused_res::conv_halo_gradient", lib=library)
def _(dy, weight, a, stats, tf32):
    blocks = torch.library.get_ctx().new_dynamic_size()
    return _map(dy, weight.size(1)), dy.new_empty((blocks, 2, weight.size(1)), dtype=torch.float32)
