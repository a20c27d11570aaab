"""Test accuracy with one large batch, and with eight processes' Grams, local and global.

The processes are simulated in one: a batch in eight parts, whose gradients are averaged. A small
convolutional net, in which each part has more rows than the first layer has columns, and a small
vision transformer of patches as large as a quarter of the image, in which it has fewer.

Needs the extra `test`.

python benchmarks/bench_processes_training.py [--quick] [--data FOLDER] [--images N] [--epochs 10]
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from image_folder import Dataset, Split, digits, initial_model, read
from report import OUT, machine, save, table
from tract_fx import tract_module, tract_step

PARTS = 8
ARMS = ("plain", "one batch", "8 local", "8 global")


class SmallTransformer(nn.Module):
    """Patches of half the image's height and width: four tokens."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        width = 64
        self.patches = nn.Conv2d(channels, width, size // 2, size // 2)
        self.position = nn.Parameter(torch.zeros(4, width))
        block = nn.TransformerEncoderLayer(width, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.position
        scores: Tensor = self.head(self.blocks(tokens).mean(1))
        return scores


def transformer(dataset: Dataset, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    _, channels, size, _ = dataset.train.images.shape
    return SmallTransformer(channels, size, len(dataset.classes))


NETS: dict[str, Callable[[Dataset, int], nn.Module]] = {
    "convolutions": initial_model,
    "transformer": transformer,
}


def first_layer(model: nn.Module) -> str:
    """The name of the layer that reads the images."""
    names: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return names[0]


def run(dataset: Dataset, net: str, arm: str, seed: int, epochs: int, batch: int) -> float:
    """Train, and give the test accuracy at the end."""
    model = NETS[net](dataset, seed)
    if arm != "plain":
        model = tract_module(model, layers=[first_layer(model)])
    if net == "transformer":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.08, 0.9, weight_decay=5e-4)
    images, labels = dataset.train.images, dataset.train.labels
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=shuffle)
        for picked in order[: steps * batch].view(steps, batch):
            train(model, optimizer, images[picked], labels[picked], arm)
            schedule.step()
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in dataset.test.images.split(500)])
    return float((scores.argmax(1) == dataset.test.labels).float().mean())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, arm: str
) -> None:
    """Make one step. All arms but the one batch are in parts, as processes would have them."""
    parts = 1 if arm == "one batch" else PARTS
    with tract_step(model) if arm == "8 global" else nullcontext():
        for images, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (functional.cross_entropy(model(images), labels) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="one epoch of 256 images, two seeds")
    made.add_argument("--data", type=Path, help="a folder train/CLASS/*.jpg, test/CLASS/*.jpg")
    made.add_argument("--images", type=int, default=0, help="to train on; 0 for all of --data")
    made.add_argument("--epochs", type=int, default=10, help="%(default)s")
    made.add_argument("--seeds", type=int, default=3, help="%(default)s")
    made.add_argument("--batch", type=int, default=128, help="of all eight (%(default)s)")
    made.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (%(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    console = Console()
    epochs, seeds = (1, 2) if options.quick else (options.epochs, options.seeds)
    dataset = digits() if options.data is None else read(options.data, options.images, 0)
    if options.quick:
        train = Split(dataset.train.images[:256], dataset.train.labels[:256])
        dataset = replace(dataset, train=train)
    cases = [(net, arm, seed) for net in NETS for arm in ARMS for seed in range(seeds)]
    found: dict[str, dict[str, list[float]]] = {net: {arm: [] for arm in ARMS} for net in NETS}
    for net, arm, seed in track(cases, dataset.name, console=console):
        accuracy = run(dataset, net, arm, seed, epochs, options.batch)
        found[net][arm].append(accuracy)
    count = len(dataset.train.images)
    title = f"Test accuracy on {dataset.name}, {count} images, {epochs} epochs, "
    title += f"batch {options.batch}: "
    printed = table(title + f"mean ± deviation of {seeds} seeds", "", *ARMS)
    for net, by_arm in found.items():
        cells = (f"{statistics.mean(a):.2%} ± {statistics.stdev(a):.2%}" for a in by_arm.values())
        printed.add_row(net, *cells)
    console.print(printed)
    settings = {"epochs": epochs, "batch": options.batch, "data": dataset.name}
    settings |= {"images": count}
    record: dict[str, Any] = {**machine(), "quick": options.quick, **settings, "accuracy": found}
    save(console, options.out / "processes_training.json", record)


if __name__ == "__main__":
    main()
