"""The benchmarks' plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from growth import Series
from layer_figures import LayerFigures

# Okabe and Ito's blue and vermilion, told apart by colour-blind readers.
COLOURS = {"torch-tract": "#0072b2", "tract_fx": "#d55e00"}
_MARKERS = {"torch-tract": "s", "tract_fx": "o"}
_AIM = "#333333"


def save_growth(series: Sequence[Series], path: Path) -> None:
    """Draw time and memory of the Gram, a row of panels for each series."""
    figure = Figure(figsize=(10, 3.4 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), 2, squeeze=False)
    for one, (time, memory) in zip(series, panels, strict=True):
        for arm, points in one.figures.items():
            sizes, times, peaks = zip(*points, strict=True)
            look = {"color": COLOURS[arm], "marker": _MARKERS[arm], "label": arm}
            time.plot(sizes, times, **look)
            memory.plot(sizes, [peak / 2**20 for peak in peaks], **look)
        _add_linear(time, one)
        for panel, label in ((time, "time of the Gram, ms"), (memory, "peak memory, MiB")):
            panel.set(xscale="log", yscale="log", xlabel=one.label, ylabel=label)
            panel.set_xticks(one.sizes, [str(size) for size in one.sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.set_title(one.title, fontsize="medium")
            panel.legend(frameon=False)
    _save(figure, path)


def _add_linear(panel: Axes, series: Series) -> None:
    """A line of linear growth through our last point."""
    size, ms, _ = series.figures["tract_fx"][-1]
    times = [ms * each / size for each in series.sizes]
    panel.plot(series.sizes, times, color="grey", linestyle=":", label="linear growth", zorder=0)


def save_ratios(rows: Sequence[LayerFigures], path: Path) -> None:
    """Draw time of the layer ÷ plain as bars, with the aims."""
    figure = Figure(figsize=(9, 0.62 * len(rows) + 1.4), layout="constrained")
    panel = figure.subplots()
    height = 0.38
    for index, row in enumerate(rows):
        ratios = {"torch-tract": row.peer_over_plain, "tract_fx": row.ours_over_plain}
        for offset, (arm, ratio) in zip((-height / 2, height / 2), ratios.items(), strict=True):
            if ratio is not None:
                panel.barh(index + offset, ratio, height, color=COLOURS[arm])
                panel.annotate(
                    f"{ratio:.2f}",
                    (ratio, index + offset),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize="small",
                )
        if row.stem.aims:
            aim = row.stem.aims.layer.bound
            panel.plot([aim, aim], [index, index + height], color=_AIM, linewidth=2.5)
    for arm, colour in COLOURS.items():
        panel.barh([0], [0], color=colour, label=arm)
    panel.plot([], [], color=_AIM, linewidth=2.5, label="aim for tract_fx")
    panel.axvline(1, color="grey", linestyle=":", label="plain")
    panel.set_yticks(range(len(rows)), [row.stem.name for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel("forward and backward of the layer ÷ plain")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
