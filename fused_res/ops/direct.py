"""A direct convolution on a CPU: what ``conv_bn_act`` runs where it wins.

The inputs of some output pixels are gathered into the cache and multiplied there (the implicit
form of im2col, Chellapilla et al., 2006). A block's projection is more depth of the same product:
its output is never written.
"""

from . import library

# u: [panel of 32 channels out][depth][32]: the weights times their scales, each (r, s, c) deep, one
# under the other.
library.define("direct_weight(Tensor[] weights, Tensor?[] scales) -> Tensor u")
