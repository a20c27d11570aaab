"""Relative error of the first layer's weight gradient on photographs, against float64.

At the operator: the float64 definition on the same incoming gradient and input. End to end:
float64 throughout. Under bfloat16 autocast: with the weight gradient as autocast computes it, and
computed in float32 from the same bfloat16 output gradient.

python benchmarks/bench_accuracy.py
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from stems import LAMBDA, STEMS, Stem, arms, weight_gradient
from tract_fx import tract_module

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracle import precondition, relative_error, tract_gradient
from photographs import photograph_range_255, photographs


def batch(stem: Stem, standardised: bool) -> Tensor:
    """Photographs in the stem's shape, of half the size and batch to keep the oracle quick."""
    if len(stem.shape) == 2:
        rows, features = min(stem.shape[0], 1024), stem.shape[1]
        channels, size = (1, 28) if features == 784 else (3, 32)
        shape = (rows, channels, size)
    else:
        _, channels, size, _ = stem.shape
        shape = (16, channels, max(28, size // 2))
    images = photographs(*shape) if standardised else photograph_range_255(*shape)
    return images.flatten(1) if len(stem.shape) == 2 else images


def operator_table(standardised: bool) -> Table:
    title = "float32, " + (
        "standardised photographs" if standardised else "photographs in [0, 255]"
    )
    table = Table("", "operator", "torch-tract, operator", "end to end", "torch-tract", title=title)
    for stem in STEMS:
        torch.manual_seed(0)
        layer, x = nn.Sequential(stem.build()), batch(stem, standardised)
        dz = torch.randn_like(layer(x))
        found = {name: weight_gradient(model, x, dz) for name, model in arms(layer).items()}
        operator = precondition(layer[0], found["plain"], x, LAMBDA)
        exact = tract_gradient(layer[0], x, dz, LAMBDA)
        errors = [
            relative_error(found[a], e)
            for e in (operator, exact)
            for a in ("tract_fx", "torch-tract")
        ]
        table.add_row(stem.name, *(f"{error:.1e}" for error in errors))
    return table


def with_tail(layer: nn.Conv2d | nn.Linear) -> nn.Sequential:
    """A model around the layer, whose loss is a cross entropy."""
    out = layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return nn.Sequential(layer, nn.ReLU(), nn.Linear(out, 10))
    norm = [nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, 64, 3, 2, 1), nn.BatchNorm2d(64)]
    return nn.Sequential(
        layer, *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def captured(model: nn.Sequential, x: Tensor, y: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    """The first layer's weight gradient and the gradient of its output, for a cross entropy."""
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda *a: a[2].register_hook(seen.append) and None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = functional.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, [next(model.parameters())])
    handle.remove()
    return gradient, seen[0]


def autocast_table() -> Table:
    columns = ("plain", "tract_fx (gW as autocast gives it)", "gW in float32")
    table = Table("", *columns, title="bfloat16 autocast, cross entropy, end to end")
    for stem in STEMS:
        torch.manual_seed(0)
        model, x = with_tail(stem.build()), batch(stem, True)
        y = torch.randint(0, 10, (len(x),))
        exact, _ = captured(copy.deepcopy(model).double(), x.double(), y, False)
        reference = precondition(model[0], exact, x, LAMBDA)
        low, low_dz = captured(copy.deepcopy(model), x, y, True)
        ours, _ = captured(tract_module(copy.deepcopy(model), (x,)), x, y, True)
        rounded = x.bfloat16().float()
        high = weight_gradient(model[0], rounded, low_dz.float())
        errors = (
            relative_error(low, exact),
            relative_error(ours, reference),
            relative_error(precondition(model[0], high, rounded, LAMBDA), reference),
        )
        table.add_row(stem.name, *(f"{error:.1%}" for error in errors))
    return table


def main() -> None:
    console = Console()
    console.print(operator_table(True))
    console.print(operator_table(False))
    console.print(autocast_table())


if __name__ == "__main__":
    main()
