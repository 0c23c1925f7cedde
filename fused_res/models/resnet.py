"""ResNet, ResNeXt and torchvision's wide ResNet: one class."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..reference import ResBlock

STEMS = ("imagenet", "cifar")
INITS = ("kaiming", "default")


def check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def check_one_of(known: Sequence[str], **values: str) -> None:
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of: {', '.join(known)}")


def kaiming_(net: nn.Module) -> None:
    """Draws the weights of all convolutions anew: normal, fan_out (He et al., 2015)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """A residual network (He et al., 2016, https://arxiv.org/abs/1512.03385).

    With ``groups`` it is a ResNeXt (Xie et al., 2017, https://arxiv.org/abs/1611.05431). Modules
    have torchvision's names, ``conv1 bn1 layer1 layer2 ... fc``, so its checkpoints load.

    Args:
        kind: the blocks' ``kind``, as in ``fused_res.reference.ResBlock``. A bottleneck has four
            times the channels of its stage at its output.
        counts: number of blocks in each stage. Each stage but the first starts with a stride of 2.
        width: channels of the stem and the first stage; they double from stage to stage.
        groups: groups of the 3x3 convolutions in the blocks.
        width_per_group: channels of each group, for every 64 channels of the stage. 128 and one
            group make torchvision's wide ResNets.
        stem: ``imagenet`` (7x7 convolution of stride 2, max pooling of stride 2) or ``cifar`` (3x3
            convolution).
        dropout: probability of ``nn.Dropout`` on the input of each block's last convolution.
        zero_init_residual: start the last BatchNorm of each block with weight 0, so that the block
            starts as its shortcut (Goyal et al., 2017, https://arxiv.org/abs/1706.02677).
        init: of the convolutions: ``kaiming`` (normal, fan_out, as in torchvision: He et al., 2015)
            or ``default`` (as in ``nn.Conv2d``).
        num_classes: number of logits.
        block: ``fused_res.reference.ResBlock`` or ``fused_res.FusedResBlock``.

    Shape:
        (N, 3, H, W) -> (N, num_classes)

    Raises:
        ValueError: an argument is out of range or two do not fit together; the message names them.
    """

    def __init__(
        self,
        kind: str = "basic",
        counts: Sequence[int] = (2, 2, 2, 2),
        *,
        width: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        stem: str = "imagenet",
        dropout: float = 0.0,
        zero_init_residual: bool = False,
        init: str = "kaiming",
        num_classes: int = 10,
        block: type[nn.Module] = ResBlock,
    ) -> None:
        super().__init__()
        check_at_least(1, width=width, width_per_group=width_per_group, num_classes=num_classes)
        if len(counts) < 1:
            raise ValueError(f"counts={counts!r} must have at least one stage")
        check_at_least(1, **{f"counts[{i}]": count for i, count in enumerate(counts)})
        check_one_of(STEMS, stem=stem)
        check_one_of(INITS, init=init)
        if zero_init_residual and kind == "plain":
            raise ValueError("zero_init_residual=True needs a BatchNorm, which kind='plain' lacks")
        if width * width_per_group < 64:
            raise ValueError(
                f"width={width} times width_per_group={width_per_group} must be at least 64"
            )
        large = stem == "imagenet"
        size, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(3, width, size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        channels, self.depth = width, len(counts)
        options = {"kind": kind, "groups": groups, "dropout": dropout}
        for stage, count in enumerate(counts):
            planes = width * 2**stage
            out = 4 * planes if kind == "bottleneck" else planes
            options["width"] = planes * width_per_group // 64 * groups
            layer = nn.Sequential()
            for i in range(count):
                layer.append(block(channels, out, 2 if stage and not i else 1, **options))
                channels = out
            setattr(self, f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        if init == "kaiming":
            kaiming_(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, block):
                    nn.init.zeros_(getattr(module, f"bn{module.depth}").weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.depth + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(self.avgpool(x).flatten(1))
