"""The demo's second part: the model with TrAct again, from its ONNX training graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from _demo_data import Dataset
from _demo_training import (
    Learner,
    Run,
    Settings,
    initial_model,
    sgd,
    torch_learner,
    train,
    with_tract,
)
from tract_fx import export_training, load_trainer

SEED = 0
FIRST_STEPS = 20


@dataclass(frozen=True)
class Runtimes:
    """Runs of one seed over the same batches.

    Attributes:
        pytorch: In PyTorch.
        onnx_runtime: In ONNX Runtime, from the same weights.
        nudged: In PyTorch, from weights whose last bit differs: the scale for the difference.
    """

    pytorch: Run
    onnx_runtime: Run
    nudged: Run


def largest_difference(run: Run, other: Run, steps: int | None = None) -> float:
    """The largest difference between two runs' losses over the first steps, or over all."""
    pairs = zip(run.losses[:steps], other.losses[:steps], strict=True)
    return max(abs(a - b) for a, b in pairs)


def export(dataset: Dataset, settings: Settings, directory: Path) -> None:
    """Export the model with TrAct as it is before its first step."""
    model = with_tract(initial_model(dataset, SEED), settings)
    images = dataset.train.images[: settings.batch_size]
    export_training(
        model, images, directory, optimizer=sgd(model, settings), overwrite=directory.exists()
    )


def train_exported(
    directory: Path, dataset: Dataset, settings: Settings, on_epoch: Callable[[], None]
) -> Run:
    """Train in ONNX Runtime, as `train_arms` has in PyTorch."""
    trainer = load_trainer(directory)

    def step(rate: float, images: Tensor, labels: Tensor) -> float:
        trainer.learning_rate = rate
        return trainer.train_step(images, labels)

    def predict(images: Tensor) -> Tensor:
        return torch.as_tensor(trainer.predict(images))

    return train(Learner(step, predict), dataset, settings, SEED, on_epoch)


@torch.no_grad()
def train_nudged(dataset: Dataset, settings: Settings, on_epoch: Callable[[], None]) -> Run:
    """Train in PyTorch from weights that are each the next larger number."""
    model = with_tract(initial_model(dataset, SEED), settings)
    for weight in model.parameters():
        weight.copy_(weight.nextafter(torch.full_like(weight, torch.inf)))
    with torch.enable_grad():
        return train(torch_learner(model, settings), dataset, settings, SEED, on_epoch)
