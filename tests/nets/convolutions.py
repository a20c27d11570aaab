"""Convolutional networks over series and over volumes: Conv1d and Conv3d with BatchNorm."""

from __future__ import annotations

from torch import nn


def small_conv1d(width: int = 12, classes: int = 10) -> nn.Sequential:
    """A network for (batch, 3, 64) series; its first layer is strided and padded."""
    return nn.Sequential(
        nn.Conv1d(3, width, 7, stride=2, padding=3),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Conv1d(width, 2 * width, 3, padding=2, dilation=2),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, classes),
    )


def small_conv3d(width: int = 8, classes: int = 10) -> nn.Sequential:
    """A network for (batch, 3, 6, 16, 16) volumes."""
    return nn.Sequential(
        nn.Conv3d(3, width, 3, stride=(1, 2, 2), padding=1, bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(width, 2 * width, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )
