"""The whole nets that are trained in benchmarks: ResNet-18, ViT-Tiny, and the demo's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests", "examples")]
from _demo_training import build_model
from nets.resnet import BasicBlock
from nets.vit import Attention
from tract_fx import SGD, AdamW

CLASSES = 10


@dataclass(frozen=True)
class Net:
    """A net, and how it is trained.

    Attributes:
        name: As the tables print it, in front of the batch's shape.
        build: Makes the net.
        shape: Of a batch.
        optimizer: Its settings.
        aim: What a step with TrAct ÷ a plain one in ONNX Runtime is to stay below.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    optimizer: SGD | AdamW
    aim: float

    def __str__(self) -> str:
        batch, channels, height, _ = self.shape
        return f"{self.name}, {batch}x{channels}x{height}²"

    def example(self) -> tuple[Tensor, Tensor]:
        """Noise as a batch, and labels."""
        return torch.randn(self.shape), torch.randint(0, CLASSES, self.shape[:1])


def resnet18(stem: nn.Sequential) -> nn.Sequential:
    """A ResNet-18 behind a stem with 64 channels."""
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    stages = [nn.Sequential(BasicBlock(a, b, s), BasicBlock(b, b, 1)) for a, b, s in widths]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(stem, *stages, *head)


def imagenet_resnet18() -> nn.Sequential:
    """With the 7 × 7 stem of stride 2 and max-pooling."""
    convolution = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    pool = nn.MaxPool2d(3, 2, 1)
    return resnet18(nn.Sequential(convolution, nn.BatchNorm2d(64), nn.ReLU(), pool))


def cifar_resnet18() -> nn.Sequential:
    """With the 3 × 3 stem of stride 1."""
    convolution = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    return resnet18(nn.Sequential(convolution, nn.BatchNorm2d(64), nn.ReLU()))


class EncoderBlock(nn.Module):
    """Attention, then an MLP of four times the width, each after its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout=0.0)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), the same shape out."""
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ViTTiny(nn.Module):
    """12 blocks, width 192, 3 heads, patches of 4 × 4, on images of 32 × 32."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 4, 4)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, 192))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, 192))
        self.blocks = nn.Sequential(*(EncoderBlock(192, heads=3) for _ in range(12)))
        self.norm = nn.LayerNorm(192)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), 1)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions))[:, 0])
        return logits


_SGD = SGD(lr=1e-3, momentum=0.9, weight_decay=5e-4)
NETS = (
    Net("ResNet-18", imagenet_resnet18, (16, 3, 224, 224), _SGD, 1.05),
    Net("ResNet-18", imagenet_resnet18, (64, 3, 32, 32), _SGD, 1.03),
    Net("ResNet-18, 3x3 stem", cifar_resnet18, (64, 3, 32, 32), _SGD, 1.03),
    Net("ViT-Tiny/4", ViTTiny, (64, 3, 32, 32), AdamW(lr=1e-4), 1.03),
    Net("demo's net", lambda: build_model(1, CLASSES), (64, 1, 8, 8), _SGD, 1.15),
    Net("demo's net", lambda: build_model(3, CLASSES), (64, 3, 32, 32), _SGD, 1.15),
)
