"""scikit-learn's handwritten digits, ready to train on."""

from typing import NamedTuple

from torch import Tensor

from ..train import data
from ..train.augment import prepare


class Data(NamedTuple):
    """Images (N, 3, 32, 32), float32, channels_last, normalised; labels (N,), int64."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    val_pictures: Tensor  # before normalisation, uint8


def load(count: int | None = None, seed: int = 0) -> Data:
    """The digits, split 4 : 1 into training and validation.

    Args:
        count: number of images; default: all.
        seed: for the order and the colours.
    """
    _, _, train, train_labels, val, val_labels, _ = data.load("digits", seed=seed)
    if count is not None:
        split = count * 4 // 5
        train, train_labels = train[:split], train_labels[:split]
        val, val_labels = val[: count - split], val_labels[: count - split]
    mean, std = data.statistics(train)
    train_images, val_images = (prepare(part, mean, std, None, None) for part in (train, val))
    return Data(train_images, train_labels, val_images, val_labels, val)
