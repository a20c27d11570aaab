"""A multilayer perceptron on flattened images."""

from __future__ import annotations

from torch import nn


def small_mlp(size: int = 16, width: int = 32, classes: int = 10) -> nn.Sequential:
    """Two hidden layers on 3 x `size` x `size` pixels: more columns than a batch has rows."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * size * size, width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, classes),
    )
