"""Time of the first layer and of a whole step: plain, torch-tract's, ours, in one run.

python benchmarks/bench_time.py [--repeats 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from stems import STEMS, arms
from timing import interleaved, pin_allocator


def layer_step(model: nn.Module, x: Tensor, dz: Tensor) -> Callable[[], object]:
    """Forward and backward of the layer alone."""
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(model(x), parameters, dz)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A whole step: forward, loss, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def block(a: int, b: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def models() -> dict[str, tuple[nn.Sequential, tuple[int, ...]]]:
    """Whole models, input layer first, with a batch's shape."""
    plain_resnet = [
        nn.Sequential(block(a, b, s), block(b, b, 1), block(b, b, 1), block(b, b, 1))
        for a, b, s in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return {
        "ResNet-18 without shortcuts, 16x3x224²": (
            nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *plain_resnet, *head),
            (16, 3, 224, 224),
        ),
        "LeNet, 128x1x28²": (
            nn.Sequential(
                *(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
                *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)),
            ),
            (128, 1, 28, 28),
        ),
        "MLP 784-400-400-10, 1024 rows": (
            nn.Sequential(
                *(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU()),
                nn.Linear(400, 10),
            ),
            (1024, 784),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=15, help="rounds, each arm once (%(default)s)"
    )
    repeats = parser.parse_args().repeats
    pin_allocator()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    table = Table(
        "", "plain, ms", "torch-tract ÷ plain", "tract_fx ÷ plain", "tract_fx ÷ torch-tract"
    )
    table.columns[0].no_wrap = True
    console = Console()
    for stem in track(STEMS, "first layers", console=console):
        layer, x = nn.Sequential(stem.build()), torch.randn(stem.shape)
        dz = torch.randn_like(layer(x))
        steps = {name: layer_step(model, x, dz) for name, model in arms(layer).items()}
        add_row(table, "layer: " + stem.name, interleaved(steps, repeats))
    for name, (model, shape) in track(models().items(), "whole steps", console=console):
        x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
        steps = {arm: training_step(m, x, y) for arm, m in arms(model).items()}
        add_row(table, "step: " + name, interleaved(steps, max(3, repeats // 3)))
    console.print(table)


def add_row(table: Table, name: str, times: dict[str, float]) -> None:
    plain, peer, ours = times["plain"], times["torch-tract"], times["tract_fx"]
    ratios = (peer / plain, ours / plain, ours / peer)
    table.add_row(name, f"{plain:.1f}", *(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
