"""A Swin transformer: shifted windows, relative position bias, patch merging."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def relative_positions(window: int) -> Tensor:
    """Index into the bias table per pair of tokens in a window: (window^2, window^2), int64."""
    axis = torch.arange(window)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None, :] + window - 1
    return offsets[0] * (2 * window - 1) + offsets[1]


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """0 within a region of the rolled image, -100 across: (windows, window^2, window^2)."""
    regions = torch.zeros(side)
    regions[side - window :] = 1
    regions[side - shift :] = 2
    labels = 3 * regions[:, None] + regions[None, :]
    labels = (
        labels.view(side // window, window, side // window, window)
        .transpose(1, 2)
        .reshape(-1, window**2)
    )
    apart = labels[:, :, None] != labels[:, None, :]
    return torch.zeros(apart.shape).masked_fill(apart, -100.0)


def tiles(x: Tensor, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Tensor:
    """Splits dimensions 1 and 2, and brings the two inner parts next to each other.

    (batch, a b, c d, …) to (batch, a, c, b, d, …) with ``rows`` (a, b) and ``columns`` (c, d).
    """
    split = torch.unflatten(torch.unflatten(x, 2, columns or rows), 1, rows)
    return split.transpose(2, 3)


class WindowAttention(nn.Module):
    """Attention within windows of a (side, side) grid, rolled by ``shift``."""

    index: Tensor
    mask: Tensor

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_positions(window))
        # One more dimension: the same for every head.
        self.register_buffer("mask", shift_mask(side, window, shift)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, side, side, width), the same shape out."""
        count, window = self.side // self.window, self.window
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = tiles(x, (count, window)).flatten(3, 4).flatten(1, 2)
        # (batch, windows, window^2, 3, heads, width / heads)
        split = torch.unflatten(self.qkv(x), -1, (3, self.heads, -1))
        query, key, value = split.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.bias_table[self.index].permute(2, 0, 1) + self.mask
        mixed: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        merged: Tensor = self.out(mixed.transpose(2, 3).flatten(3))
        merged = tiles(merged, (count, count), (window, window)).flatten(3, 4).flatten(1, 2)
        return torch.roll(merged, (self.shift, self.shift), (1, 2))


class Block(nn.Module):
    """Window attention and an MLP, each with its norm, dropout and shortcut."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, side, window, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, side, side, width), the same shape out."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class Swin(nn.Module):
    """4x4 patches, a plain and a shifted block, patch merging, one more block, classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)
        self.stage1 = nn.Sequential(Block(width, 2, 8, 4, shift=0), Block(width, 2, 8, 4, shift=2))
        self.merge_norm = nn.LayerNorm(4 * width)
        self.merge = nn.Linear(4 * width, 2 * width, bias=False)
        self.stage2 = Block(2 * width, 4, 4, 4, shift=0)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, classes)."""
        embedded: Tensor = self.patches(x)
        tokens: Tensor = self.stage1(self.norm(embedded.permute(0, 2, 3, 1)))
        quarters = [tokens[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        tokens = self.stage2(self.merge(self.merge_norm(torch.cat(quarters, -1))))
        logits: Tensor = self.head(tokens.mean((1, 2)))
        return logits


def small_swin(width: int = 16, classes: int = 10) -> Swin:
    """A Swin with windows of 4 x 4 tokens."""
    return Swin(width, classes)
