"""Residual networks by name, fused or in plain PyTorch.

    net = fused_res.models.create("resnet18", num_classes=1000)
    twin = fused_res.models.create("resnet18", num_classes=1000, fused=False)

The twins have the same ``state_dict``, and with the same ``torch.manual_seed`` the same weights.
"""

from __future__ import annotations

import difflib
import inspect
from typing import NamedTuple

from torch import nn

from ..fuse.swap import fuse_
from ..nn import FusedResBlock
from ..reference import ResBlock
from .resnet import ResNet
from .small import (
    BlockNet,
    DeepCNN,
    Net,
    NetBatchNorm,
    NetDepth,
    NetDropout,
    NetFunctional,
    NetRes,
    NetResDeep,
    NetWidth,
    TwoBlockNet,
)
from .wide_resnet import PreActBlock, WideResNet

__all__ = [
    "BlockNet",
    "DeepCNN",
    "Net",
    "NetBatchNorm",
    "NetDepth",
    "NetDropout",
    "NetFunctional",
    "NetRes",
    "NetResDeep",
    "NetWidth",
    "PreActBlock",
    "ResNet",
    "TwoBlockNet",
    "WideResNet",
    "create",
    "describe",
    "names",
]


class _Model(NamedTuple):
    make: type[nn.Module]
    about: str
    arguments: dict[str, object]


def _model(make: type[nn.Module], about: str, **arguments: object) -> _Model:
    return _Model(make, about, arguments)


def _resnet(about: str, kind: str, counts: tuple[int, ...], **arguments: object) -> _Model:
    return _model(ResNet, about, kind=kind, counts=counts, **arguments)


