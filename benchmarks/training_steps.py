"""What is timed of a model: its layer's forward and backward, a whole training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional

from precision import FLOAT32, Precision
from tract_fx import SGD, AdamW


def layer_step(
    model: nn.Module, batches: Sequence[Tensor], precision: Precision = FLOAT32
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the layer alone.

    Args:
        model: The layer.
        batches: Inputs of one shape, taken in turn.
        precision: Of the forward pass.

    Returns:
        A function that gives the gradients of all parameters, for a random gradient of the output
        that is the same for all models.
    """
    parameters, device = list(model.parameters()), batches[0].device
    generator = torch.Generator(device).manual_seed(0)
    with precision.forward(device):
        z = model(batches[0])
    dz = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype)
    turn = cycle(batches)

    def step() -> tuple[Tensor, ...]:
        with precision.forward(device):
            z = model(next(turn))
        return torch.autograd.grad(z, parameters, dz)

    return step


def training_step(
    model: nn.Module,
    optimizer: SGD | AdamW,
    batches: Sequence[tuple[Tensor, Tensor]],
    precision: Precision = FLOAT32,
) -> Callable[[], Tensor]:
    """A whole step in PyTorch: forward, loss, backward, update.

    Args:
        model: A classifier.
        optimizer: The settings of the update.
        batches: Inputs with labels, taken in turn.
        precision: Of forward pass and loss.

    Returns:
        A function that takes a step and gives its loss.
    """
    settings = {
        field.name: getattr(optimizer, field.name)
        for field in dataclasses.fields(optimizer)
        if field.name not in {"max_grad_norm", "accumulate", "weight_decays"}
    }
    update = getattr(torch.optim, type(optimizer).__name__)(model.parameters(), **settings)
    device, turn = batches[0][0].device, cycle(batches)

    def step() -> Tensor:
        x, y = next(turn)
        update.zero_grad()
        with precision.forward(device):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        update.step()
        return loss.detach()

    return step
