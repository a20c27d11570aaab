"""A ConvNeXt: patchify stem, channels-first LayerNorm, depthwise 7x7 blocks with layer scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (batch, channels, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape out."""
        normed = layer_norm(x.permute(0, 2, 3, 1), (self.channels,), self.weight, self.bias, 1e-6)
        return normed.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7, norm, MLP over channels, layer scale, dropout of whole channels, shortcut."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.activation = nn.GELU()
        self.narrow = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w), the same shape out."""
        local: Tensor = self.depthwise(x)
        mixed: Tensor = self.narrow(
            self.activation(self.widen(self.norm(local.permute(0, 2, 3, 1))))
        )
        residual: Tensor = self.dropout((self.scale * mixed).permute(0, 3, 1, 2))
        return x + residual


class ConvNeXt(nn.Module):
    """4x4/4 stem, two stages with a 2x2/2 convolution between them, classifier."""

    def __init__(self, width: int, dropout: float, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), ChannelNorm(width))
        self.stage1 = Block(width, dropout)
        self.downsample = nn.Sequential(
            ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, stride=2)
        )
        self.stage2 = Block(2 * width, dropout)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, classes)."""
        features: Tensor = self.stage2(self.downsample(self.stage1(self.stem(x))))
        logits: Tensor = self.head(self.norm(features.mean((2, 3))))
        return logits


def small_convnext(width: int = 16, classes: int = 10) -> ConvNeXt:
    """A ConvNeXt with one block per stage."""
    return ConvNeXt(width, dropout=0.1, classes=classes)
