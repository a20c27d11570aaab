"""The two nets of the paper's CIFAR-10 figures, written anew: a ResNet-18 and a small ViT."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ModelName = Literal["resnet18", "vit"]
# The first layer, which gets TrAct.
FIRST_LAYER: dict[ModelName, str] = {"resnet18": "conv1", "vit": "embedding"}
WIDTH: dict[ModelName, int] = {"resnet18": 64, "vit": 384}
PATCH = 4


def build(model: ModelName, classes: int, image_size: int, width: int | None = None) -> nn.Module:
    """Build a net with the weights that torch's random state gives it.

    Args:
        model: Which.
        classes: Number of classes.
        image_size: Height and width of the images, in pixels.
        width: Channels of the first layer; the net's own if None.

    Returns:
        The net, which takes `(N, 3, image_size, image_size)`.
    """
    width = width or WIDTH[model]
    return ResNet18(classes, width) if model == "resnet18" else ViT(classes, image_size, width)


class ResNet18(nn.Module):
    """ResNet-18 for small images: the first layer is a 3 × 3 convolution of stride 1.

    The max-pool after it is that of ImageNet's ResNet-18, as in the authors' script; so are the
    initial values.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, width)
        self.norm1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [Block(inputs, outputs, 2 if stage else 1), Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Give class scores, `(N, classes)`."""
        x = self.pool(F.relu(self.norm1(self.conv1(images))))
        scores: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return scores


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Give the block's features."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ViT(nn.Module):
    """A ViT of 7 layers over patches of 4 × 4, 6.3 million parameters at its own width of 384."""

    def __init__(self, classes: int, image_size: int, width: int, heads: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, width, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image_size // PATCH) ** 2 + 1, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(7)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Give class scores, `(N, classes)`."""
        patches = self.embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        x = self.layers(tokens + self.position)
        scores: Tensor = self.head(self.norm(x[:, 0]))
        return scores


class Layer(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut; no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give the layer's tokens, in the shape of `x`."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = self.mlp(self.norm2(x))
        return x + mixed
