"""Blocks with one thing in them that is not as in an ordinary residual block."""

import torch
import torch.nn.functional as F
from torch import nn


class Configurable(nn.Module):
    """A basic block with one thing that can be made different."""

    def __init__(self, channels=6, norm=nn.BatchNorm2d, act=nn.ReLU, last=nn.ReLU, extra=None):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn1 = norm(channels)
        self.act = act()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2 = norm(channels)
        self.extra = nn.Identity() if extra is None else extra
        self.last = last()

    def branch(self, x):
        return self.extra(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))

    def forward(self, x):
        return self.last(self.branch(x) + x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def variant(forward, **parts):
    """``Configurable`` with another forward, and parts put on it."""

    def make():
        module = type("Variant", (Configurable,), {"forward": forward})()
        for name, part in parts.items():
            setattr(module, name, part if isinstance(part, nn.Module) else part())
        return module

    return make


def hooked():
    module = Configurable()
    module.bn1.register_forward_hook(lambda m, args, out: out * 2)
    return module


def backward_hooked():
    module = Configurable()
    module.act.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    return module


def changed(change):
    def make():
        module = Configurable()
        change(module)
        return module

    return make


def same_conv_twice():
    module = Configurable()
    module.conv2 = module.conv1
    return module


def same_norm_twice():
    module = Configurable()
    module.bn2 = module.bn1
    return module


def two_adds(self, x):
    h = self.bn1(self.conv1(x)) + x
    return self.last(self.bn2(self.conv2(self.act(h))) + x)


def used_twice(self, x):
    h = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
    return self.last(h + x) * h.mean()


def exit_inside(self, x):
    h = self.act(self.bn1(self.conv1(x)))
    return self.last(self.bn2(self.conv2(h)) + h)


def norm_used_twice(self, x):
    h = self.bn1(self.conv1(x))
    return self.last(self.bn2(self.conv2(self.act(h))) + h)


def depends_on_data(self, x):
    return self.last(self.branch(x) + x) if x.sum() > 0 else x


def functional_dropout(self, x):
    h = F.dropout(self.bn1(self.conv1(x)).relu(), 0.5, training=self.training)
    return self.last(self.bn2(self.conv2(h)) + x)


def only_in_training(self, x):
    out = self.branch(x)
    return self.last(out + x) if self.training else self.last(out)


def scaled(self, x):
    return self.last(torch.add(x, self.branch(x), alpha=0.5))


def two_outputs(self, x):
    out = self.last(self.branch(x) + x)
    return out, out.mean()


def activation_before_norm(self, x):
    return self.last(self.bn2(self.conv2(self.bn1(self.act(self.conv1(x))))) + x)
