"""Train a small convolutional net with the plain gradient and with TrAct's, and compare.

Then export the net with TrAct and train it again from the same start in ONNX Runtime, and leave a
report on what the pass did to it.

`make demo` runs this on scikit-learn's digits, to each of which it gives a contrast, a brightness
and a slope of light. That was chosen so that TrAct's effect can show: on the digits as they are
(`--even-light`) both arms end at 99 %. `make demo DATA=FOLDER` runs on the images in
`FOLDER/train/CLASS/*.jpg` and `FOLDER/test/CLASS/*.jpg` as they are. Both arms of a seed start from
the same weights and see the same batches at the same learning rate, which is the plain gradient's
best. Whatever comes out is reported as it is.

Needs the extra `demo`.
"""

from __future__ import annotations

import _named_extra  # noqa: F401  # isort: skip

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from _demo_data import DataError, Dataset, read_digits, read_image_folder
from _demo_inspection import save_report
from _demo_onnx_runtime import SEED, Runtimes, export, train_exported, train_nudged
from _demo_report import accuracy_table, compare, save_json, save_plot, verdict
from _demo_runtimes_report import (
    runtimes_table,
    runtimes_verdict,
    save_runtimes_json,
    save_runtimes_plot,
)
from _demo_training import Histories, Run, Settings, time_steps, train_arms
from tract_fx import MissingRuntimeError, TractError

# The best of seven for the *plain* gradient on the digits in uneven light; its mean final test
# accuracy in % over 10 seeds of 10 epochs is 79.47 at 0.01, 89.80 at 0.02, 93.40 at 0.05, 93.44 at
# 0.1, 93.56 at 0.2, 91.80 at 0.4 and 73.29 at 0.8.
LEARNING_RATE = 0.2


def run(
    data: Annotated[
        Path | None, typer.Option(help="Folder with train/CLASS/*.jpg and test/CLASS/*.jpg.")
    ] = None,
    uneven_light: Annotated[
        bool, typer.Option("--uneven-light/--even-light", help="Of the digits.")
    ] = True,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; each trains twice.")] = 10,
    lambda_: Annotated[float, typer.Option("--lambda", help="TrAct's λ.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of both arms.")] = LEARNING_RATE,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("build/demo"),
    image_size: Annotated[int, typer.Option(min=8, help="--data is scaled to this.")] = 32,
    train_limit: Annotated[
        int, typer.Option(min=0, help="Training images to take from --data; 0 for all.")
    ] = 5000,
    test_limit: Annotated[
        int, typer.Option(min=0, help="Test images to take from --data; 0 for all.")
    ] = 2000,
) -> None:
    """Train with the plain gradient and with TrAct's; print the comparison, save it with a plot."""
    console = Console()
    settings = Settings(epochs, seeds, lambda_, batch_size, learning_rate)
    try:
        if data is None:
            dataset = read_digits(uneven_light=uneven_light)
        else:
            dataset = read_image_folder(
                data, image_size=image_size, train_limit=train_limit, test_limit=test_limit
            )
        histories = _train(dataset, settings, console)
        _report(dataset, settings, histories, out, console)
        try:
            runtimes = _train_again(
                dataset, settings, histories["tract"][SEED], out / "onnx", console
            )
            _report_runtimes(dataset, settings, runtimes, out, console)
        except MissingRuntimeError as error:
            console.print(f"Not trained in ONNX Runtime: {error}", highlight=False)
        with console.status("inspecting the net with TrAct"):
            console.print(
                save_report(dataset, settings, histories, out / "report.html"), highlight=False
            )
        _say_saved(out / "report.html")
    except (DataError, TractError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _train(dataset: Dataset, settings: Settings, console: Console) -> Histories:
    """Say what is trained, then train under a progress bar."""
    console.print(
        f"{dataset.name}: {len(dataset.train.labels)} training and {len(dataset.test.labels)} test "
        f"images of {' × '.join(map(str, dataset.train.images.shape[1:]))}, "
        f"{len(dataset.classes)} classes; {settings.seeds} seeds, {settings.epochs} epochs, "
        f"λ = {settings.lambda_:g}, learning rate {settings.learning_rate:g}. {dataset.note}",
        highlight=False,
        markup=False,
    )
    with _progress(console) as progress:
        task = progress.add_task("training", total=2 * settings.seeds * settings.epochs)
        return train_arms(dataset, settings, lambda: progress.advance(task))


def _report(
    dataset: Dataset, settings: Settings, histories: Histories, out: Path, console: Console
) -> None:
    with console.status("timing training steps"):
        comparison = compare(histories, time_steps(dataset, settings))
    console.print(accuracy_table(histories), verdict(comparison))
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "results.json", dataset, settings, histories, comparison)
    plots = save_plot(out / "accuracy", dataset, settings, histories, comparison)
    _say_saved(*plots, out / "results.json")


def _train_again(
    dataset: Dataset, settings: Settings, pytorch: Run, directory: Path, console: Console
) -> Runtimes:
    """Export the net with TrAct, and train it from there under progress bars."""
    with console.status("exporting the net with TrAct to ONNX Runtime Training"):
        export(dataset, settings, directory)
    _say_saved(directory)
    with _progress(console) as progress:
        tasks = [
            progress.add_task(name, total=settings.epochs)
            for name in ("ONNX Runtime", "PyTorch, nudged")
        ]
        return Runtimes(
            pytorch,
            train_exported(directory, dataset, settings, lambda: progress.advance(tasks[0])),
            train_nudged(dataset, settings, lambda: progress.advance(tasks[1])),
        )


def _report_runtimes(
    dataset: Dataset, settings: Settings, runtimes: Runtimes, out: Path, console: Console
) -> None:
    console.print(runtimes_table(runtimes, settings.epochs), runtimes_verdict(runtimes))
    save_runtimes_json(out / "losses.json", runtimes)
    plots = save_runtimes_plot(out / "losses", dataset.name, runtimes)
    _say_saved(*plots, out / "losses.json")


def _progress(console: Console) -> Progress:
    description = TextColumn("{task.description}")
    return Progress(
        description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _say_saved(*paths: Path) -> None:
    for path in paths:
        typer.echo(f"saved {path}")


if __name__ == "__main__":
    typer.run(run)
