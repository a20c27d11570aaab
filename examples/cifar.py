"""Train on CIFAR-10 with the plain gradient and with TrAct, at full and at half the epochs.

The question: is TrAct at half the epochs as accurate as the plain gradient at all of them? Three
recipes (`--recipe`):

- `resnet18-sgd` and `resnet18-adam` are those of the authors' script (Felix-Petersen/tract,
  examples/train_cifar.py, and the commands for Figure 1 in the README there): ResNet-18 with a
  3 × 3 first layer and ImageNet's max-pool; batches of 128, the last incomplete one left out; crops
  out of a black margin of 4 pixels, flips, their mean and deviation; SGD at 0.08 with momentum 0.9,
  or Adam at 0.01, under a cosine that falls with every step; no weight decay; λ = 0.1.
- `vit-adam` is the ViT that the authors name for CIFAR-10 (omihub777/ViT-CIFAR), as the table in
  the README there has it: 7 layers, 12 heads, width 384, patches of 4 × 4, no dropout; Adam at
  1e-3, weight decay 5e-5, label smoothing 0.1, warm-up in the first fortieth. Its AutoAugment is
  left out, and its linear layer on the patches is written as the convolution that it equals.

Theirs are runs of 100 to 800 epochs in float32. λ = 0.05, fewer epochs, bfloat16 and compilation
are this script's. Options change a recipe for all arms alike, `--weight-decay 5e-4` for one.

The images, from `DATA/train/CLASS/*.jpg` and `DATA/test/CLASS/*.jpg`, are read once, kept in OUT as
one file, and held in the device's memory. After every epoch a run leaves its record (JSON) and its
state there, each whole or not at all: the same command goes on where the last one ended or was
killed, on a CPU with the same weights bit for bit; a GPU's kernels may add up in another order each
time. With `--budget SECONDS` no epoch is begun that is not likely to end so soon after the start.

On a GPU that is there for commands of ten minutes:

    python examples/cifar.py --data FOLDER --precision bfloat16 --compile --budget 540

and the same again until it says that all runs are complete. Then, with the same OUT:

    python examples/cifar.py --recipe resnet18-adam --precision bfloat16 --compile --budget 540
    python examples/cifar.py --recipe vit-adam --precision bfloat16 --compile --budget 540

Whether bfloat16 and compilation pay, a run without them in an OUT of its own tells by its seconds.
The records (OUT/*.json, some kilobytes each) are all that is to be taken home; with them the same
options and `--budget 0` make the table and the pictures anywhere. A run whose state (OUT/*.pt) was
left behind begins anew.

Needs the extra `demo`.
"""

from __future__ import annotations

import _named_extra  # noqa: F401  # isort: skip

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from _cifar_records import Budget, OtherRunError, read_progress, train
from _cifar_report import findings, save_plot, table
from _cifar_runs import RECIPES, Precision, Run, Settings, plan, products_in
from _demo_data import DataError
from tract_fx import TractError

START = time.monotonic()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT = "resnet18-sgd"


def _known(names: list[str] | None) -> list[str]:
    for name in names or []:
        if name not in RECIPES:
            raise typer.BadParameter(f"there is no {name!r}, but {', '.join(RECIPES)}")
    return names or [DEFAULT]


def _above_zero(lambdas: list[float] | None) -> list[float]:
    """Refuse a λ before the plain runs, which come first, have been trained."""
    for value in lambdas or []:
        if not 0 < value < math.inf:
            raise typer.BadParameter(f"λ is a finite number above zero, not {value}")
    return lambdas or [0.1, 0.05]


def run(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train/CLASS/*.jpg and test/CLASS/*.jpg; OUT keeps them."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records and results.")] = Path(
        "build/cifar"
    ),
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            callback=_known, help=f"One or several of {', '.join(RECIPES)}; {DEFAULT} if none."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=2, help="Half of them is trained too.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    lambda_: Annotated[
        list[float] | None,
        typer.Option(
            "--lambda",
            callback=_above_zero,
            help="TrAct's λ, one or several; 0.1 and 0.05 if none.",
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    precision: Annotated[Precision, typer.Option(help="bfloat16 is autocast.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Channels of the first layer; for the ViT a multiple of 12."),
    ] = None,
    image_size: Annotated[int, typer.Option(min=8, help="Images are scaled to this.")] = 32,
    train_limit: Annotated[int, typer.Option(min=0, help="Training images; 0 for all.")] = 0,
    test_limit: Annotated[int, typer.Option(min=0, help="Test images; 0 for all.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = DEVICE,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Seconds in which all epochs end; 0 trains none.")
    ] = None,
) -> None:
    """Train what is not complete as far as time allows; print and draw what is."""
    console = Console()
    changes: dict[str, Any] = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    recipes = {name: replace(RECIPES[name], **given) for name in recipe or []}
    settings = Settings(batch_size, precision, compiled, width, image_size, train_limit, test_limit)
    runs = plan(recipes, epochs, lambda_ or [], seeds, settings)
    until = Budget(None if budget is None else START + budget)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with products_in(precision):
            train(runs, data, out, torch.device(device), until, console)
        _report(runs, recipes, out, console)
    except (DataError, OtherRunError, TractError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _report(runs: list[Run], names: Iterable[str], out: Path, console: Console) -> None:
    """Print and draw the complete runs, and say how many there are."""
    progress = {run: read_progress(run, out) for run in runs}
    complete = {run: found for run, found in progress.items() if found and found.weights}
    for name in names:
        of_recipe = {run: found for run, found in complete.items() if run.name == name}
        if not of_recipe:
            continue
        console.print(table(name, of_recipe))
        for sentence in findings(of_recipe):
            console.print(sentence, highlight=False)
        for path in save_plot(out / name, name, of_recipe):
            typer.echo(f"saved {path}")
    left = len(runs) - len(complete)
    typer.echo(
        f"{len(complete)} of {len(runs)} runs are complete"
        + (", the same command goes on with the rest" if left else "")
    )


if __name__ == "__main__":
    typer.run(run)
