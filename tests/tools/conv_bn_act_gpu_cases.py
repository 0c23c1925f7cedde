"""Calls of conv_bn_act at real sizes, for the tests of its implementations on a GPU."""

import torch

from fused_res.reference import ConvNorm, Norm


def image(*shape):
    return torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last)


def stage(c, k, size, stride=1, dilation=1, groups=1, bias=False):
    weight = torch.randn(k, c // groups, size, size, device="cuda")
    weight *= (2 * groups / (c * size**2)) ** 0.5
    per_channel = [torch.rand(k, device="cuda") + low for low in (-0.5, 0.3, 0.5, -0.5)]
    return ConvNorm(
        weight.contiguous(memory_format=torch.channels_last),
        torch.randn(k, device="cuda") if bias else None,
        (stride, stride),
        (dilation * (size // 2),) * 2,
        (dilation, dilation),
        groups,
        Norm(*per_channel),
    )


CALLS = {
    "64 3x3": lambda: dict(x=image(32, 64, 56, 56), conv=stage(64, 64, 3)),
    "64 3x3 residual": lambda: dict(
        x=image(8, 64, 56, 56), conv=stage(64, 64, 3), residual=image(8, 64, 56, 56)),
    "256 3x3 of a small map": lambda: dict(
        x=image(8, 256, 14, 14), conv=stage(256, 256, 3), residual=image(8, 256, 14, 14)),
    "512 3x3 of a 7x7 map": lambda: dict(
        x=image(16, 512, 7, 7), conv=stage(512, 512, 3), residual=image(16, 512, 7, 7)),
    "one image": lambda: dict(x=image(1, 512, 7, 7), conv=stage(512, 512, 3)),
    "1x1": lambda: dict(
        x=image(8, 64, 56, 56), conv=stage(64, 256, 1), residual=image(8, 256, 56, 56)),
    "1x1 of many channels": lambda: dict(x=image(8, 2048, 7, 7), conv=stage(2048, 512, 1)),
    "stride 2": lambda: dict(x=image(8, 128, 56, 56), conv=stage(128, 128, 3, 2)),
    "stride 2, odd": lambda: dict(x=image(8, 64, 15, 13), conv=stage(64, 72, 3, 2)),
    "projection": lambda: dict(
        x=image(8, 64, 28, 28), conv=stage(64, 256, 1), residual=image(8, 128, 56, 56),
        shortcut=stage(128, 256, 1, 2, bias=True)),
    "projection of a basic block": lambda: dict(
        x=image(8, 128, 28, 28), conv=stage(128, 128, 3), residual=image(8, 64, 56, 56),
        shortcut=stage(64, 128, 1, 2)),
    "concat": lambda: dict(
        x=image(8, 64, 14, 14), conv=stage(64, 64, 3), residual=image(8, 48, 14, 14),
        concat=True),
    "ReLU before the add": lambda: dict(
        x=image(64, 32, 16, 16), conv=stage(32, 32, 3), residual=image(64, 32, 16, 16),
        act="relu_before_add"),
    "dilation": lambda: dict(x=image(4, 64, 20, 20), conv=stage(64, 64, 3, 1, 2)),
    "groups": lambda: dict(x=image(4, 64, 20, 20), conv=stage(64, 128, 3, 1, 1, 4)),
    "depthwise": lambda: dict(x=image(4, 96, 20, 20), conv=stage(96, 96, 3, 1, 1, 96)),
    "stem": lambda: dict(x=image(4, 3, 224, 224), conv=stage(3, 64, 7, 2)),
    "odd channels": lambda: dict(x=image(5, 13, 9, 7), conv=stage(13, 37, 3, bias=True)),
}  # fmt: skip
