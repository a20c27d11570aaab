"""What of a batch or of λ makes TrAct worse than it could be: found by numbers, with the way out.

Every warning is found, reason and remedy, to come after the layer's name, without a full stop.
"""

from __future__ import annotations

import math

import torch

from tract_fx.inspection.records import LayerStatistics
from tract_fx.inspection.shares import Looks
from tract_fx.reference.observed import ObservedCall

_LARGE = 10.0
"""Root mean square of an input that was not standardised; a standardised one's is about 1."""

_OFFSET = 1.0
"""Mean over standard deviation from which on the mean outweighs what differs between pixels."""

_SLIGHT = 0.1
"""Mean of a channel, relative to the input's root mean square, that is of no weight beside the
others."""

_CONSTANT = 1e-6
"""Standard deviation of an image, relative to the input's root mean square, that counts as none."""

_FAR_ABOVE = 10.0
"""λ over the largest eigenvalue: the factors 1/(eigenvalue + λ) lie within 10 % of each other."""

_FAR_BELOW = 1e-3
"""λ over the smallest eigenvalue that is not zero: λ changes no factor by more than 0.1 %."""

_STANDARDISE = (
    "Standardise it: subtract the mean of your training images and divide by their standard "
    "deviation, per channel"
)


def input_warning(layer: LayerStatistics, seen: Looks) -> list[str]:
    """Judge the input's values, those of images channel by channel."""
    rms = math.hypot(layer.mean, layer.std)
    low, high = layer.minimum, layer.maximum
    if not math.isfinite(rms):
        return []
    if low == high:
        return [
            f"reads the same value {low:.3g} everywhere: there is one direction at most to learn "
            "from, and nothing for TrAct to even out. Check how the batch is made"
        ]
    about = f"from {low:.3g} to {high:.3g} (mean {layer.mean:.3g}, deviation {layer.std:.3g})"
    means, stds = seen.channel_means, seen.channel_stds
    large = bool((torch.hypot(means, stds) > _LARGE).any())
    offset = (means.abs() > _OFFSET * stds) & (means.abs() > _SLIGHT * rms)
    warnings = []
    if large:
        warnings.append(
            f"reads values {about}, which are not standardised: λ = {layer.lambda_:g} is meant for "
            "values about 1 in size, beside a Gram of such values it is next to nothing, and in "
            f"float32 the Gram loses its small eigenvalues. {_STANDARDISE}"
        )
    elif low >= 0 or high <= 0:
        sign = "positive" if low >= 0 else "negative"
        warnings.append(
            f"reads all-{sign} values {about}: what all images have in common then outweighs in "
            "the Gram what differs between them, which makes TrAct worse than it could be (arXiv "
            f"2410.23970, section 4). {_STANDARDISE}"
        )
    elif offset.any():
        channel = int((means.abs() * offset).argmax())
        which = ""
        if len(means) > 1:
            which = f" in {int(offset.sum())} of {len(means)} channels (in channel {channel}: mean "
            which += f"{float(means[channel]):.3g}, deviation {float(stds[channel]):.3g})"
        warnings.append(
            f"reads values {about}, whose mean is far from 0{which}: it outweighs in the Gram what "
            f"differs between pixels, and TrAct evens out little else. {_STANDARDISE}"
        )
    return warnings + _constant_images(seen, rms)


def _constant_images(seen: Looks, rms: float) -> list[str]:
    constant = int((seen.contrast <= _CONSTANT * rms).sum())
    if not constant or seen.entries == 1:
        return []
    return [
        f"reads {constant:,} of {len(seen.contrast):,} images that are constant: they show "
        "nothing but their brightness, and the Gram counts their rows like any other. Check how "
        "these images are loaded"
    ]


def lambda_warning(layer: LayerStatistics) -> list[str]:
    """Judge λ beside the eigenvalues."""
    if not layer.eigenvalues or not layer.eigenvalues[0]:
        return []
    lambda_, largest = layer.lambda_, layer.eigenvalues[0]
    smallest = min(value for value in layer.eigenvalues if value)
    if lambda_ >= _FAR_ABOVE * largest:
        return [
            f"has λ = {lambda_:g}, {lambda_ / largest:.3g} times the Gram's largest eigenvalue "
            f"{largest:.3g}: there TrAct divides all of the gradient by about λ, which a learning "
            "rate does as well. Standardise the input, or take a λ within the eigenvalues"
        ]
    if lambda_ <= _FAR_BELOW * smallest and math.hypot(layer.mean, layer.std) <= _LARGE:
        return [
            f"has λ = {lambda_:g}, {smallest / lambda_:.3g} times below {smallest:.3g}, the Gram's "
            "smallest eigenvalue that is not zero: λ regularises nothing, and directions that "
            "these images show by chance count as much as those that all images share. Take a λ "
            "within the eigenvalues" + ", or more images per batch" * bool(layer.zeros)
        ]
    return []


def gradient_warning(call: ObservedCall) -> list[str]:
    """Judge the gradient that reached the call."""
    gradients = [g for g in (call.incoming, call.output_gradient) if g is not None and g.numel()]
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        return [
            "gets a gradient with NaN or infinite values: TrAct can only pass them on, and norms "
            "and shares of them mean nothing. Look for them in the loss, or lower a loss scale"
        ]
    if gradients and not any(bool(g.any()) for g in gradients):
        return [
            "gets a gradient that is zero: the loss does not depend on the layer for this batch, "
            "so that TrAct has nothing to change. Check the loss and what lies between"
        ]
    return []
