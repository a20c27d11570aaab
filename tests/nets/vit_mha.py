"""A Vision Transformer on PyTorch's own attention module, `nn.MultiheadAttention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and an MLP, each with its norm and shortcut."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), the same shape out."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class AttentionClassifier(nn.Module):
    """Patches to tokens by a linear layer, an encoder, a classifier on the class token."""

    def __init__(self, size: int, patch: int, width: int, dropout: float, classes: int) -> None:
        super().__init__()
        tokens = (size // patch) ** 2 + 1
        self.patch = patch
        self.patches = nn.Linear(3 * patch * patch, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, 3, dropout) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) to (batch, classes)."""
        batch, channels, height, width = x.shape
        p = self.patch
        tiles = x.reshape(batch, channels, height // p, p, width // p, p)
        rows = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)
        tokens = torch.cat((self.class_token.expand(batch, -1, -1), self.patches(rows)), 1)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions))[:, 0])
        return logits


def small_vit_mha(patch: int = 8, width: int = 24, classes: int = 10) -> AttentionClassifier:
    """A ViT on 32 x 32 pixels with three heads, whose first layer is an `nn.Linear` on patches."""
    return AttentionClassifier(32, patch, width, dropout=0.1, classes=classes)