def _cifar(depth: int) -> _Model:
    about = f"ResNet-{depth} for 32x32 images, with projections (He et al., 2016, section 4.2)"
    return _resnet(about, "basic", 3 * ((depth - 2) // 6,), width=16, stem="cifar")


def _wrn(depth: int, widen_factor: int) -> _Model:
    about = f"WRN-{depth}-{widen_factor} for 32x32 images (Zagoruyko and Komodakis, 2016)"
    return _model(WideResNet, about, depth=depth, widen_factor=widen_factor)


def _wide(depth: int, counts: tuple[int, ...]) -> _Model:
    about = f"Wide ResNet-{depth}-2, torchvision's: ResNet-{depth} with 3x3 twice as wide"
    return _resnet(about, "bottleneck", counts, width_per_group=128)


def _resnext(depth: int, counts: tuple[int, ...], groups: int, width: int) -> _Model:
    about = f"ResNeXt-{depth} {groups}x{width}d (Xie et al., 2017)"
    return _resnet(about, "bottleneck", counts, groups=groups, width_per_group=width)


_50, _101 = (3, 4, 6, 3), (3, 4, 23, 3)
_MODELS = {
    "resnet18": _resnet("ResNet-18 (He et al., 2016)", "basic", (2, 2, 2, 2)),
    "resnet34": _resnet("ResNet-34 (He et al., 2016)", "basic", _50),
    "resnet50": _resnet("ResNet-50 (He et al., 2016)", "bottleneck", _50),
    "resnet101": _resnet("ResNet-101 (He et al., 2016)", "bottleneck", _101),
    "resnet152": _resnet("ResNet-152 (He et al., 2016)", "bottleneck", (3, 8, 36, 3)),
    **{f"resnet{depth}": _cifar(depth) for depth in (20, 32, 44, 56, 110)},
    "resnext50_32x4d": _resnext(50, _50, 32, 4),
    "resnext101_32x8d": _resnext(101, _101, 32, 8),
    "resnext101_64x4d": _resnext(101, _101, 64, 4),
    "wide_resnet50_2": _wide(50, _50),
    "wide_resnet101_2": _wide(101, _101),
    "wrn16_8": _wrn(16, 8),
    "wrn28_10": _wrn(28, 10),
    "wrn40_4": _wrn(40, 4),
    "resnet": _resnet("ResNet of any blocks, counts and width", "basic", (2,) * 4, stem="cifar"),
    "resnet18_cifar": _resnet("ResNet-18 with a 3x3 stem", "basic", (2, 2, 2, 2), stem="cifar"),
    "plain_block": _model(BlockNet, "residual block without BatchNorm", kind="plain", relu="none"),
    "two_blocks": _model(TwoBlockNet, "two blocks without BatchNorm, 64 and 128 channels"),
    "bn_block": _model(BlockNet, "basic block whose convolutions have a bias", bias=True),
    "concat_block": _model(
        BlockNet, "block whose skip connection is concatenated", kind="plain", skip="concat"
    ),
    "projection_block": _model(
        BlockNet, "basic block with a strided 1x1 shortcut", skip="projection", stride=2
    ),
    "deep_cnn": _model(DeepCNN, "CNN with residual blocks, pooling to 8x8 and dropout"),
    "net": _model(Net, "two convolutions with tanh, two linear layers"),
    "net_functional": _model(NetFunctional, "net, its tanh and pooling as functions"),
    "net_width": _model(NetWidth, "net_functional, twice as wide"),
    "net_dropout": _model(NetDropout, "net_width with Dropout2d after each pooling"),
    "net_batchnorm": _model(NetBatchNorm, "net_width with BatchNorm before each tanh"),
    "net_depth": _model(NetDepth, "three convolutions with ReLU, two linear layers"),
    "net_res": _model(NetRes, "net_depth with one skip connection"),
    "net_res_deep": _model(NetResDeep, "100 residual blocks of one convolution each"),
}


def _find(name: str) -> _Model:
    if name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(str(name), _MODELS)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"name={name!r} is not a model: {hint}fused_res.models.names() has all")


def names() -> list[str]:
    """The names of all models, for ``create`` and ``describe``.

    Examples:
        >>> [name for name in fused_res.models.names() if name.startswith("wrn")]
        ['wrn16_8', 'wrn28_10', 'wrn40_4']
    """
    return list(_MODELS)


def describe(name: str) -> str:
    """A description of a model in one line.

    Args:
        name: one of ``names()``.

    Raises:
        ValueError: there is no such model; the message has similar names.

    Examples:
        >>> fused_res.models.describe("resnet18")
        'ResNet-18 (He et al., 2016)'
    """
    return _find(name).about


def create(
    name: str, *, fused: bool = True, num_classes: int = 10, **arguments: object
) -> nn.Module:
    """A model with fresh weights, drawn from PyTorch's default generator.

    Args:
        name: one of ``names()``.
        fused: whether residual blocks run fused, and rows of blocks as chains. False: plain PyTorch
            throughout, with the same ``state_dict``. A net without residual blocks is the same
            either way.
        num_classes: number of logits.
        **arguments: arguments of the model's class, which replace those that the name stands for.

    Returns:
        nn.Module: (N, 3, H, W) -> (N, num_classes), in training mode, in float32 on the CPU (or
            PyTorch's default dtype and device).

    Raises:
        ValueError: there is no such model, or an argument is out of range.
        TypeError: the model takes no such argument.

    Examples:
        >>> net = fused_res.models.create("resnet20", num_classes=10)
        >>> net(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 10])
    """
    made = _find(name)
    parameters = inspect.signature(made.make).parameters
    takes = parameters.keys() - {"block", "num_classes"}
    unknown = arguments.keys() - takes
    if unknown:
        raise TypeError(
            f"model {name!r} takes no argument {', '.join(sorted(unknown))}; "
            f"it takes: {', '.join(sorted(takes | {'num_classes'}))}"
        )
    arguments = {**made.arguments, **arguments, "num_classes": num_classes}
    if fused and "block" in parameters:
        arguments["block"] = FusedResBlock
    net = made.make(**arguments)
    blocks = ResBlock, PreActBlock
    if fused and any(isinstance(module, blocks) for module in net.modules()):
        fuse_(net)  # makes chains of FusedResBlocks too
    return net
