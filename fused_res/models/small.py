"""Small nets for images of 32x32 pixels: the steps from a plain CNN to a deep residual net.

All map (N, 3, 32, 32) to (N, num_classes). All raise a ValueError for an argument out of range; the
message names it. ``block`` is ``fused_res.reference.ResBlock`` or ``fused_res.FusedResBlock``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import ResBlock
from .resnet import check_at_least


class BlockNet(nn.Module):
    """A 3x3 convolution and ReLU, residual blocks, average pooling, a linear layer; images of any
    size.

    Args:
        kind, skip, relu, bias, dropout: of each block, as in ``fused_res.reference.ResBlock``.
        stride: of the first block.
        width: channels of the stem and of every branch.
        n_blocks: number of blocks.
        num_classes: number of logits.
    """

    def __init__(
        self,
        kind: str = "basic",
        *,
        skip: str | None = None,
        relu: str | None = None,
        stride: int = 1,
        bias: bool | None = None,
        dropout: float = 0.0,
        width: int = 64,
        n_blocks: int = 1,
        num_classes: int = 10,
        block: type[nn.Module] = ResBlock,
    ) -> None:
        super().__init__()
        check_at_least(1, width=width, n_blocks=n_blocks, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.blocks, channels = nn.Sequential(), width
        options = {"kind": kind, "skip": skip, "relu": relu, "bias": bias, "dropout": dropout}
        for i in range(n_blocks):
            self.blocks.append(block(channels, width, 1 if i else stride, **options))
            channels = channels + width if skip == "concat" else width
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.conv1(x)))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


class TwoBlockNet(nn.Module):
    """Two plain blocks, 3 to ``width`` and on to ``2 * width`` channels, a ReLU between them, then
    average pooling and a linear layer; images of any size."""

    def __init__(
        self, width: int = 64, *, num_classes: int = 10, block: type[nn.Module] = ResBlock
    ) -> None:
        super().__init__()
        check_at_least(1, width=width, num_classes=num_classes)
        self.block1 = block(3, width, kind="plain", relu="after")
        self.block2 = block(width, 2 * width, kind="plain", relu="none")
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.block1(x))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


class DeepCNN(nn.Module):
    """Convolution, BatchNorm, ReLU, pooling; ``n_blocks`` basic blocks at 16x16; pooling to 8x8,
    dropout, a linear layer.

    Args:
        n_blocks: number of blocks.
        width: channels throughout.
        bias: whether the blocks' convolutions have a bias.
        dropout: probability of ``nn.Dropout`` on the linear layer's input.
        num_classes: number of logits.
    """

    def __init__(
        self,
        n_blocks: int = 2,
        *,
        width: int = 32,
        bias: bool = True,
        dropout: float = 0.5,
        num_classes: int = 10,
        block: type[nn.Module] = ResBlock,
    ) -> None:
        super().__init__()
        check_at_least(1, n_blocks=n_blocks, width=width, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(block(width, width, bias=bias) for _ in range(n_blocks)))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * 8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        out = F.max_pool2d(self.blocks(out), 2)
        return self.fc(self.dropout(out.flatten(1)))


class Net(nn.Module):
    """Two 3x3 convolutions of 16 and 8 channels, each with tanh and pooling, two linear layers.
    Each step is a module."""

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        check_at_least(1, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.act1 = nn.Tanh()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)
        self.act2 = nn.Tanh()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(8 * 8 * 8, 32)
        self.act3 = nn.Tanh()
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool1(self.act1(self.conv1(x)))
        out = self.pool2(self.act2(self.conv2(out)))
        return self.fc2(self.act3(self.fc1(out.flatten(1))))


class NetFunctional(nn.Module):
    """``Net`` with the same parameters, with functions for tanh and pooling; the convolutions have
    ``n_chans1`` and half as many channels."""

    def __init__(self, n_chans1: int = 16, *, num_classes: int = 10) -> None:
        super().__init__()
        check_at_least(2, n_chans1=n_chans1)
        check_at_least(1, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, n_chans1, 3, padding=1)
        self.conv2 = nn.Conv2d(n_chans1, n_chans1 // 2, 3, padding=1)
        self.fc1 = nn.Linear(8 * 8 * (n_chans1 // 2), 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(torch.tanh(self.conv1(x)), 2)
        out = F.max_pool2d(torch.tanh(self.conv2(out)), 2)
        return self.fc2(torch.tanh(self.fc1(out.flatten(1))))


class NetWidth(NetFunctional):
    """``NetFunctional`` with 32 and 16 channels, or others."""

    def __init__(self, n_chans1: int = 32, *, num_classes: int = 10) -> None:
        super().__init__(n_chans1, num_classes=num_classes)


class NetDropout(NetWidth):
    """``NetWidth`` with ``nn.Dropout2d`` of probability ``dropout`` after each pooling."""

    def __init__(self, n_chans1: int = 32, *, dropout: float = 0.4, num_classes: int = 10) -> None:
        super().__init__(n_chans1, num_classes=num_classes)
        self.conv1_dropout = nn.Dropout2d(dropout)
        self.conv2_dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1_dropout(F.max_pool2d(torch.tanh(self.conv1(x)), 2))
        out = self.conv2_dropout(F.max_pool2d(torch.tanh(self.conv2(out)), 2))
        return self.fc2(torch.tanh(self.fc1(out.flatten(1))))


class NetBatchNorm(NetWidth):
    """``NetWidth`` with a BatchNorm between each convolution and its tanh."""

    def __init__(self, n_chans1: int = 32, *, num_classes: int = 10) -> None:
        super().__init__(n_chans1, num_classes=num_classes)
        self.conv1_batchnorm = nn.BatchNorm2d(n_chans1)
        self.conv2_batchnorm = nn.BatchNorm2d(n_chans1 // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(torch.tanh(self.conv1_batchnorm(self.conv1(x))), 2)
        out = F.max_pool2d(torch.tanh(self.conv2_batchnorm(self.conv2(out))), 2)
        return self.fc2(torch.tanh(self.fc1(out.flatten(1))))


class NetDepth(nn.Module):
    """Three 3x3 convolutions, each with ReLU and pooling, then two linear layers. The first
    convolution has ``n_chans1`` channels, the second and third half as many."""

    def __init__(self, n_chans1: int = 32, *, num_classes: int = 10) -> None:
        super().__init__()
        check_at_least(2, n_chans1=n_chans1)
        check_at_least(1, num_classes=num_classes)
        half = n_chans1 // 2
        self.conv1 = nn.Conv2d(3, n_chans1, 3, padding=1)
        self.conv2 = nn.Conv2d(n_chans1, half, 3, padding=1)
        self.conv3 = nn.Conv2d(half, half, 3, padding=1)
        self.fc1 = nn.Linear(4 * 4 * half, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out = F.max_pool2d(F.relu(self.conv2(out)), 2)
        out = F.max_pool2d(F.relu(self.conv3(out)), 2)
        return self.fc2(F.relu(self.fc1(out.flatten(1))))


class NetRes(NetDepth):
    """``NetDepth`` with the third convolution's input added to its ReLU, before the pooling
    (identity mapping)."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out1 = F.max_pool2d(F.relu(self.conv2(out)), 2)
        out = F.max_pool2d(F.relu(self.conv3(out1)) + out1, 2)
        return self.fc2(F.relu(self.fc1(out.flatten(1))))


