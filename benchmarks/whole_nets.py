"""The whole nets that are trained in benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from aims import Aim

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests", "examples")]
from _demo_training import build_model
from nets.resnet import BasicBlock
from nets.vit import Attention
from tract_fx import SGD, AdamW

CLASSES = 10
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Net:
    """A net, and how it is trained.

    Attributes:
        name: As the tables print it, in front of the batch's shape.
        build: Makes the net.
        shape: Of a batch.
        optimizer: Its settings.
        aim: For a step with TrAct ÷ a plain one: in ONNX Runtime for `NETS`, in PyTorch for
            `PYTORCH_NETS`.
        input_layer: The path of the first layer.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    optimizer: SGD | AdamW
    aim: Aim | None
    input_layer: str = "0"

    def __str__(self) -> str:
        if len(self.shape) == 2:
            return f"{self.name}, {self.shape[0]} rows"
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


def imagenet_stem() -> nn.Sequential:
    """7 × 7 with stride 2, then max-pooling."""
    convolution = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    pool = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(convolution, nn.BatchNorm2d(64), nn.ReLU(), pool)


def imagenet_resnet18() -> nn.Sequential:
    """With the 7 × 7 stem of stride 2 and max-pooling."""
    return resnet18(imagenet_stem())


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


class VisionTransformer(nn.Module):
    """Patches to tokens, blocks, a classifier on the class token."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        tokens = (size // patch) ** 2 + 1
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) to (batch, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), 1)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions))[:, 0])
        return logits


def vit_tiny() -> VisionTransformer:
    """12 blocks, width 192, 3 heads, patches of 4 × 4, on images of 32 × 32."""
    return VisionTransformer(32, 4, width=192, depth=12, heads=3, classes=CLASSES)


def vit_base(classes: int = IMAGENET_CLASSES) -> VisionTransformer:
    """ViT-B/16: 12 blocks, width 768, 12 heads, patches of 16 × 16, on images of 224 × 224."""
    return VisionTransformer(224, 16, width=768, depth=12, heads=12, classes=classes)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride) and 1 × 1 convolutions, and a shortcut."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = 4 * inner
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)),
            *(nn.ReLU(), nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, 4 · inner, h / stride, w / stride)."""
        return relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = IMAGENET_CLASSES) -> nn.Sequential:
    """With the 7 × 7 stem of stride 2 and max-pooling."""
    blocks: list[nn.Module] = []
    channels = 64
    for inner, depth, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for index in range(depth):
            blocks.append(Bottleneck(channels, inner, stride if index == 0 else 1))
            channels = 4 * inner
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(imagenet_stem(), *blocks, *head)


def lenet() -> nn.Sequential:
    """Two 5 × 5 convolutions, each with pooling, and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


def mlp(inputs: int = 784, hidden: int = 400) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
        nn.Linear(hidden, CLASSES),
    )


_SGD = SGD(lr=1e-3, momentum=0.9, weight_decay=5e-4)
NETS = (
    Net("ResNet-18", imagenet_resnet18, (16, 3, 224, 224), _SGD, Aim(1.05)),
    Net("ResNet-18", imagenet_resnet18, (64, 3, 32, 32), _SGD, Aim(1.03)),
    Net("ResNet-18, 3x3 stem", cifar_resnet18, (64, 3, 32, 32), _SGD, Aim(1.03)),
    Net("ViT-Tiny/4", vit_tiny, (64, 3, 32, 32), AdamW(lr=1e-4), Aim(1.03)),
    Net("demo's net", lambda: build_model(1, CLASSES), (64, 1, 8, 8), _SGD, Aim(1.15)),
    Net("demo's net", lambda: build_model(3, CLASSES), (64, 3, 32, 32), _SGD, Aim(1.15)),
)
QUICK_NETS = NETS[-1:]

_PLAIN_SGD = SGD(lr=1e-3)
PYTORCH_NETS = (
    Net("ResNet-18", imagenet_resnet18, (16, 3, 224, 224), _PLAIN_SGD, Aim(1.02), "0.0"),
    Net("LeNet", lenet, (128, 1, 28, 28), _PLAIN_SGD, Aim(1.07)),
    Net("MLP 784-400-400-10", mlp, (1024, 784), _PLAIN_SGD, Aim(1.6)),
    Net("MLP 3072-512-512-10", lambda: mlp(3072, 512), (128, 3072), _PLAIN_SGD, Aim(1.25)),
)
ACCELERATOR_NETS = (
    Net("ResNet-50", resnet50, (256, 3, 224, 224), _SGD, None, "0.0"),
    Net("ViT-B/16", vit_base, (128, 3, 224, 224), AdamW(lr=1e-4), None, "patches"),
)
