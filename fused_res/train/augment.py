"""Prepares batches for a net: normalises them and, in training, crops, flips and cuts out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Augment(NamedTuple):
    """The random changes of an image.

    crop: pixels of padding on every side; a random crop then has the image's size again (He et al.,
        2016). 0: none.
    flip: mirror half of the images.
    cutout: side of a blanked square in pixels; it may lie partly outside (DeVries and Taylor,
        2017). 0: none.
    """

    crop: int = 4
    flip: bool = True
    cutout: int = 0


def prepare(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    augment: Augment | None,
    generator: torch.Generator | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalises a batch and augments it, on its device.

    Padding and cut-outs are 0 after normalisation, the mean colour.

    Args:
        images: (N, 3, H, W), uint8.
        mean, std: (3,), of pixels from 0 to 1.
        augment: None in validation.
        generator: on the CPU, so that every device gets the same numbers; unused in validation.

    Returns:
        (N, 3, H, W), ``dtype``, channels_last.

    Raises:
        ValueError: the images are not uint8 (N, 3, H, W), or a size in ``augment`` is negative.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)} must be uint8 (N, 3, H, W)")
    device = images.device
    mean, std = mean.to(device), std.to(device)
    if augment is None:
        pixels = images.permute(0, 2, 3, 1).contiguous()
        return _normalised(pixels, mean, std).to(dtype).permute(0, 3, 1, 2)
    if augment.crop < 0 or augment.cutout < 0:
        raise ValueError(f"augment: {augment} must not have negative sizes")
    n, _, height, width = images.shape
    limits = (2 * augment.crop + 1, 2 * augment.crop + 1, 2, height, width)
    drawn = [torch.randint(limit, (n, 1), generator=generator) for limit in limits]
    top, left, flipped, y, x = torch.stack(drawn).to(device)

    rows = torch.arange(height, device=device) + top - augment.crop
    columns = torch.arange(width, device=device) + left - augment.crop
    if augment.flip:
        columns = torch.where(flipped == 1, columns.flip(1), columns)
    # two indices with a slice between them give (N, H, W, 3), the order of channels_last
    image = torch.arange(n, device=device)[:, None, None]
    pixels = images[
        image, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    shown = _within(rows, 0, height)[:, :, None] & _within(columns, 0, width)[:, None]
    if augment.cutout:
        y, x = y - augment.cutout // 2, x - augment.cutout // 2
        hole_rows = _within(torch.arange(height, device=device), y, augment.cutout)
        hole_columns = _within(torch.arange(width, device=device), x, augment.cutout)
        shown &= ~(hole_rows[:, :, None] & hole_columns[:, None])
    return (_normalised(pixels, mean, std) * shown[..., None]).to(dtype).permute(0, 3, 1, 2)


def _normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (pixels / 255 - mean) / std


def _within(index: Tensor, start: int | Tensor, length: int) -> Tensor:
    return (index >= start) & (index < start + length)
