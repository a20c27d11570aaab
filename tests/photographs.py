"""Batches of real image statistics: crops of scikit-learn's two sample photographs.

Noise makes a Gram close to a multiple of the identity, and hides what goes wrong on images:
neighbouring pixels are nearly equal, so the Gram of patches is badly conditioned.
"""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, per colour, on the [0, 1] range
STD = (0.229, 0.224, 0.225)


@cache
def _originals() -> tuple[Tensor, ...]:
    """Two photographs, (3, 427, 640) float32 in [0, 1]."""
    images = load_sample_images().images
    return tuple(torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in images)


def _crops(batch: int, channels: int, size: int, seed: int) -> Tensor:
    """Square crops of 4/10 to all of a photograph's height, resized, half of them flipped.

    Returns:
        (batch, channels, size, size) in [0, 1]. Channels beyond three repeat the colours; one
        channel is the red one.
    """
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for index in range(batch):
        original = _originals()[index % 2]
        height, width = original.shape[1:]
        share, top, left, flip = torch.rand(4, generator=generator).tolist()
        side = int((0.4 + 0.6 * share) * height)
        y, x = int(top * (height - side)), int(left * (width - side))
        crop = original[None, :, y : y + side, x : x + side]
        crop = interpolate(
            crop, (size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]
        crops.append(crop.flip(2) if flip < 0.5 else crop)
    return torch.stack(crops)[:, [c % 3 for c in range(channels)]]


def photographs(
    batch: int, channels: int = 3, size: int = 32, standardised: bool = True, seed: int = 0
) -> Tensor:
    """A batch of photographs, the same for the same arguments.

    Args:
        batch: Number of crops, taken from the two photographs in turn.
        channels: Colour channels; more than three repeat the colours.
        size: Height and width in pixels.
        standardised: Whether to take out ImageNet's mean and standard deviation; else the range is
            [0, 1].
        seed: Of the crops.

    Returns:
        (batch, channels, size, size), float32, contiguous.
    """
    crops = _crops(batch, channels, size, seed)
    if not standardised:
        return crops.contiguous()
    colours = [c % 3 for c in range(channels)]
    mean = torch.tensor(MEAN)[colours].view(-1, 1, 1)
    std = torch.tensor(STD)[colours].view(-1, 1, 1)
    return ((crops - mean) / std).contiguous()


def photograph_range_255(batch: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """The same crops on [0, 255], in whole numbers, as a decoder gives them; float32."""
    return (_crops(batch, channels, size, seed) * 255).round().contiguous()
