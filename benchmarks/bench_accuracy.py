"""Relative error of the first layer's weight gradient on photographs, against float64.

At the operator: the float64 definition on the same incoming gradient and input. End to end:
float64 throughout. Under bfloat16 autocast: with the weight gradient as autocast computes it, and
computed in float32 from the same bfloat16 output gradient. Last, what the operator would be off by
on a GPU in less than float64.

python benchmarks/bench_accuracy.py [--quick] [--out FOLDER]

Needs the extra `test`.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from aims import OPERATOR_ERROR, OPERATOR_ERROR_255, as_error
from gram_arithmetic import PRODUCTS, arithmetic_errors
from operator_errors import batch, errors, precondition, relative_error
from report import OUT, error_cell, machine, save, table
from stems import CIFAR, LAMBDA, MNIST, STEMS, Stem, weight_gradient
from tract_fx import tract_module

QUICK = (CIFAR, MNIST)
TITLES = {True: "standardised photographs", False: "photographs in [0, 255]"}
AIMS = {True: OPERATOR_ERROR, False: OPERATOR_ERROR_255}


def operator_rows(
    stems: Sequence[Stem], standardised: bool, console: Console
) -> list[dict[str, Any]]:
    """Errors in float32, by layer."""
    aim = AIMS[standardised]
    rows = []
    for stem in track(stems, TITLES[standardised], console=console):
        found = errors(stem, batch(stem, standardised))
        at_operator = found["operator"]
        rows.append(
            {
                "layer": stem.name,
                **found,
                "aim": aim.bound if stem.aims else None,
                "aim_reached": aim.reached(at_operator["tract_fx"]) if stem.aims else None,
                "not_worse": at_operator["tract_fx"] <= at_operator["torch-tract"],
            }
        )
    return rows


def print_operator_rows(rows: list[dict[str, Any]], standardised: bool, console: Console) -> None:
    aim = AIMS[standardised]
    title = f"float32, {TITLES[standardised]}; operator: {aim} and torch-tract's"
    printed = table(title, "", "operator:\nours,\ntorch-tract", "end to end:\nours", "torch-tract")
    for row in rows:
        end_to_end = (as_error(error) for error in row["end_to_end"].values())
        at_operator = error_cell(row["operator"], aim if row["aim"] else None)
        printed.add_row(row["layer"], at_operator, *end_to_end)
    console.print(printed)


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


def autocast_rows(stems: Sequence[Stem], console: Console) -> list[dict[str, Any]]:
    """Errors under bfloat16 autocast with a cross entropy, end to end, by layer."""
    rows = []
    for stem in track(stems, "bfloat16 autocast", console=console):
        torch.manual_seed(0)
        model, x = with_tail(stem.build()), batch(stem, True)
        y = torch.randint(0, 10, (len(x),))
        exact, _ = captured(copy.deepcopy(model).double(), x.double(), y, False)
        reference = precondition(model[0], exact, x, LAMBDA)
        low, low_dz = captured(copy.deepcopy(model), x, y, True)
        ours, _ = captured(tract_module(copy.deepcopy(model), (x,)), x, y, True)
        rounded = x.bfloat16().float()
        high = weight_gradient(model[0], rounded, low_dz.float())
        rows.append(
            {
                "layer": stem.name,
                "plain": relative_error(low, exact),
                "tract_fx": relative_error(ours, reference),
                "tract_fx_weight_gradient_in_float32": relative_error(
                    precondition(model[0], high, rounded, LAMBDA), reference
                ),
            }
        )
    return rows


def print_autocast_rows(rows: list[dict[str, Any]], console: Console) -> None:
    columns = ("plain", "tract_fx (gW as\nautocast gives it)", "tract_fx\n(gW in float32)")
    printed = table("bfloat16 autocast, cross entropy, end to end", "", *columns)
    for row in rows:
        figures = [value for name, value in row.items() if name != "layer"]
        printed.add_row(row["layer"], *(f"{figure:.1%}" for figure in figures))
    console.print(printed)


def arithmetic_rows(
    stems: Sequence[Stem], standardised: bool, console: Console
) -> list[dict[str, Any]]:
    """Errors in a GPU's arithmetics, by layer that has a Gram."""
    title = f"a GPU's arithmetic, {TITLES[standardised]}"
    found = {s.name: arithmetic_errors(s, standardised) for s in track(stems, title)}
    printed = table(f"{title}: factor in float32, in float64", "", *PRODUCTS)
    made = {layer: off for layer, off in found.items() if off}
    for layer, off in made.items():
        printed.add_row(layer, *(", ".join(map(as_error, pair)) for pair in off.values()))
    console.print(printed)
    return [{"layer": layer, **off} for layer, off in made.items()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="two layers instead of eight")
    made.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (%(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    console = Console()
    stems = QUICK if options.quick else STEMS
    record: dict[str, Any] = {**machine(), "quick": options.quick}
    for standardised, key in ((True, "standardised"), (False, "range_255")):
        record[key] = operator_rows(stems, standardised, console)
        print_operator_rows(record[key], standardised, console)
    record["bfloat16_autocast"] = autocast_rows(stems, console)
    print_autocast_rows(record["bfloat16_autocast"], console)
    record["arithmetic"] = {
        key: arithmetic_rows(stems, key == "standardised", console)
        for key in ("standardised", "range_255")
    }
    save(console, options.out / "accuracy.json", record)


if __name__ == "__main__":
    main()
