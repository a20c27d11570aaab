"""The demo's model and its training, with the plain gradient and with TrAct's."""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _demo_data import Dataset
from tract_fx import tract_pass

Arm = Literal["plain", "tract"]
ARMS: tuple[Arm, Arm] = ("plain", "tract")
WARM_UP_STEPS, TIMED_STEPS = 10, 100


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    epochs: int
    seeds: int
    lambda_: float
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Run:
    """How one training went.

    Attributes:
        accuracies: Test accuracy by epoch; epoch 0 is before the first step.
        losses: Training loss by step, before its update.
    """

    accuracies: list[float]
    losses: list[float]


# The runs of either arm, by seed.
Histories: TypeAlias = dict[Arm, list[Run]]


@dataclass(frozen=True)
class Learner:
    """What the loop trains, in whatever runtime.

    Attributes:
        step: Trains on a batch: learning rate, images, labels → loss.
        predict: Gives the class scores of images, in evaluation mode.
    """

    step: Callable[[float, Tensor, Tensor], float]
    predict: Callable[[Tensor], Tensor]


def initial_model(dataset: Dataset, seed: int) -> nn.Sequential:
    """Build the net that all runs of a seed start from."""
    torch.manual_seed(seed)
    return build_model(dataset.train.images.shape[1], len(dataset.classes))


def build_model(channels: int, classes: int) -> nn.Sequential:
    """Build a convolutional net with BatchNorm; its first layer is a 3 × 3 convolution."""
    sizes = (channels, 16, 32, 64)
    layers: dict[str, nn.Module] = {}
    for index, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{index}"] = nn.ReLU()
        layers[f"pool{index}"] = nn.MaxPool2d(2) if index < 3 else nn.AdaptiveAvgPool2d(1)
    layers["flatten"], layers["head"] = nn.Flatten(), nn.Linear(sizes[-1], classes)
    return nn.Sequential(OrderedDict(layers))


def with_tract(model: nn.Module, settings: Settings) -> nn.Module:
    """Rewrite a copy of the model."""
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    return tract_pass(traced, lambda_=settings.lambda_)


def sgd(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """Make the optimizer that all runs use."""
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def train_arms(dataset: Dataset, settings: Settings, on_epoch: Callable[[], None]) -> Histories:
    """Train every seed twice in PyTorch, from the same weights and over the same batches.

    Args:
        dataset: The images.
        settings: What both arms share.
        on_epoch: Called after every epoch of either arm.

    Returns:
        Both arms' runs.
    """
    histories: Histories = {arm: [] for arm in ARMS}
    for seed in range(settings.seeds):
        for arm, learner in _learners(dataset, settings, seed).items():
            histories[arm].append(train(learner, dataset, settings, seed, on_epoch))
    return histories


def time_steps(dataset: Dataset, settings: Settings) -> dict[Arm, list[float]]:
    """Time training steps of both arms, which take turns: the machine's speed changes for both.

    Args:
        dataset: The images; each step takes the next batch of them.
        settings: What both arms share.

    Returns:
        Each arm's times, in milliseconds.
    """
    learners = _learners(dataset, settings, seed=0)
    count = len(dataset.train.labels)
    batch_size = min(settings.batch_size, count)
    splits = (values.split(batch_size) for values in (dataset.train.images, dataset.train.labels))
    whole = [*zip(*splits, strict=True)][: count // batch_size]
    times: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    for index, (images, labels) in enumerate(islice(cycle(whole), WARM_UP_STEPS + TIMED_STEPS)):
        for arm in ARMS if index % 2 else reversed(ARMS):
            start = time.perf_counter()
            learners[arm].step(settings.learning_rate, images, labels)
            times[arm].append(1e3 * (time.perf_counter() - start))
    return {arm: taken[WARM_UP_STEPS:] for arm, taken in times.items()}


def _learners(dataset: Dataset, settings: Settings, seed: int) -> dict[Arm, Learner]:
    """Both arms before their first step, from the same weights."""
    initial = initial_model(dataset, seed)
    models = {"plain": copy.deepcopy(initial), "tract": with_tract(initial, settings)}
    return {arm: torch_learner(models[arm], settings) for arm in ARMS}


def torch_learner(model: nn.Module, settings: Settings) -> Learner:
    """Train a model in PyTorch."""
    optimizer = sgd(model, settings)

    def step(rate: float, images: Tensor, labels: Tensor) -> float:
        model.train()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        scores: Tensor = model.eval()(images)
        return scores

    return Learner(step, predict)


def train(
    learner: Learner,
    dataset: Dataset,
    settings: Settings,
    seed: int,
    on_epoch: Callable[[], None],
) -> Run:
    """Train under a cosine schedule; `seed` sets the order of the batches.

    Args:
        learner: What is trained.
        dataset: The images.
        settings: Batches and schedule.
        seed: Of the order.
        on_epoch: Called after every epoch.

    Returns:
        The accuracies and losses.
    """
    order = torch.Generator().manual_seed(seed)
    count = len(dataset.train.labels)
    batch_size = min(settings.batch_size, count)
    steps = count // batch_size
    run = Run([_accuracy(learner, dataset)], [])
    for _ in range(settings.epochs):
        # The last, incomplete batch is left out; every epoch leaves out other images.
        permutation = torch.randperm(count, generator=order)[: steps * batch_size]
        for batch in permutation.split(batch_size):
            progress = len(run.losses) / (steps * settings.epochs)
            rate = settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
            images, labels = dataset.train.images[batch], dataset.train.labels[batch]
            run.losses.append(learner.step(rate, images, labels))
        run.accuracies.append(_accuracy(learner, dataset))
        on_epoch()
    return run


def _accuracy(learner: Learner, dataset: Dataset) -> float:
    scores = torch.cat([learner.predict(images) for images in dataset.test.images.split(500)])
    return (scores.argmax(1) == dataset.test.labels).double().mean().item()
