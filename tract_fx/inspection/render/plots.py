"""Plots of a call's statistics, and of training: SVG for a page with other SVG, light or dark."""

from __future__ import annotations

import hashlib
import io
import math
import re
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tract_fx.errors import UnsupportedFormatError
from tract_fx.inspection.inspection import Curves, Runs
from tract_fx.inspection.records import ImageShare, LayerStatistics
from tract_fx.inspection.render.words import printable
from tract_fx.inspection.shares import correlation

_WIDTH = 440.0
"""Pixels. A picture this narrow can be shown at 340 with letters of 10, and at 560."""

_LETTER = 13.0
_LINE = 1.3 * _LETTER

_PLAIN, _TRACT = "#2b8fd0", "#d55e00"
"""Blue and vermilion of Okabe and Ito's palette (the blue lighter): told apart by colour-blind
readers, and seen on white as on black."""

_INK = "#010203"
"""Stands for `currentColor`, the page's own colour of text, which matplotlib has no name for."""

_FONT = "DejaVu Sans"
"""What matplotlib lays out with: wider than most, so that what fits in it fits in the page's."""

_FONTS = "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"

_STYLE = {
    "figure.dpi": 72,
    "svg.fonttype": "none",
    "svg.hashsalt": "tract_fx",
    "font.family": _FONT,
    "font.size": _LETTER,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}

_SPECTRUM_HEIGHT = 260.0

_MARKED = 256
"""So many eigenvalues are drawn as points on their line, more as the line alone."""

_DRAWN = 1000
"""So many images are drawn; of more, every second, third, …"""


def spectrum_plot(layer: LayerStatistics) -> str:
    """Draw the Gram's eigenvalues with λ, and where TrAct acts."""
    with style.context(["default", _STYLE]):
        positive = [value for value in layer.eigenvalues if value > 0]
        above = sum(value > layer.lambda_ for value in positive)
        total = len(layer.eigenvalues) + layer.zeros
        title = _spectrum_title(layer, above, total)
        figure, (axes,) = _figure(title, [_SPECTRUM_HEIGHT], above=0.6 * _LINE)
        _draw_spectrum(axes, positive, layer.lambda_)
        _label_lambda(axes, layer.lambda_, at_right=above <= 0.6 * len(positive))
        upper = f"{above:,} above λ:\nTrAct divides by the eigenvalue"
        lower = f"{total - above:,} below λ:\nall divided by about λ"
        if len(positive) < total:
            lower += f" ({total - len(positive):,} are 0)"
        axes.text(0.98, 0.98, upper, transform=axes.transAxes, ha="right", va="top")
        axes.text(0.02, 0.02, lower, transform=axes.transAxes, ha="left", va="bottom")
        return _svg(figure, title)


def _spectrum_title(layer: LayerStatistics, above: int, total: int) -> str:
    name = _short(layer.name)
    if not above:
        return f"{name}: λ is above all eigenvalues, TrAct only scales"
    if above == total:
        return f"{name}: λ is below all {total:,} eigenvalues, TrAct evens out every direction"
    return f"{name}: TrAct evens out {above:,} of {total:,} directions and only scales the rest"


