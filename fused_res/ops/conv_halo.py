"""A convolution of few channels in CUDA C++: for ``conv_bn_act``, and with the ends of training.

1x1 or 3x3, of stride 1, to a map of the same size, of up to 64 channels in and out, channels_last.
Each patch of the map is read once, into shared memory, where the weights are too:
``csrc/cuda/conv_halo.cu``. Parameters are read as they are at every call.
"""

from __future__ import annotations

import torch

from . import library

# act: of reference.ACTS; tf32: whether float32 may be multiplied in TF32.
library.define(
    "conv_halo(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? residual, int act, bool tf32) "
    "-> Tensor"
)
# The convolution and, of y as it is rounded, mean, sum of squared deviations and number of values
# of each thread block's part, (blocks, 3, K) in float32: as kernels/training_convolution.py has it.
library.define(
    "conv_halo_statistics(Tensor x, Tensor weight, Tensor? bias, bool tf32) "
    "-> (Tensor y, Tensor partial)"
)
# The gradient of the convolution's input, times the mask of the ReLU that made that of `a` by
# `stats` of bn_act, (5, C); and of each block its sum and that of it times (a - mean), (blocks, 2,
# C) in float32.
library.define(
    "conv_halo_gradient(Tensor dy, Tensor weight, Tensor a, Tensor stats, bool tf32) "
    "-> (Tensor dx, Tensor partial)"
)
# Whether a CUDA device has the shared memory for it; bytes: of an element.
library.define(
    "conv_halo_fits(int device, int bytes, int images, int height, int width, int channels, "
    "int out_channels, int size) -> bool"
)
MOST_CHANNELS = 64


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
