"""Blocks with inputs of their own, for the tests of every implementation of the op res_block."""

import torch

from fused_res import Norm, reference
from fused_res.reference import ConvNorm

# Of each convolution of the branch, and of the shortcut's (None: the input is added, False: nothing
# is): kernel size and stride; more where they are not the usual ones: channels, padding, dilation.
# Sizes are one number or a pair.
PLANS = {
    "single": ([(3, 1)], None),
    "basic": ([(3, 1), (3, 1)], None),
    "bottleneck": ([(1, 1), (3, 1), (1, 1)], None),
    "projection": ([(3, 2), (3, 1)], (1, 2)),
    "one convolution, nothing added": ([(3, 1)], False),
    "nothing added": ([(3, 2), (1, 1, 20)], False),
}


class Case:
    """A block's inputs in fp64, exactly representable in ``dtype``."""

    wide = torch.float32  # of BatchNorm's parameters

    def __init__(self, plan, dtype, shape=(6, 12, 7, 9), training=True, bias=False, groups=1,
                 layout=torch.contiguous_format):  # fmt: skip
        convs, shortcut = PLANS[plan] if isinstance(plan, str) else plan
        self.dtype = dtype
        n, c, h, w = shape
        usual = c if shortcut is None else 16

        def exact(*size, scale=1.0):
            return (torch.randn(size) * scale).to(dtype).double().contiguous(memory_format=layout)

        def pair(size):
            return size if isinstance(size, tuple) else (size, size)

        def stage(c_in, kernel, stride, c_out=usual, padding=None, dilation=1):
            g = groups if kernel == 3 else 1
            kernel, dilation = pair(kernel), pair(dilation)
            fan = c_in // g * kernel[0] * kernel[1]
            weight = exact(c_out, c_in // g, *kernel, scale=(2 / fan) ** 0.5)
            norm = Norm(
                0.1 * torch.randn(c_out).double(),
                torch.rand(c_out).double() + 0.5,
                torch.rand(c_out).double() + 0.5,
                torch.randn(c_out).double(),
                training,
            )
            if padding is None:
                padding = tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
            extra = torch.randn(c_out).to(dtype).double() if bias else None
            return ConvNorm(weight, extra, pair(stride), pair(padding), dilation, g, norm)

        self.branch, c_in = [], c
        for conv in convs:
            self.branch.append(stage(c_in, *conv))
            c_in = len(self.branch[-1].weight)
        self.shortcut = stage(c, *shortcut) if shortcut else shortcut
        self.x = exact(n, c, h, w)
        like = reference.res_block(self.x, *self.stages(torch.float64)[0])
        self.dy = torch.randn_like(like).to(dtype).double()

    def stages(self, dtype):
        """(branch, shortcut) with fresh leaves, the leaves, and the running statistics."""
        leaves, running = [], []
        wide = torch.float64 if dtype == torch.float64 else self.wide

        def leaf(t, dtype):
            if t is None:
                return None
            leaves.append(t.detach().to(dtype).clone().requires_grad_())
            return leaves[-1]

        def state(t):
            running.append(t.to(wide).clone())
            return running[-1]

        def fresh(stage):
            norm = stage.norm
            return stage._replace(
                weight=leaf(stage.weight, dtype),
                bias=leaf(stage.bias, dtype),
                norm=norm._replace(
                    running_mean=state(norm.running_mean),
                    running_var=state(norm.running_var),
                    weight=leaf(norm.weight, wide),
                    bias=leaf(norm.bias, wide),
                ),
            )

        branch = [fresh(stage) for stage in self.branch]
        return (branch, self.shortcut and fresh(self.shortcut)), leaves, running

    def run(self, call, dtype, act):
        """Output, gradients and running statistics."""
        stages, leaves, running = self.stages(dtype)
        x = self.x.to(dtype).clone().requires_grad_()
        y = call(x, *stages, act)
        grads = torch.autograd.grad(y, [x, *leaves], self.dy.to(dtype))
        return [y.detach(), *grads, *running]
