"""Each image's share of the first layer's update, and what the image looks like to the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_fx.inspection.records import ImageShare
from tract_fx.inspection.spectrum import Spectrum
from tract_fx.reference.observed import ObservedCall

_ENTRIES = 1 << 24
"""Entries of the input that are held in float64 at a time, 128 MiB."""

_ROUNDING = 1e-12
"""Spread relative to the size of numbers that counts as none."""


@dataclass(frozen=True)
class Looks:
    """The images as the layer reads them.

    Attributes:
        brightness: Mean of each image, (images,) in float64.
        contrast: Standard deviation of each image, (images,) in float64.
        minimum: Smallest entry of the batch; NaN where there is none or one is NaN.
        maximum: Largest entry of the batch; NaN as above.
        entries: How many entries an image has.
        channel_means: Mean of each channel over the batch, in float64. A linear layer's input
            counts as one channel.
        channel_stds: Standard deviation of each channel over the batch, in float64.
    """

    brightness: Tensor
    contrast: Tensor
    minimum: float
    maximum: float
    entries: int
    channel_means: Tensor
    channel_stds: Tensor

    @property
    def mean(self) -> float:
        """Mean of all entries; NaN without images."""
        return self.brightness.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation of all entries; NaN without images."""
        between = (self.brightness - self.brightness.mean()).square()
        return (self.contrast.square() + between).mean().sqrt().item()


def looks(call: ObservedCall) -> Looks:
    """Measure the images of a call."""
    images = call.images.flatten(1)
    if not images.numel():
        none = images.new_full((len(images),), math.nan, dtype=torch.float64)
        nan = none.new_full((1,), math.nan)
        return Looks(none, none, math.nan, math.nan, images.shape[1], nan, nan)
    channels = 1 if call.is_linear else call.images.shape[1]
    brightness, contrast = [], []
    means, variances = [], []
    for piece in images.split(max(1, _ENTRIES // images.shape[1])):
        wide = piece.double()
        brightness.append(wide.mean(1))
        contrast.append(wide.std(1, correction=0))
        variance, mean = torch.var_mean(wide.unflatten(1, (channels, -1)), 2, correction=0)
        means.append(mean)
        variances.append(variance)
    low, high = (float(end) for end in torch.aminmax(images))
    within, each = torch.cat(variances), torch.cat(means)
    between = each.var(0, correction=0)
    return Looks(
        torch.cat(brightness),
        torch.cat(contrast),
        low,
        high,
        images.shape[1],
        each.mean(0),
        (within.mean(0) + between).sqrt(),
    )


def image_shares(call: ObservedCall, found: Spectrum, seen: Looks) -> tuple[ImageShare, ...]:
    """Compute each image's share of gW = Σ gW_i, and of Σ gW_i (XᵀX/R + λI)⁻¹."""
    per_image = call.row_count // len(call.images)
    plain, tract, start = [], [], 0
    for rows, outputs in call.chunks():
        assert outputs is not None
        images = (rows.shape[1] // per_image, per_image)
        own = found.coordinates(rows, start).unflatten(1, images)
        terms = _condensed(outputs.unflatten(1, images)) @ own  # groups, images, ≤ out, columns
        plain.append(_norms(terms))
        tract.append(_norms(found.precondition(terms)))
        start += rows.shape[1]
    return tuple(
        ImageShare(*numbers)
        for numbers in zip(
            seen.brightness.tolist(),
            seen.contrast.tolist(),
            _shares(torch.cat(plain)),
            _shares(torch.cat(tract)),
            strict=True,
        )
    )


def _condensed(outputs: Tensor) -> Tensor:
    """Make dz_iᵀ as small as it can be with ‖dz_iᵀ A‖ the same for every A.

    From (groups, images, rows of one image, out/groups) to (groups, images, the smaller of these
    two, rows of one image). An image of one row needs one number instead of a column of them, and
    its gW_i of out × n is never formed.
    """
    rows, out = outputs.shape[-2:]
    return outputs.mT if out <= rows else torch.linalg.qr(outputs.mT, mode="r").R


def _norms(terms: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(terms, dim=(0, 2, 3))
    return norms


def _shares(norms: Tensor) -> list[float]:
    return (norms / norms.sum()).tolist()


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute Pearson's correlation, NaN where one of both does not vary or is not finite."""
    pair = torch.tensor([first, second], dtype=torch.float64)
    if pair.shape[1] < 2 or not torch.isfinite(pair).all():
        return math.nan
    centred = pair - pair.mean(1, keepdim=True)
    spread, size = torch.linalg.vector_norm(centred, dim=1), torch.linalg.vector_norm(pair, dim=1)
    if (spread <= _ROUNDING * size).any():
        return math.nan
    return float((centred[0] @ centred[1] / spread.prod()).clamp(-1, 1))