class NetResDeep(nn.Module):
    """A convolution, ReLU and pooling, ``n_blocks`` blocks of one convolution each at 16x16,
    pooling, two linear layers.

    The blocks start with ``kaiming_normal_`` convolutions and BatchNorms of weight 0.5 and bias 0.

    Args:
        n_chans1: channels throughout.
        n_blocks: number of blocks.
        shared: one block, called ``n_blocks`` times, instead of separate ones.
        num_classes: number of logits.
    """

    def __init__(
        self,
        n_chans1: int = 32,
        n_blocks: int = 100,
        *,
        shared: bool = False,
        num_classes: int = 10,
        block: type[nn.Module] = ResBlock,
    ) -> None:
        super().__init__()
        check_at_least(1, n_chans1=n_chans1, n_blocks=n_blocks, num_classes=num_classes)

        def single() -> nn.Module:
            made = block(n_chans1, n_chans1, kind="single")
            nn.init.kaiming_normal_(made.conv1.weight, nonlinearity="relu")
            nn.init.constant_(made.bn1.weight, 0.5)
            nn.init.zeros_(made.bn1.bias)
            return made

        self.conv1 = nn.Conv2d(3, n_chans1, 3, padding=1)
        blocks = n_blocks * [single()] if shared else [single() for _ in range(n_blocks)]
        self.resblocks = nn.Sequential(*blocks)
        self.fc1 = nn.Linear(8 * 8 * n_chans1, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out = F.max_pool2d(self.resblocks(out), 2)
        return self.fc2(F.relu(self.fc1(out.flatten(1))))
