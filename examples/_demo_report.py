"""What the demo says of its result: the comparison, tables, a sentence, a plot, a JSON file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
from rich.table import Table

from _demo_training import Histories, Run, Settings

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


@dataclass(frozen=True)
class Comparison:
    """The two arms, seed by seed.

    Attributes:
        differences: Final accuracy of TrAct minus the plain model's, one per seed.
        plain_epochs: Epochs until the plain model first had the accuracy that it ended with.
        tract_epochs: Epochs until TrAct first had that same accuracy; None where it never had.
    """

    differences: list[float]
    plain_epochs: list[int | None]
    tract_epochs: list[int | None]


def compare(histories: Histories) -> Comparison:
    """Compare the final accuracies and the epochs to the plain model's."""
    runs = zip(histories.plain, histories.tract, strict=True)
    pairs = [(plain.accuracies, tract.accuracies) for plain, tract in runs]
    return Comparison(
        differences=[tract[-1] - plain[-1] for plain, tract in pairs],
        plain_epochs=[_first_epoch(plain, plain[-1]) for plain, _ in pairs],
        tract_epochs=[_first_epoch(tract, plain[-1]) for plain, tract in pairs],
    )


def _first_epoch(accuracies: Sequence[float], target: float) -> int | None:
    return next((e for e, accuracy in enumerate(accuracies) if accuracy >= target), None)


def _median(epochs: Sequence[int | None]) -> float | None:
    """Take the median, an epoch that never came being later than all others."""
    median = statistics.median(math.inf if epoch is None else epoch for epoch in epochs)
    return median if math.isfinite(median) else None


def accuracy_table(histories: Histories) -> Table:
    """Tabulate the test accuracy by epoch, mean ± standard deviation over the seeds."""
    table = Table(title="Test accuracy (%), mean ± standard deviation")
    for column in ("epoch", "plain", "TrAct", "TrAct − plain"):
        table.add_column(column, justify="right")
    for epoch, (plain, tract) in enumerate(
        zip(_by_epoch(histories.plain), _by_epoch(histories.tract), strict=True)
    ):
        difference = [b - a for a, b in zip(plain, tract, strict=True)]
        table.add_row(str(epoch), _spread(plain), _spread(tract), _spread(difference, signed=True))
    return table


def epochs_table(comparison: Comparison) -> Table:
    """Tabulate the epochs that each seed took to the plain model's final accuracy."""
    table = Table(title="Epochs to plain's final accuracy")
    for column in ("seed", "plain", "TrAct"):
        table.add_column(column, justify="right")
    rows = zip(comparison.plain_epochs, comparison.tract_epochs, strict=True)
    for seed, (plain, tract) in enumerate(rows):
        table.add_row(str(seed), _epoch(plain), _epoch(tract))
    table.add_section()
    table.add_row(
        "median", _epoch(_median(comparison.plain_epochs)), _epoch(_median(comparison.tract_epochs))
    )
    return table


def _by_epoch(runs: list[Run]) -> list[list[float]]:
    return [list(seeds) for seeds in zip(*(run.accuracies for run in runs), strict=True)]


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    mean = f"{100 * statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _epoch(epoch: float | None) -> str:
    return "not reached" if epoch is None else f"{epoch:g}"


def verdict(comparison: Comparison) -> str:
    """Say in words who ended higher, how sure that is, and who was there first."""
    differences = comparison.differences
    count = len(differences)
    mean = statistics.fmean(differences)
    higher = sum(difference > 0 for difference in differences)
    lower = sum(difference < 0 for difference in differences)
    if mean == 0:
        finding = "TrAct ends level with the plain gradient on average"
    else:
        direction = "above" if mean > 0 else "below"
        finding = f"TrAct ends {100 * abs(mean):.2f} points {direction} the plain gradient"
    if count == 1:
        certainty = "One seed can't tell this from chance."
    else:
        # The standard error of the paired difference.
        error = statistics.stdev(differences) / math.sqrt(count)
        seeds = f"higher in {higher}, lower in {lower}, equal in {count - higher - lower}"
        finding += f" (mean over {count} seeds: {seeds})"
        if abs(mean) <= 2 * error:
            certainty = "That is within two standard errors, so these seeds show no difference."
        else:
            certainty = "That is more than two standard errors."
    plain, tract = (_median(e) for e in (comparison.plain_epochs, comparison.tract_epochs))
    if tract is None:
        reached = "in half of the seeds or more, TrAct never has the plain model's final accuracy"
        reached = reached if count > 1 else "TrAct never has the plain model's final accuracy"
    else:
        reached = f"TrAct has the plain model's final accuracy at epoch {tract:g}"
        reached = f"in the median {reached}" if count > 1 else reached
    return f"{finding}. {certainty} And {reached}; the plain model has it at epoch {_epoch(plain)}."


def save_json(
    path: Path, dataset: str, settings: Settings, histories: Histories, comparison: Comparison
) -> None:
    """Write every number that the tables and the plot show; accuracies lie in [0, 1]."""
    record = {
        "dataset": dataset,
        "settings": asdict(settings),
        "accuracy": {
            "plain": [run.accuracies for run in histories.plain],
            "tract": [run.accuracies for run in histories.tract],
        },
        "epochs_to_plain_final": {
            "plain": comparison.plain_epochs,
            "tract": comparison.tract_epochs,
        },
        "final_difference": comparison.differences,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def save_plot(stem: Path, dataset: str, settings: Settings, histories: Histories) -> list[Path]:
    """Draw the accuracies and their difference from epoch 1 on (at 0 the arms are equal).

    Returns:
        The paths of the PNG and of the SVG.
    """
    figure, (accuracy, difference) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    plain, tract = _by_epoch(histories.plain)[1:], _by_epoch(histories.tract)[1:]
    paired = [
        [b - a for a, b in zip(*arms, strict=True)] for arms in zip(plain, tract, strict=True)
    ]
    _draw_band(accuracy, plain, "tab:gray", "plain gradient")
    _draw_band(accuracy, tract, "tab:orange", f"TrAct, λ = {settings.lambda_:g}")
    final = 100 * statistics.fmean(plain[-1])
    accuracy.axhline(final, color="tab:gray", linewidth=1, linestyle=":")
    accuracy.set_ylabel("test accuracy (%)")
    accuracy.legend(loc="lower right")
    _draw_band(difference, paired, "tab:blue", "same seed")
    difference.axhline(0, color="black", linewidth=1)
    difference.set_ylabel("TrAct − plain (points)")
    difference.set_xlabel("epoch")
    difference.xaxis.set_major_locator(MaxNLocator(integer=True))
    band = f"mean and range of {settings.seeds} seeds" if settings.seeds > 1 else "one seed"
    accuracy.set_title(f"Training on {dataset}: {band} (dotted: where the plain gradient ends)")
    for axes in (accuracy, difference):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, stem)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and as SVG."""
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _draw_band(axes: Axes, by_epoch: list[list[float]], colour: str, label: str) -> None:
    """Draw the mean over the seeds as a line and their range as a band, in per cent."""
    epochs = range(1, len(by_epoch) + 1)
    means = [100 * statistics.fmean(seeds) for seeds in by_epoch]
    low, high = ([100 * bound(seeds) for seeds in by_epoch] for bound in (min, max))
    axes.fill_between(epochs, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(epochs, means, color=colour, marker="o", markersize=4, linewidth=2, label=label)
