"""An MLP-Mixer: patch convolution, then MLPs over tokens and over channels in turn."""

from __future__ import annotations

from torch import Tensor, nn


def perceptron(width: int, hidden: int) -> nn.Sequential:
    """Two linear layers with GELU and dropout between them."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width)
    )


class Block(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.over_tokens = perceptron(tokens, 2 * tokens)
        self.norm2 = nn.LayerNorm(width)
        self.over_channels = perceptron(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), the same shape out."""
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.over_channels(self.norm2(x))
        return x


class Mixer(nn.Module):
    """Patches to tokens, mixer blocks, mean over tokens, classifier."""

    def __init__(self, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block((32 // patch) ** 2, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, classes)."""
        embedded: Tensor = self.patches(x)
        tokens: Tensor = self.norm(self.blocks(embedded.flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def small_mixer(patch: int = 4, width: int = 24, depth: int = 2, classes: int = 10) -> Mixer:
    """A Mixer on 32 x 32 pixels."""
    return Mixer(patch, width, depth, classes)
