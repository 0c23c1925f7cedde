"""Wide residual networks for small images, made of pre-activation blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import check_at_least, kaiming_


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions (He et al., 2016,
    https://arxiv.org/abs/1603.05027), dropout between them (Zagoruyko and Komodakis, 2016).

    Args:
        in_channels, out_channels: channels of the input and of the output.
        stride: of the first convolution. If it is not 1 or the channels differ, the shortcut is a
            1x1 convolution of the first ReLU's output.
        dropout: probability of ``nn.Dropout`` on the second convolution's input.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride), sizes rounded up
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.downsample = None
        if in_channels != out_channels or stride != 1:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return self.conv2(self.dropout(out)) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-widen_factor (Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146).

    A 3x3 convolution to 16 channels, three stages of blocks, BatchNorm, ReLU, pooling and a linear
    layer. The second and third stage start with a stride of 2.

    Args:
        depth: 6 n + 4, with n blocks in each stage.
        widen_factor: the stages have 16, 32 and 64 times as many channels.
        dropout: probability of dropout between the two convolutions of each block.
        num_classes: number of logits.

    Shape:
        (N, 3, H, W) -> (N, num_classes)

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 10,
        *,
        dropout: float = 0.0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        check_at_least(1, depth=depth, widen_factor=widen_factor, num_classes=num_classes)
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"depth={depth} must be 6 n + 4: 10, 16, 22, 28, ...")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels = 16
        for stage in range(3):
            layer = nn.Sequential()
            for i in range(count):
                out = 16 * widen_factor * 2**stage
                stride = 2 if stage and not i else 1
                layer.append(PreActBlock(channels, out, stride, dropout=dropout))
                channels = out
            setattr(self, f"layer{stage + 1}", layer)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        kaiming_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn1(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
