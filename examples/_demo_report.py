"""What the demo says of its result: the comparison, tables, a sentence, a plot, a JSON file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from _demo_data import Dataset
from _demo_training import ARMS, Arm, Histories, Run, Settings

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS: dict[Arm, str] = {"plain": "tab:gray", "tract": "tab:orange"}


@dataclass(frozen=True)
class Comparison:
    """The two arms, seed by seed.

    Attributes:
        differences: Final accuracy of TrAct minus the plain model's, one per seed.
        plain_epochs: Epochs until the plain model first had the accuracy that it ended with.
        tract_epochs: Epochs until TrAct first had that same accuracy; None where it never had.
        step_times: Each arm's median time of a training step, in milliseconds.
    """

    differences: list[float]
    plain_epochs: list[int | None]
    tract_epochs: list[int | None]
    step_times: dict[Arm, float]

    @property
    def cost(self) -> float:
        """How many times the plain one's time a step with TrAct takes."""
        return self.step_times["tract"] / self.step_times["plain"]


def compare(histories: Histories, step_times: dict[Arm, list[float]]) -> Comparison:
    """Compare the final accuracies, the epochs to the plain model's, and the steps' times."""
    runs = zip(histories["plain"], histories["tract"], strict=True)
    pairs = [(plain.accuracies, tract.accuracies) for plain, tract in runs]
    return Comparison(
        differences=[tract[-1] - plain[-1] for plain, tract in pairs],
        plain_epochs=[_first_epoch(plain, plain[-1]) for plain, _ in pairs],
        tract_epochs=[_first_epoch(tract, plain[-1]) for plain, tract in pairs],
        step_times={arm: statistics.median(times) for arm, times in step_times.items()},
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
    by_epoch = zip(*(_by_epoch(histories[arm]) for arm in ARMS), strict=True)
    for epoch, (plain, tract) in enumerate(by_epoch):
        difference = [b - a for a, b in zip(plain, tract, strict=True)]
        table.add_row(str(epoch), _spread(plain), _spread(tract), _spread(difference, signed=True))
    return table


def _by_epoch(runs: list[Run]) -> list[list[float]]:
    return [list(seeds) for seeds in zip(*(run.accuracies for run in runs), strict=True)]


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    mean = f"{100 * statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def verdict(comparison: Comparison) -> str:
    """Say in words who ended higher, how sure that is, who was there first, and what it costs."""
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
    times = " and ".join(f"{comparison.step_times[arm]:.2f}" for arm in ARMS)
    return (
        f"{finding}. {certainty} And {reached}; the plain model has it at epoch {plain:g}. "
        f"A training step takes {comparison.cost:.2f} times as long ({times} ms)."
    )


def save_json(
    path: Path, dataset: Dataset, settings: Settings, histories: Histories, comparison: Comparison
) -> None:
    """Write every number that the table and the plot show; accuracies lie in [0, 1]."""
    record = {
        "dataset": dataset.name,
        "note": dataset.note,
        "settings": asdict(settings),
        "accuracy": {arm: [run.accuracies for run in runs] for arm, runs in histories.items()},
        "epochs_to_plain_final": {
            "plain": comparison.plain_epochs,
            "tract": comparison.tract_epochs,
        },
        "final_difference": comparison.differences,
        "step_milliseconds": comparison.step_times,
        "cost": comparison.cost,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def save_plot(
    stem: Path, dataset: Dataset, settings: Settings, histories: Histories, comparison: Comparison
) -> list[Path]:
    """Draw accuracies and their difference from epoch 1 on (at 0 the arms are equal), and the cost.

    Above them, if something was done to the images: some of them before and after.

    Returns:
        The paths of the PNG and of the SVG.
    """
    before = dataset.before
    figure, axes = plt.subplot_mosaic(
        "AC\nDC" if before is None else "II\nAC\nDC",
        figsize=(10, 6 if before is None else 7.2),
        width_ratios=(5, 1),
        height_ratios=(3, 2) if before is None else (1.2, 3, 2),
        layout="constrained",
    )
    if before is not None:
        _draw_images(axes["I"], before, dataset.train.images)
    arms = [_by_epoch(histories[arm])[1:] for arm in ARMS]
    labels = ("plain gradient", f"TrAct, λ = {settings.lambda_:g}")
    for arm, by_epoch, label in zip(ARMS, arms, labels, strict=True):
        final = 100 * statistics.fmean(by_epoch[-1])
        _draw_band(axes["A"], by_epoch, COLOURS[arm], f"{label}: {final:.1f} % at the end")
    paired = [[b - a for a, b in zip(*epoch, strict=True)] for epoch in zip(*arms, strict=True)]
    _draw_band(axes["D"], paired, "tab:blue", "TrAct − plain, same seed")
    axes["D"].axhline(0, color="black", linewidth=1)
    axes["A"].set_ylabel("test accuracy (%)")
    axes["D"].set_ylabel("difference (points)")
    axes["D"].set_xlabel("epoch")
    axes["A"].sharex(axes["D"])
    axes["A"].tick_params(labelbottom=False)
    _draw_cost(axes["C"], comparison)
    band = "one seed"
    if settings.seeds > 1:
        band = f"mean ± standard deviation of {settings.seeds} seeds"
    figure.suptitle(f"Training on {dataset.name}: {band}", weight="bold")
    return save_figure(figure, stem)


def _draw_images(axes: Axes, before: Tensor, after: Tensor, count: int = 24) -> None:
    """Draw the first images before and after, each row on one scale of grey."""
    rows = torch.stack([before[:count, 0], after[:count, 0]])
    low, high = rows.amin((1, 2, 3), keepdim=True), rows.amax((1, 2, 3), keepdim=True)
    tiles = F.pad((rows - low) / (high - low), (1, 1, 1, 1), value=torch.nan)
    axes.imshow(tiles.transpose(1, 2).flatten(2).flatten(0, 1), "gray")
    title = "above as they were, below as trained on, in light chosen so that the effect can show"
    axes.set_title(title, fontsize="medium")
    axes.axis("off")


def _draw_band(axes: Axes, by_epoch: list[list[float]], colour: str, label: str) -> None:
    """Draw the mean over the seeds as a line, their standard deviation as a band, in per cent."""
    epochs = range(1, len(by_epoch) + 1)
    means = 100 * np.mean(by_epoch, axis=1)
    deviations = 100 * np.std(by_epoch, axis=1, ddof=len(by_epoch[0]) > 1)
    axes.fill_between(
        epochs, means - deviations, means + deviations, color=colour, alpha=0.25, linewidth=0
    )
    axes.plot(epochs, means, color=colour, marker="o", markersize=4, linewidth=2, label=label)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_cost(axes: Axes, comparison: Comparison) -> None:
    """Draw the median times of a training step."""
    times = [comparison.step_times[arm] for arm in ARMS]
    bars = axes.bar(["plain", "TrAct"], times, 0.6, color=[COLOURS[arm] for arm in ARMS])
    axes.bar_label(bars, [f"{time:.2f}" for time in times], padding=2)
    axes.set_title(f"ms per step: × {comparison.cost:.2f}", fontsize="medium")
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and as SVG."""
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
