"""What the demo says of PyTorch beside ONNX Runtime: a table, a sentence, a plot, a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from matplotlib import pyplot as plt
from rich.table import Table

from _demo_onnx_runtime import FIRST_STEPS, SEED, Runtimes, largest_difference
from _demo_report import save_figure
from _demo_training import Run


def runtimes_table(runtimes: Runtimes, epochs: int) -> Table:
    """Tabulate how the runs ended, and how far their losses were from PyTorch's."""
    runs = _named(runtimes)
    steps = len(runtimes.pytorch.losses)
    table = Table(title=f"TrAct in PyTorch and in ONNX Runtime, seed {SEED}")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    finals = [f"{100 * run.accuracies[-1]:.2f}" for run in runs.values()]
    table.add_row("final test accuracy (%)", *finals)
    first = min(FIRST_STEPS, steps)
    spans = (
        (f"|Δ loss|, first {first} steps", first),
        ("|Δ loss|, first epoch", steps // epochs),
        (f"|Δ loss|, all {steps} steps", steps),
    )
    for name, span in spans:
        differences = [largest_difference(runtimes.pytorch, run, span) for run in runs.values()]
        table.add_row(name, "", *(f"{difference:.1e}" for difference in differences[1:]))
    return table


def _named(runtimes: Runtimes) -> dict[str, Run]:
    return {
        "PyTorch": runtimes.pytorch,
        "ONNX Runtime": runtimes.onnx_runtime,
        "PyTorch, nudged": runtimes.nudged,
    }


def runtimes_verdict(runtimes: Runtimes) -> str:
    """Say in words how far the losses of the two runtimes are apart, and what that compares to."""
    steps = len(runtimes.pytorch.losses)
    early, late, own = (
        largest_difference(runtimes.pytorch, run, span)
        for run, span in (
            (runtimes.onnx_runtime, FIRST_STEPS),
            (runtimes.onnx_runtime, steps),
            (runtimes.nudged, steps),
        )
    )
    return (
        f"Largest difference between the losses in PyTorch and in ONNX Runtime: {early:.1e} over "
        f"the first {min(FIRST_STEPS, steps)} steps, {late:.1e} over all {steps}. "
        "Training magnifies every rounding, so that float32 runs drift apart in any runtime: "
        f"PyTorch's own loss moves by {own:.1e} when its starting weights change in their last "
        "bit (nudged)."
    )


def save_runtimes_json(path: Path, runtimes: Runtimes) -> None:
    """Write every loss and accuracy of the runs."""
    record = {
        "seed": SEED,
        **asdict(runtimes),
        "largest_difference": largest_difference(runtimes.pytorch, runtimes.onnx_runtime),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def save_runtimes_plot(stem: Path, dataset: str, runtimes: Runtimes) -> list[Path]:
    """Draw the loss by step in both runtimes, and how far it is from PyTorch's.

    Returns:
        The paths of the PNG and of the SVG.
    """
    figure, (loss, difference) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    steps = range(1, len(runtimes.pytorch.losses) + 1)
    # One line over the other: both can be seen where they agree.
    styles = [("tab:gray", 4.0, "-"), ("tab:orange", 1.5, "--"), ("tab:blue", 1.0, ":")]
    for (name, run), (colour, width, line) in zip(_named(runtimes).items(), styles, strict=True):
        style = {"color": colour, "linestyle": line, "label": name}
        if run is not runtimes.nudged:
            loss.plot(steps, run.losses, linewidth=width, **style)
        if run is not runtimes.pytorch:
            pairs = zip(runtimes.pytorch.losses, run.losses, strict=True)
            # What is equal has no place on a logarithmic axis.
            apart = [abs(a - b) or float("nan") for a, b in pairs]
            difference.plot(steps, apart, linewidth=1, **(style | {"linestyle": "-"}))
    loss.set_ylabel("training loss")
    loss.set_title(f"TrAct on {dataset}: the same batches in two runtimes, seed {SEED}")
    difference.set_yscale("log")
    difference.set_ylabel("|Δ loss| to PyTorch")
    difference.set_xlabel("step")
    for axes in (loss, difference):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, stem)
