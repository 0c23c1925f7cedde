"""Example blocks and nets: those of the source texts, other styles, and odd ones.

Attribute names, ReLU styles, adds and shortcuts differ on purpose. Nothing here knows of fused_res.
"""

import torch
import torch.nn.functional as F
from torch import nn

# --- the residual blocks and nets of the source texts, written by hand as users write them


class PlainBlock(nn.Module):  # S1
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(c_out, c_out, 3, padding=1)
        fits = c_in == c_out and stride == 1
        self.match = nn.Identity() if fits else nn.Conv2d(c_in, c_out, 1, stride=stride)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + self.match(x)


class TwoBlockNet(nn.Module):  # S2
    def __init__(self):
        super().__init__()
        self.one = PlainBlock(3, 64)
        self.two = PlainBlock(64, 128, stride=2)

    def forward(self, x):
        return self.two(F.relu(self.one(x)))


class BasicBlock(nn.Module):  # S3; S5 with bias=True
    expansion = 1

    def __init__(self, in_planes, planes, stride=1, bias=False):
        super().__init__()
        self.c1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=bias)
        self.n1 = nn.BatchNorm2d(planes)
        self.c2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=bias)
        self.n2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=bias), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        out = F.relu(self.n1(self.c1(x)))
        out = self.n2(self.c2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):  # S4's other block
    expansion = 4

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(in_planes, planes, 1, bias=False), nn.BatchNorm2d(planes), nn.ReLU()
        )
        self.conv = nn.Sequential(
            nn.Conv2d(planes, planes, 3, stride, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
        )
        self.expand = nn.Sequential(
            nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        )
        self.proj, self.proj_norm = None, None
        if stride != 1 or in_planes != 4 * planes:
            self.proj = nn.Conv2d(in_planes, 4 * planes, 1, stride, bias=False)
            self.proj_norm = nn.BatchNorm2d(4 * planes)

    def forward(self, x):
        skip = x
        if self.proj is not None:
            skip = self.proj_norm(self.proj(x))
        h = self.expand(self.conv(self.reduce(x)))
        return torch.relu_(torch.add(skip, h))


class ResNet(nn.Module):  # S3 with BasicBlock and (2, 2, 2, 2); S4
    def __init__(self, block, counts, width=64, classes=10):
        super().__init__()
        self.in_planes = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(
            *(
                self._make_layer(block, width * 2**i, n, 1 if i == 0 else 2)
                for i, n in enumerate(counts)
            )
        )
        self.head = nn.Linear(self.in_planes, classes)

    def _make_layer(self, block, planes, count, stride):
        layers = []
        for s in [stride] + [1] * (count - 1):
            layers.append(block(self.in_planes, planes, s))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ResidualBlock(nn.Module):  # S5: "add before the activation", ReLU modules
    def __init__(self, channels, bias):
        super().__init__()
        self.conv_a = nn.Conv2d(channels, channels, kernel_size=3, padding="same", bias=bias)
        self.bn_a = nn.BatchNorm2d(channels)
        self.act_a = nn.ReLU(inplace=True)
        self.conv_b = nn.Conv2d(channels, channels, kernel_size=3, padding="same", bias=bias)
        self.bn_b = nn.BatchNorm2d(channels)
        self.act_b = nn.ReLU()

    def forward(self, inputs):
        identity = inputs
        y = self.act_a(self.bn_a(self.conv_a(inputs)))
        y = self.bn_b(self.conv_b(y))
        y = y.add(identity)
        return self.act_b(y)


class SkipConnectionBlock(nn.Module):  # S6
    def __init__(self, c_in, c_out, norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(c_out) if norm else nn.Identity()

    def forward(self, x):
        out = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return torch.cat((x, out), dim=1)


class TransformSkip(nn.Module):  # S7: the shortcut may be anything that fits
    def __init__(self, body, transform=None):
        super().__init__()
        self.body = body
        self.transform = transform

    def forward(self, x):
        shortcut = x if self.transform is None else self.transform(x)
        return F.relu(self.body(x) + shortcut, inplace=True)


class DeepCNN(nn.Module):  # S8
    def __init__(self, blocks=2, classes=10):
        super().__init__()
        self.begin = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.res = nn.ModuleList([ResidualBlock(32, bias=True) for _ in range(blocks)])
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(32 * 8 * 8, classes)

    def forward(self, x):
        x = self.begin(x)
        for block in self.res:
            x = block(x)
        return self.fc(self.drop(self.pool(x).flatten(1)))


class NetRes(nn.Module):  # S12: the add is between two halves of one net
    def __init__(self, n_chans1=32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, n_chans1, 3, padding=1)
        self.conv2 = nn.Conv2d(n_chans1, n_chans1 // 2, 3, padding=1)
        self.conv3 = nn.Conv2d(n_chans1 // 2, n_chans1 // 2, 3, padding=1)
        self.fc1 = nn.Linear(4 * 4 * n_chans1 // 2, 32)
        self.fc2 = nn.Linear(32, 2)

    def forward(self, x):
        out = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        out = F.max_pool2d(torch.relu(self.conv2(out)), 2)
        out1 = out
        out = F.max_pool2d(torch.relu(self.conv3(out)) + out1, 2)
        return self.fc2(torch.relu(self.fc1(out.flatten(1))))


class ResBlock(nn.Module):  # S13
    def __init__(self, n_chans):
        super().__init__()
        self.conv = nn.Conv2d(n_chans, n_chans, kernel_size=3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm2d(num_features=n_chans)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.constant_(self.batch_norm.weight, 0.5)
        nn.init.zeros_(self.batch_norm.bias)

    def forward(self, x):
        out = self.conv(x)
        out = self.batch_norm(out)
        out = torch.relu(out)
        return out + x


class NetResDeep(nn.Module):  # S13
    def __init__(self, n_chans1=32, n_blocks=10, shared=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, n_chans1, kernel_size=3, padding=1)
        blocks = (
            n_blocks * [ResBlock(n_chans1)]
            if shared
            else [ResBlock(n_chans1) for _ in range(n_blocks)]
        )
        self.resblocks = nn.Sequential(*blocks)
        self.fc1 = nn.Linear(8 * 8 * n_chans1, 32)
        self.fc2 = nn.Linear(32, 2)

    def forward(self, x):
        out = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        out = self.resblocks(out)
        out = F.max_pool2d(out, 2).flatten(1)
        return self.fc2(torch.relu(self.fc1(out)))


# --- other styles in which people write the same block


class Residual(nn.Module):
    """The branch is any module, handed over."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class SequentialResidual(nn.Sequential):
    """A Sequential that adds its input."""

    def forward(self, x):
        return F.relu(super().forward(x) + x)


class Lambda(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


class ParameterFreeShortcut(nn.Module):
    """He et al.'s option A: strided identity, padded with zero channels."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        pad = (c_out - c_in) // 2
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class KeywordStyle(nn.Module):
    """Every call by keyword."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        h = self.norm(input=self.conv(input=x))
        return F.relu(input=torch.add(input=h, other=x), inplace=False)


class WideDropout(nn.Module):
    """Dropout between the convolutions (Zagoruyko and Komodakis), post-activation order."""

    def __init__(self, channels, p=0.3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(p)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.drop(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out)).add_(x)
        return self.relu(out)


# --- blocks with one thing in them that is not as in an ordinary residual block


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
