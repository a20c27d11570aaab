"""First layers that exist: of timm, transformers, torchvision, torchaudio; images to point sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tract_fx.preconditioner import PatchGeometry

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True)
class Shape:
    """A first layer, one input of it, and a number of them.

    Attributes:
        kind: Where it is found, and what it is.
        build: Makes the layer.
        size: One input's shape.
        batch: How many.
    """

    kind: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        """Kind and batch."""
        return f"{self.kind}, batch {self.batch}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The whole input's."""
        return (self.batch, *self.size)


def _conv(dims: int, *arguments: int | tuple[int, ...]) -> Callable[[], nn.Module]:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: cls(*arguments)  # type: ignore[arg-type]


def _linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


PHOTO, SMALL, DIGIT = (3, 224, 224), (3, 32, 32), (1, 28, 28)
CLIP, TUBE = (3, 8, 112, 112), (2, 16, 16)
_KINDS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]], ...] = (
    ("ResNet 7x7/2, 64 out", _conv(2, 3, 64, 7, 2, 3), PHOTO, (1, 8)),
    ("ResNet-D, RegNet 3x3/2, 32 out", _conv(2, 3, 32, 3, 2, 1), PHOTO, (1, 8)),
    ("VGG 3x3, 64 out", _conv(2, 3, 64, 3, 1, 1), PHOTO, (1,)),
    ("AlexNet 11x11/4, 64 out", _conv(2, 3, 64, 11, 4, 2), PHOTO, (1, 8)),
    ("ConvNeXt, Swin 4x4/4, 96 out", _conv(2, 3, 96, 4, 4), PHOTO, (1, 8)),
    ("ViT-B 16x16/16, 768 out", _conv(2, 3, 768, 16, 16), PHOTO, (1, 8)),
    ("ViT-Ti 16x16/16, 192 out", _conv(2, 3, 192, 16, 16), PHOTO, (2, 8)),
    ("DINOv2 14x14/14, 384 out", _conv(2, 3, 384, 14, 14), PHOTO, (1, 8)),
    ("Mixer 32x32/32, 512 out", _conv(2, 3, 512, 32, 32), PHOTO, (1, 8)),
    ("CIFAR 3x3, 64 out", _conv(2, 3, 64, 3, 1, 1), SMALL, (1, 8, 128)),
    ("CIFAR ViT 4x4/4, 192 out", _conv(2, 3, 192, 4, 4), SMALL, (8, 128)),
    ("LeNet 5x5, 6 out", _conv(2, 1, 6, 5), DIGIT, (1, 8, 128)),
    ("AST 16x16/10, 768 out", _conv(2, 1, 768, 16, 10), (1, 128, 1024), (1,)),
    ("3x3, 16 out, an 8x8 image", _conv(2, 3, 16, 3, 1, 1), (3, 8, 8), (1,)),
    ("MLP 784 to 400", _linear(784, 400), (784,), (1, 8, 128, 1024)),
    ("MLP 3072 to 512", _linear(3072, 512), (3072,), (8, 128, 1024)),
    ("MLP 3072 to 256", _linear(3072, 256), (3072,), (128,)),
    ("MLP 3072 to 1024", _linear(3072, 1024), (3072,), (64,)),
    ("tabular 64 to 32", _linear(64, 32), (64,), (8, 128)),
    ("points, PointNet 3 to 64", _linear(3, 64), (1024, 3), (8,)),
    ("wav2vec2 10/5, 512 out", _conv(1, 1, 512, 10, 5), (1, 16000), (1,)),
    ("M5 80/4, 32 out", _conv(1, 1, 32, 80, 4), (1, 8000), (8,)),
    ("speech frames 400/160, 64 out", _conv(1, 1, 64, 400, 160), (1, 16000), (4,)),
    ("Whisper 3, 80 to 384", _conv(1, 80, 384, 3, 1, 1), (80, 3000), (1,)),
    ("tubelets 2x16x16, 192 out", _conv(3, 3, 192, TUBE, TUBE), (3, 16, 224, 224), (2,)),
    ("R3D 3x7x7/1,2,2, 64 out", _conv(3, 3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3)), CLIP, (1,)),
    ("C3D 3x3x3, 64 out", _conv(3, 3, 64, 3, 1, 1), CLIP, (1,)),
    ("3D U-Net 3x3x3, 16 out", _conv(3, 1, 16, 3, 1, 1), (1, 32, 32, 32), (1,)),
)  # fmt: skip

SHAPES = tuple(Shape(kind, make, size, batch) for kind, make, size, bs in _KINDS for batch in bs)


def products(layer: nn.Module, rows: int) -> float:
    """Count the multiply-adds that TrAct takes at least, beside the plain layer's own.

    Args:
        layer: The layer.
        rows: R.

    Returns:
        Half of a Gram of the shorter side, a factor of it and two triangular solves.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    outputs, columns = weight.shape[0], math.prod(weight.shape[1:])
    groups = PatchGeometry.of_module(layer).groups
    side, other = min(rows, columns), max(rows, columns)
    return groups * (side**2 * other / 2 + side**3 / 6 + side**2 * outputs / groups)
