"""Winograd's convolution of 3x3 kernels on a CPU (Lavin and Gray, 2015), one of the implementations
of ``conv_bn_act``.

Tiles of 2x2 outputs have the error of a direct convolution. Tiles of 4x4 have up to twice the error
(relative RMS at most 5e-6) and a quarter of the multiplications; only inference uses them.
"""

from . import library

# u: [point][panel of 32 channels out][channel][32]: the transform of weight times scale.
library.define("winograd_weight(Tensor weight, Tensor? scale, int tile) -> Tensor u")
