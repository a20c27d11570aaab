"""The demo's model and its training, with the plain gradient and with TrAct's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from _demo_data import Dataset, Split
from tract_fx import tract_pass

Arm = Literal["plain", "tract"]
ARMS: tuple[Arm, Arm] = ("plain", "tract")


@dataclass(frozen=True)
class Settings:
    """What both arms share."""

    epochs: int
    seeds: int
    lambda_: float
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Histories:
    """Test accuracy of both arms, as `[seed][epoch]`; epoch 0 is before the first step."""

    plain: list[list[float]]
    tract: list[list[float]]


def build_model(channels: int, classes: int) -> nn.Sequential:
    """Build a convolutional net with BatchNorm; its first layer is a 3 × 3 convolution."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def train_arms(dataset: Dataset, settings: Settings, on_epoch: Callable[[], None]) -> Histories:
    """Train every seed twice, from the same weights and over the same batches.

    Args:
        dataset: The images.
        settings: What both arms share.
        on_epoch: Called after every epoch of either arm.

    Returns:
        Both arms' test accuracy by epoch.
    """
    histories = Histories([], [])
    for seed in range(settings.seeds):
        torch.manual_seed(seed)
        initial = build_model(dataset.train.images.shape[1], len(dataset.classes))
        for arm in ARMS:
            model: nn.Module = copy.deepcopy(initial)
            if arm == "tract":
                model = tract_pass(torch.fx.symbolic_trace(model), lambda_=settings.lambda_)
            accuracies = _train(model, dataset, settings, seed, on_epoch)
            getattr(histories, arm).append(accuracies)
    return histories


def _train(
    model: nn.Module,
    dataset: Dataset,
    settings: Settings,
    seed: int,
    on_epoch: Callable[[], None],
) -> list[float]:
    """Train with SGD under a cosine schedule; `seed` sets the order of the batches."""
    order = torch.Generator().manual_seed(seed)
    count = len(dataset.train.labels)
    batch_size = min(settings.batch_size, count)
    steps = count // batch_size
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * settings.epochs)
    accuracies = [_accuracy(model, dataset.test)]
    for _ in range(settings.epochs):
        model.train()
        # The last, incomplete batch is left out; every epoch leaves out other images.
        permutation = torch.randperm(count, generator=order)[: steps * batch_size]
        for batch in permutation.split(batch_size):
            optimizer.zero_grad()
            logits = model(dataset.train.images[batch])
            F.cross_entropy(logits, dataset.train.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        accuracies.append(_accuracy(model, dataset.test))
        on_epoch()
    return accuracies


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    predictions = torch.cat([model(images).argmax(1) for images in split.images.split(500)])
    return (predictions == split.labels).double().mean().item()
