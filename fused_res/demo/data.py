"""scikit-learn's handwritten digits (1797 images of 8x8 pixels) as 32x32 colour images."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Data(NamedTuple):
    """Images (N, 3, 32, 32), float32, channels_last, normalised; labels (N,), int64."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    val_pictures: Tensor  # before normalisation, 0 to 1


def load(count: int | None = None, seed: int = 0) -> Data:
    """The digits, shuffled and split 4 : 1.

    Each image gets an ink and a paper colour of its own, so that colour says nothing of the class.

    Args:
        count: how many images to take; default: all.
        seed: of the order and the colours.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)[:count]
    grey = torch.from_numpy(digits.images).float()[order, None] / 16
    labels = torch.from_numpy(digits.target).long()[order]
    grey = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    ink = 0.6 + 0.4 * torch.rand((len(order), 3, 1, 1), generator=generator)
    paper = 0.4 * torch.rand((len(order), 3, 1, 1), generator=generator)
    pictures = paper + (ink - paper) * grey
    split = len(order) * 4 // 5
    mean = pictures[:split].mean((0, 2, 3), keepdim=True)
    std = pictures[:split].std((0, 2, 3), keepdim=True)
    images = ((pictures - mean) / std).contiguous(memory_format=torch.channels_last)
    return Data(images[:split], labels[:split], images[split:], labels[split:], pictures[split:])
