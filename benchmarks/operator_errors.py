"""Relative errors of the first layer's weight gradient on photographs, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from stems import LAMBDA, Stem, arms, weight_gradient

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracle import precondition, relative_error, tract_gradient
from photographs import photograph_range_255, photographs

__all__ = ["batch", "errors", "precondition", "relative_error", "tract_gradient"]

_ARMS = ("tract_fx", "torch-tract")


def batch(stem: Stem, standardised: bool) -> Tensor:
    """Photographs in the stem's shape, of half the size and batch to keep the oracle quick."""
    if len(stem.shape) == 2:
        rows, features = min(stem.shape[0], 1024), stem.shape[1]
        channels, size = (1, 28) if features == 784 else (3, 32)
        shape = (rows, channels, size)
    else:
        _, channels, size, _ = stem.shape
        shape = (16, channels, max(28, size // 2))
    images = photographs(*shape) if standardised else photograph_range_255(*shape)
    return images.flatten(1) if len(stem.shape) == 2 else images


def errors(stem: Stem, x: Tensor) -> dict[str, dict[str, float]]:
    """Errors for a random gradient of the layer's output.

    Args:
        stem: The layer.
        x: Its input.

    Returns:
        Ours and torch-tract's, in this order, `"operator"`: against the definition on the plain
        layer's weight gradient, or on the exact one where that is nearer, for a call may compute
        its own; and `"end_to_end"`: against float64 throughout.
    """
    torch.manual_seed(0)
    layer = nn.Sequential(stem.build())
    dz = torch.randn_like(layer(x))
    found = {arm: weight_gradient(model, x, dz) for arm, model in arms(layer).items()}
    plain = precondition(layer[0], found["plain"], x, LAMBDA)
    exact = tract_gradient(layer[0], x, dz, LAMBDA)
    off = {a: (relative_error(found[a], plain), relative_error(found[a], exact)) for a in _ARMS}
    return {
        "operator": {arm: min(errors) for arm, errors in off.items()},
        "end_to_end": {arm: errors[1] for arm, errors in off.items()},
    }
