"""The first layers that are measured, with inputs, as plain, torch-tract's and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_tract
from torch import Tensor, fx, nn

from aims import LayerAims, layer_aims
from tract_fx import tract_pass

LAMBDA = 0.1
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Stem:
    """A first layer and the shape of a batch.

    Attributes:
        kind: What the layer is, as the tables print it in front of the batch's shape.
        build: Makes the layer.
        shape: The input's shape.
        aims: What is to be reached on two cores; None where nothing was set.
    """

    kind: str
    build: Callable[[], Layer]
    shape: tuple[int, ...]
    aims: LayerAims | None = None

    @property
    def name(self) -> str:
        """Kind and shape."""
        if len(self.shape) == 2:
            return f"{self.kind}, {self.shape[0]} rows"
        batch, channels, height, _ = self.shape
        return f"{self.kind}, {batch}x{channels}x{height}²"


IMAGENET = Stem(
    "ImageNet 7x7/2",
    lambda: nn.Conv2d(3, 64, 7, 2, 3),
    (16, 3, 224, 224),
    layer_aims(8, 1.35, 1 / 30),
)
CIFAR = Stem(
    "CIFAR 3x3", lambda: nn.Conv2d(3, 64, 3, 1, 1), (128, 3, 32, 32), layer_aims(6, 1.2, 1 / 4)
)
VIT = Stem(
    "ViT 16x16/16",
    lambda: nn.Conv2d(3, 768, 16, 16),
    (32, 3, 224, 224),
    layer_aims(1.9, 1.55, 1 / 4),
)
PATCHES_4 = Stem(
    "4x4/4", lambda: nn.Conv2d(3, 96, 4, 4), (16, 3, 224, 224), layer_aims(2.2, 1.4, 1 / 4)
)
MNIST = Stem(
    "MNIST 5x5", lambda: nn.Conv2d(1, 32, 5), (128, 1, 28, 28), layer_aims(4.5, 1.5, 1 / 4)
)
MOBILENET = Stem(
    "MobileNet 3x3/2",
    lambda: nn.Conv2d(3, 32, 3, 2, 1),
    (16, 3, 224, 224),
    layer_aims(2, 1.8, 1 / 6),
)
LINEAR = Stem("Linear 784", lambda: nn.Linear(784, 256), (2048, 784), layer_aims(1.5, 2, 1))
FEW_ROWS = Stem("Linear 3072", lambda: nn.Linear(3072, 256), (128, 3072))
STEMS = (IMAGENET, CIFAR, VIT, PATCHES_4, MNIST, MOBILENET, LINEAR, FEW_ROWS)


def arms(model: nn.Module, layer: str = "0") -> dict[str, nn.Module]:
    """The model with plain gradients, wrapped by torch-tract, and rewritten by the pass.

    Args:
        model: A model.
        layer: The path of its input layer.

    Returns:
        Models with tensors of their own, equal at the start; torch-tract's where it has the layer.
    """
    made: dict[str, nn.Module] = {"plain": copy.deepcopy(model)}
    if isinstance(model.get_submodule(layer), (nn.Linear, nn.Conv2d)):
        peer = copy.deepcopy(model)
        peer.set_submodule(layer, torch_tract.TrAct(peer.get_submodule(layer), LAMBDA))
        made["torch-tract"] = peer
    made["tract_fx"] = tract_pass(fx.symbolic_trace(copy.deepcopy(model)), lambda_=LAMBDA)
    return made


def weight_gradient(model: nn.Module, x: Tensor, dz: Tensor) -> Tensor:
    """The input layer's weight gradient.

    Args:
        model: One of `arms`.
        x: A batch.
        dz: The gradient of the model's output.

    Returns:
        The gradient of its first parameter.
    """
    weight = next(model.parameters())
    return torch.autograd.grad(model(x), weight, dz)[0]
