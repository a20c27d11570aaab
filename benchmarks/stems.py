"""The first layers that are measured, with inputs, as plain, torch-tract's and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_tract
from torch import Tensor, fx, nn

from tract_fx import tract_pass

LAMBDA = 0.1


@dataclass(frozen=True)
class Stem:
    """A first layer and the shape of a batch.

    Attributes:
        name: As the tables print it.
        build: Makes the layer.
        shape: The input's shape.
    """

    name: str
    build: Callable[[], nn.Conv2d | nn.Linear]
    shape: tuple[int, ...]


STEMS = (
    Stem("ImageNet 7x7/2, 16x3x224²", lambda: nn.Conv2d(3, 64, 7, 2, 3), (16, 3, 224, 224)),
    Stem("CIFAR 3x3, 128x3x32²", lambda: nn.Conv2d(3, 64, 3, 1, 1), (128, 3, 32, 32)),
    Stem("ViT 16x16/16, 32x3x224²", lambda: nn.Conv2d(3, 768, 16, 16), (32, 3, 224, 224)),
    Stem("4x4/4, 16x3x224²", lambda: nn.Conv2d(3, 96, 4, 4), (16, 3, 224, 224)),
    Stem("MNIST 5x5, 128x1x28²", lambda: nn.Conv2d(1, 32, 5), (128, 1, 28, 28)),
    Stem("MobileNet 3x3/2, 16x3x224²", lambda: nn.Conv2d(3, 32, 3, 2, 1), (16, 3, 224, 224)),
    Stem("Linear 784, 2048 rows", lambda: nn.Linear(784, 256), (2048, 784)),
    Stem("Linear 3072, 128 rows", lambda: nn.Linear(3072, 256), (128, 3072)),
)


def arms(model: nn.Sequential) -> dict[str, nn.Module]:
    """The model with plain gradients, wrapped by torch-tract, and rewritten by the pass.

    Args:
        model: A model whose child "0" is the input layer.

    Returns:
        Three models with tensors of their own, equal at the start.
    """
    peer = copy.deepcopy(model)
    peer[0] = torch_tract.TrAct(peer[0], LAMBDA)
    ours = tract_pass(fx.symbolic_trace(copy.deepcopy(model)), lambda_=LAMBDA)
    return {"plain": copy.deepcopy(model), "torch-tract": peer, "tract_fx": ours}


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
