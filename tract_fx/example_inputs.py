"""A batch for a model that says itself what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SIDE = 224
"""Pixels of an image for a model of any size."""


def own_example_inputs(model: nn.Module) -> Any:
    """Make a batch by what a model says of its inputs; None where it says nothing.

    A LightningModule may hold one, as `example_input_array`. Hugging Face's models name their main
    input, some have `dummy_inputs` with it, and a config tells the size of images.
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if not isinstance(name, str) or config is None:
        return None
    dummy = getattr(model, "dummy_inputs", None) or {}
    if name in dummy:
        return dummy
    channels = getattr(config, "num_channels", None)
    size = getattr(config, "image_size", None) or _SIDE
    sides = [size, size] if isinstance(size, int) else size
    if (
        name != "pixel_values"
        or not isinstance(channels, int)
        or not isinstance(sides, (list, tuple))
    ):
        return None
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, channels, *sides, generator=generator)
    return {name: noise.to(first.device, first.dtype)}
