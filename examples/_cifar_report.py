"""What `cifar.py` says of the runs that are complete: a table, sentences, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from _cifar_runs import Progress, Run
from _demo_report import save_figure

Results: TypeAlias = Mapping[Run, Progress]
# λ, None for the plain gradient, and the number of epochs.
Arm: TypeAlias = tuple[float | None, int]

# Student's: of a mean's error in standard errors, 95 % lie within, by degrees of freedom. For more
# than nine it is smaller, and the last is taken.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
# Okabe and Ito's, told apart by colour-blind readers.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
PLAIN = "#555555"


def by_arm(results: Results) -> dict[Arm, dict[int, Progress]]:
    """Give each arm's runs by seed: the plain gradient first, then by λ; full before half."""
    arms: dict[Arm, dict[int, Progress]] = {}
    for run in sorted(results, key=lambda run: (run.lambda_ or math.inf, run.epochs), reverse=True):
        arms.setdefault((run.lambda_, run.epochs), {})[run.seed] = results[run]
    return arms


def table(name: str, results: Results) -> Table:
    """Tabulate the arms of a recipe, mean ± standard deviation over their seeds."""
    title = f"{name}, test accuracy after the last epoch"
    made = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("", no_wrap=True)
    for column in ("seeds", "accuracy, %", "epochs to the\nplain final", "s per\nepoch"):
        made.add_column(column, justify="right", no_wrap=True)
    arms = by_arm(results)
    full = arms.get((None, _full(results)), {})
    for arm, seeds in arms.items():
        finals = [100 * progress.accuracies[-1] for progress in seeds.values()]
        times = [statistics.median(progress.seconds) for progress in seeds.values()]
        made.add_row(
            label(arm),
            str(len(seeds)),
            _spread(finals),
            _epochs_to([(seeds[s], full[s]) for s in seeds if s in full]),
            f"{statistics.fmean(times):.2f}",
        )
    return made


def label(arm: Arm) -> str:
    """Name an arm."""
    lambda_, epochs = arm
    name = "plain" if lambda_ is None else f"TrAct, λ = {lambda_:g}"
    return f"{name}, {epochs} epoch{'s' if epochs > 1 else ''}"


def _full(results: Results) -> int:
    return max(run.epochs for run in results)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _epochs_to(pairs: Sequence[tuple[Progress, Progress]]) -> str:
    """Give the median of the epochs to the accuracy that the plain run of the seed ended with."""
    if not pairs:
        return "–"
    reached = [
        next((e for e, a in enumerate(run.accuracies, 1) if a >= plain.accuracies[-1]), math.inf)
        for run, plain in pairs
    ]
    never = sum(map(math.isinf, reached))
    median = statistics.median_high(reached)  # an epoch that never came is later than all others
    shown = "never" if math.isinf(median) else f"{median:g}"
    return f"{shown} ({never} of {len(reached)} never)" if 0 < never < len(reached) else shown


def findings(results: Results) -> list[str]:
    """Compare every arm with the plain gradient at full epochs, seed by seed, in words.

    Args:
        results: The complete runs of one recipe.

    Returns:
        What there is to say of each arm that shares a seed with it, those of half the epochs first.
    """
    arms, full = by_arm(results), _full(results)
    plain = arms.get((None, full), {})
    said = []
    for (lambda_, epochs), seeds in sorted(arms.items(), key=lambda item: item[0][1]):
        shared = sorted({*seeds} & {*plain})
        if (lambda_, epochs) == (None, full) or not shared:
            continue
        differences = [
            100 * (seeds[seed].accuracies[-1] - plain[seed].accuracies[-1]) for seed in shared
        ]
        times = [
            sum(seeds[seed].seconds) / sum(plain[seed].seconds)
            for seed in shared
            if seeds[seed].devices == plain[seed].devices
        ]
        mean = f"{statistics.fmean(times):.2f}" if times else ""
        # A device may be slower at one time than at another.
        cost = f" It trained for {mean} times as long, at another time." if times else ""
        against = f"{label((lambda_, epochs))}, against {label((None, full))}"
        said.append(f"{against}: {_difference(differences)}{cost}")
    return said


def _difference(differences: Sequence[float]) -> str:
    """Say by how much it ends higher or lower, in points, and how sure that is."""
    count, mean = len(differences), statistics.fmean(differences)
    if count == 1:
        return f"{mean:+.2f} points. One seed can't tell this from chance."
    higher, lower = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    reach = error * STUDENT[min(count - 1, len(STUDENT)) - 1]
    low, high = mean - reach, mean + reach
    shown = "no difference is shown" if low <= 0 <= high else "so they differ"
    return (
        f"{mean:+.2f} points in the mean of {count} seeds (higher in {higher}, lower in {lower}); "
        f"95 % interval {low:+.2f} to {high:+.2f}, {shown}."
    )


def save_plot(stem: Path, name: str, results: Results) -> list[Path]:
    """Draw accuracies by epoch and by time of training, half the epochs as dashed lines.

    Args:
        stem: Path without a suffix.
        name: Of the recipe.
        results: Its complete runs.

    Returns:
        The paths of the PNG and of the SVG.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    arms, full = by_arm(results), _full(results)
    lambdas = sorted({run.lambda_ for run in results if run.lambda_ is not None}, reverse=True)
    for (lambda_, epochs), seeds in arms.items():
        colour = PLAIN if lambda_ is None else COLOURS[lambdas.index(lambda_) % len(COLOURS)]
        accuracies = 100 * np.array([progress.accuracies for progress in seeds.values()])
        seconds = np.cumsum([progress.seconds for progress in seeds.values()], axis=1).mean(0)
        for panel, along in zip(panels, (np.arange(1, epochs + 1), seconds), strict=True):
            _draw(panel, along, accuracies, colour, "-" if epochs == full else "--")
        final = _spread([*accuracies[:, -1]])
        panels[0].plot(
            [],
            [],
            "-" if epochs == full else "--",
            color=colour,
            label=f"{label((lambda_, epochs))}: {final} % (seeds: {len(seeds)})",
        )
    panels[0].set(xlabel="epoch", ylabel="test accuracy (%)")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    devices = {device for progress in results.values() for device in progress.devices}
    panels[1].set(
        xlabel=f"seconds of training, each run at its time ({', '.join(sorted(devices))})"
    )
    finals = [100 * progress.accuracies[-1] for progress in results.values()]
    lowest = 100 * min(min(progress.accuracies) for progress in results.values())
    panels[0].set_ylim(bottom=max(lowest, min(finals) - 20))
    panels[0].legend(loc="lower right", fontsize="small")
    figure.suptitle(f"{name}: mean ± standard deviation over the seeds", weight="bold")
    return save_figure(figure, stem)


def _draw(
    panel: Axes,
    along: NDArray[np.float64],
    accuracies: NDArray[np.float64],
    colour: str,
    style: str,
) -> None:
    mean = accuracies.mean(0)
    spread = accuracies.std(0, ddof=1) if len(accuracies) > 1 else np.zeros_like(mean)
    panel.fill_between(along, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    panel.plot(along, mean, style, color=colour)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
