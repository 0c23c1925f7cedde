"""A direct convolution on a CPU, one of the implementations of ``conv_bn_act``.

It gathers the inputs of some output pixels into the cache and multiplies them there (im2col,
Chellapilla et al., 2006, without the matrix in memory). A block's projection adds depth to the
same product, so its output is never written.
"""

from . import library

# u: [panel of 32 channels out][depth][32]: the weights times their scales, one after the other
# along the depth. The depth of a weight runs over (r, s, c).
library.define("direct_weight(Tensor[] weights, Tensor?[] scales) -> Tensor u")
