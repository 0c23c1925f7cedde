"""Winograd's convolution of 3x3 kernels on a CPU (Lavin and Gray, 2015): what ``conv_bn_act`` runs
where it wins.

Tiles of 2x2 outputs have the error of a direct convolution. Tiles of 4x4 have up to twice as much
(relative RMS at most 5e-6), at a quarter of the multiplications, and are for inference only.
"""

from . import library

# u: [point][panel of 32 channels out][channel][32], the weight times scale.
library.define("winograd_weight(Tensor weight, Tensor? scale, int tile) -> Tensor u")