def _draw_spectrum(axes: Axes, values: Sequence[float], lambda_: float) -> None:
    marker = "o" if len(values) <= _MARKED else ""
    axes.plot(
        range(1, len(values) + 1),
        values,
        marker=marker,
        markersize=3.5 if len(values) <= _MARKED // 4 else 2.5,
        linewidth=1.0 if marker else 2.0,
        color=_PLAIN,
        gid="eigenvalues",
    )
    low, high = (math.log10(end) for end in (min(*values, lambda_), max(*values, lambda_)))
    # A strip at the top and one at the bottom stay free for two lines of text and λ's label.
    share = 3.6 * _LINE / _SPECTRUM_HEIGHT
    room = max(high - low, 1.0) * share / (1 - 2 * share)
    bottom, top = 10 ** (low - room), 10 ** (high + room)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    last = max(len(values), 2)
    margin = 0.03 * last
    axes.set_xlim(1 - margin, last + margin)
    axes.axhspan(lambda_, top, color=_PLAIN, alpha=0.10, linewidth=0)
    axes.axhspan(bottom, lambda_, color=_TRACT, alpha=0.10, linewidth=0)
    axes.axhline(lambda_, color=_TRACT, linewidth=1.6, linestyle=(0, (5, 2)), gid="lambda")
    axes.yaxis.set_major_locator(FixedLocator(_powers(bottom, top)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    ticks = MaxNLocator(5, integer=True).tick_values(0, last)
    axes.xaxis.set_major_locator(FixedLocator([1, *(tick for tick in ticks if 1 < tick <= last)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("eigenvalues, the largest first")
    axes.set_ylabel("eigenvalue of XᵀX / R")


def _label_lambda(axes: Axes, lambda_: float, at_right: bool) -> None:
    """Label λ's line where no eigenvalue is drawn: at its right above it, or at its left below."""
    axes.annotate(
        f"λ = {lambda_:g}",
        (0.98 if at_right else 0.02, lambda_),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3 if at_right else -3),
        textcoords="offset points",
        ha="right" if at_right else "left",
        va="bottom" if at_right else "top",
        color=_TRACT,
        weight="bold",
    )


def share_plot(layer: LayerStatistics) -> str:
    """Draw each image's share of the update against its contrast and its brightness."""
    with style.context(["default", _STYLE]):
        title = _share_title(layer)
        images = [image for image in layer.images if math.isfinite(image.plain + image.tract)]
        if not images:
            return _empty(title, "There are no shares to draw: no image has a gradient.")
        step = math.ceil(len(images) / _DRAWN)
        figure, panels = _figure(title, [190.0, 190.0], above=1.4 * _LINE)
        panels[1].sharey(panels[0])
        _draw_shares(panels[0], images, step, "contrast")
        _draw_shares(panels[1], images, step, "brightness")
        largest = max(max(image.plain, image.tract) for image in images)
        panels[0].set_ylim(0, 105 * largest)
        return _svg(figure, title)


def _share_title(layer: LayerStatistics) -> str:
    name = _short(layer.name)
    plain, tract = layer.plain_correlation, layer.tract_correlation
    if math.isnan(plain + tract):
        return f"{name}: each image's share of the update"
    before, after = _trend(plain), _trend(tract)
    change = abs(tract) - abs(plain)
    if before != after:
        now = f"with TrAct it {after} it"
    elif before == _trend(0.0):
        now = "with TrAct or without"
    else:
        now = f"with TrAct {'more' if change > 0.1 else 'less' if change < -0.1 else 'as much'}"
    return f"{name}: an image's share {before} its contrast, {now} (r {_r(plain)} → {_r(tract)})"


def _trend(correlation: float) -> str:
    if abs(correlation) <= 0.1:
        return "hardly depends on"
    return "grows with" if correlation > 0 else "falls with"


def _r(correlation: float) -> str:
    return f"{correlation:.2f}".replace("-", "−")


def _draw_shares(axes: Axes, images: Sequence[ImageShare], step: int, looks: str) -> None:
    positions = [float(getattr(image, looks)) for image in images]
    few = len(images) <= 100
    series = [("plain", "o", _PLAIN, [image.plain for image in images])]
    series.append(("TrAct", "^", _TRACT, [image.tract for image in images]))
    for label, marker, colour, shares in series:
        found = correlation(positions, shares)
        r = "" if math.isnan(found) else f", r = {_r(found)}"
        axes.plot(
            positions[::step],
            [100 * share for share in shares[::step]],
            linestyle="",
            marker=marker,
            markersize=6 if few else 3.5,
            markerfacecolor="none" if marker == "o" else colour,
            markeredgecolor=colour,
            markeredgewidth=1.2 if few else 0.9,
            alpha=0.9 if few else 0.7,
            label=label + r,
            clip_on=False,
            gid=f"{looks}-{label.lower()}",
        )
    axes.axhline(100 / len(images), color=_INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.97),
        ncols=2,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    kind = {"contrast": "contrast (standard deviation)", "brightness": "brightness (mean)"}[looks]
    drawn = f", {len(images[::step]):,} of {len(images):,} drawn" if step > 1 else ""
    axes.set_xlabel(f"{kind} of the image{drawn}")
    axes.set_ylabel("share in %, dotted: equal")


_ARMS = (_PLAIN, "#009e73", "#cc79a7", "#56b4e9")
_DASHES = ("--", "-.", ":")


def curve_plots(curves: Curves) -> list[str]:
    """Draw what training gave by epoch: each run thin, and of several their mean thick."""
    with style.context(["default", _STYLE]):
        return [_curve_plot(what, arms) for what, arms in _read_curves(curves).items()]


def _curve_plot(what: str, arms: Mapping[str, list[list[float]]]) -> str:
    ends = ", ".join(f"{name} {_mean(runs)[-1]:.4g}" for name, runs in arms.items())
    counts = sorted({len(runs) for runs in arms.values()})
    several = f" (means of {' and '.join(map(str, counts))} runs)" if counts[-1] > 1 else ""
    title = f"{what} at the end: {ends}{several}"
    figure, (axes,) = _figure(title, [220.0], above=1.4 * _LINE)
    others = 0
    for number, (name, runs) in enumerate(arms.items()):
        is_tract = "tract" in name.lower()
        colour = _TRACT if is_tract else _ARMS[others % len(_ARMS)]
        dashes = "-" if is_tract else _DASHES[others % len(_DASHES)]
        others += not is_tract
        for run in runs if len(runs) > 1 else ():
            axes.plot(range(1, len(run) + 1), run, color=colour, linewidth=0.7, alpha=0.4)
        mean = _mean(runs)
        axes.plot(
            range(1, len(mean) + 1),
            mean,
            color=colour,
            linestyle=dashes,
            linewidth=2.0,
            marker="o",
            markersize=3.0,
            label=name,
            gid=f"curve-{number}",
        )
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=2, columnspacing=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    return _svg(figure, title)


def _read_curves(curves: Curves) -> dict[str, dict[str, list[list[float]]]]:
    """Read curves as runs by what was measured and by arm."""
    try:
        read = {
            printable(what): {printable(name): _runs(values) for name, values in arms.items()}
            for what, arms in curves.items()
        }
    except (AttributeError, TypeError, ValueError):
        read = {}
    if not all(arms and all(arms.values()) for arms in read.values()) or not read:
        raise UnsupportedFormatError(
            f"curves={reprlib.repr(curves)}",
            "an arm's curve is a number per epoch, or a sequence of runs with as many numbers each",
            'Give curves={"Test accuracy": {"plain": [0.4, 0.5], "TrAct": [0.5, 0.6]}}',
        )
    return read


def _runs(values: Runs) -> list[list[float]]:
    """Read an arm's numbers; nothing where runs are of several lengths, or none."""
    several: list[Any] = [*values]
    is_one = all(isinstance(n, (int, float)) or getattr(n, "ndim", 1) == 0 for n in several)
    runs = [[float(number) for number in run] for run in ([several] if is_one else several)]
    return runs if {len(run) for run in runs} == {len(runs[0])} - {0} else []


def _mean(runs: Sequence[Sequence[float]]) -> list[float]:
    return [sum(epoch) / len(epoch) for epoch in zip(*runs, strict=True)]


def _figure(title: str, heights: Sequence[float], above: float) -> tuple[Figure, list[Axes]]:
    """Lay out panels below one another, and the title above them."""
    lines = textwrap.wrap(title, 50)
    below, left, right = _LINE * 2.9, 66.0, 10.0
    height = 6 + _LINE * len(lines) + sum(above + panel + below for panel in heights)
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    figure.text(
        4 / _WIDTH, 1 - 4 / height, "\n".join(lines), va="top", weight="bold", linespacing=1.3
    )
    panels, top = [], height - 6 - _LINE * len(lines)
    for panel in heights:
        bottom = top - above - panel
        box = (left / _WIDTH, bottom / height, 1 - (left + right) / _WIDTH, panel / height)
        panels.append(figure.add_axes(box))
        top = bottom - below
    return figure, panels


def _empty(title: str, text: str) -> str:
    figure, (axes,) = _figure(title, [_LINE], above=0.0)
    axes.set_axis_off()
    axes.text(0, 1, text, transform=axes.transAxes, va="top")
    return _svg(figure, title)


def _short(name: str) -> str:
    return name if len(name) <= 30 else "…" + name[-29:]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, six at most."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, math.ceil((last - first + 1) / 6))
    return [10.0**power for power in range(first, last + 1) if power % step == 0]


def _number(value: float) -> str:
    """Write a power of ten."""
    power = round(math.log10(value))
    if -3 <= power <= 3:
        return f"{value:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _svg(figure: Figure, label: str) -> str:
    """Write a figure as an element that leaves the page around it alone.

    Its ids are its own (matplotlib counts from 1 in every figure), its style sheet, which would
    hold for the whole page, becomes the element's style, and text takes the page's colour.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    prefix = "plot-" + hashlib.sha256(buffer.getvalue()).hexdigest()[:10] + "-"
    for element in root.iter():
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        _share_style(element)
        element.tag = element.tag.partition("}")[2]
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            element.set(key.rpartition("}")[2], _attribute(key, value, prefix))
    width, height = (str(round(float(v))) for v in root.attrib["viewBox"].split()[2:])
    root.attrib.update(
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        role="img",
        style="max-width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt",
    )
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _share_style(group: ElementTree.Element) -> None:
    """Give markers of one style their style once, on their group: most of a plot is markers."""
    uses = [child for child in group if child.tag.endswith("}use")]
    styles = {use.attrib.get("style", "") for use in uses}
    if len(uses) > 1 and len(styles) == 1 and len(uses) == len(group):
        group.set("style", styles.pop())
        for use in uses:
            use.attrib.pop("style", None)


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key.endswith("href"):
        return value.replace("#", "#" + prefix, 1)
    if key in ("x", "y", "d"):
        return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)
    value = value.replace("url(#", "url(#" + prefix).replace(_INK, "currentColor")
    return value.replace(f"'{_FONT}'", _FONTS)
