"""An inspection as HTML: a page that is one file, and a compact form for notebooks."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tract_fx.errors import MissingRuntimeError
from tract_fx.inspection.inspection import Curves, Inspection
from tract_fx.inspection.records import ForwardDiff, GraphView, LayerStatistics, WeightCheck
from tract_fx.inspection.render import words
from tract_fx.inspection.render.pictures import LEGEND, svg
from tract_fx.inspection.render.plots import curve_plots, share_plot, spectrum_plot
from tract_fx.inspection.render.text import aligned, graph_lines

_MOST_DRAWN = 240
_MOST_LINES = 4000
_SCALE = 1.2
"""Pixels of a picture's point: its small letters are of 13 then, and of 10.5 where it shrinks."""
_RULER = (-9.0, 1.0)  # powers of ten at the two ends


_Lines = list[tuple[str, str]]
"""Lines of code on the page, and the class that each is coloured by."""


def page_html(inspection: Inspection, curves: Curves | None = None) -> str:
    """Make a page of an inspection, and of what training gave by epoch."""
    plots = curve_plots(curves) if curves else []
    page = _environment().get_template("page.html")
    return page.render(_context(inspection), curves=list(map(Markup, plots)))


def notebook_html(inspection: Inspection) -> str:
    """Make an inspection's form for the output of a notebook's cell."""
    return _environment().get_template("notebook.html").render(_context(inspection), curves=[])


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
    )
    environment.filters.update(
        number=words.number,
        operation=words.operation,
        path=words.join_path,
        place=words.place,
        sentence=words.sentence,
        shape=words.shape,
        size=words.rows_and_columns,
        worst=words.worst,
    )
    environment.globals.update(plural=words.plural, ruler=_ruler, kinds=words.KINDS)
    return environment


def _finalize(value: Any) -> Any:
    """Keep what no page may hold out of every value that a template writes."""
    if isinstance(value, Markup):
        return value
    return "–" if value is None else words.printable(str(value))


def _context(inspection: Inspection) -> dict[str, Any]:
    backward, statistics = inspection.backward, inspection.statistics
    forward = inspection.forward
    return {
        "it": inspection,
        "verdict": words.verdict(inspection),
        "taken": [layer for layer in inspection.layers if layer.taken],
        "untaken": [layer for layer in inspection.layers if not layer.taken],
        "diff": _diff(forward),
        "texts": _texts(forward),
        "change": _picture(forward.view) if forward.view.nodes else None,
        "short": None if backward is None else _picture(backward.short),
        "expanded": (
            None if backward is None or backward.expanded is None else _picture(backward.expanded)
        ),
        "measured": [] if statistics is None else [_measured(s) for s in statistics.layers],
    }


def _diff(forward: ForwardDiff) -> _Lines:
    styles = {"+": "added", "-": "removed", "@": "place"}
    return [(line, styles.get(line[:1], "")) for line in forward.lines()]


def _texts(forward: ForwardDiff) -> list[tuple[str, _Lines]]:
    """Both graphs whole, where they are not too long to be of use."""
    texts = [("Plain graph", forward.before), ("Graph with TrAct", forward.after)]
    lines = [(title, [(line, "") for line in text.splitlines()]) for title, text in texts]
    return [(title, text) for title, text in lines if 0 < len(text) <= _MOST_LINES]


def _picture(view: GraphView) -> dict[str, Any]:
    """A graph on the page: as a picture where there is one, and as text."""
    drawing, width, missing = None, 0, ""
    if len(view.nodes) > _MOST_DRAWN:
        missing = (
            f"{len(view.nodes):,} nodes are too many for a picture on this page. "
            "save('picture.svg') draws them all."
        )
    else:
        try:
            drawing, width = _sized(svg(view))
        except MissingRuntimeError as error:
            missing = f"No picture: {error}"
    lines = graph_lines(view)
    styles = ["heading" if line.heading else "tract" if line.tract else "" for line in lines]
    kinds: set[str] = {node.kind for node in view.nodes}
    return {
        "view": view,
        "drawing": drawing,
        "width": width,
        "missing": missing,
        "lines": list(zip(aligned(lines), styles, strict=True)),
        "legend": {kind: text for kind, text in LEGEND.items() if kind in kinds},
    }


def _sized(drawing: str) -> tuple[Markup, int]:
    """Let the style sheet scale a picture, which Graphviz gives in points; and say its width."""
    width = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+) [\d.]+"', drawing)
    assert width is not None
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    return Markup(drawing), round(_SCALE * float(width[1]))


def _measured(layer: LayerStatistics) -> dict[str, Any]:
    """Statistics of one layer with their plots."""
    named = dataclasses.replace(layer, name=words.printable(layer.name))
    plots = [spectrum_plot(named)] if any(value > 0 for value in layer.eigenvalues) else []
    plots += [share_plot(named)] if layer.images else []
    return {"layer": layer, "facts": words.measured(layer), "plots": list(map(Markup, plots))}


def _ruler(weight: WeightCheck) -> list[tuple[str, float]]:
    """Place a weight's errors on a logarithmic axis."""
    marks = {
        "tolerance": weight.operator.tolerance,
        "floor": weight.floor,
        "end": weight.end_to_end,
        "plain": weight.plain,
        "operator": weight.operator.error,
    }
    low, high = _RULER
    places = []
    for name, value in marks.items():
        if value is not None and value >= 0:  # not NaN
            power = math.log10(value) if value > 0 else low
            places.append((name, 100 * (min(max(power, low), high) - low) / (high - low)))
    return places
