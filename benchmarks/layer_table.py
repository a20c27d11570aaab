"""The table of first layers, which the CPU's benchmark and the accelerator's print alike."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from aims import OPERATOR_ERROR
from layer_figures import LayerFigures
from report import MISSING, against, error_cell, table

_COLUMNS = (
    "plain,\nms",
    "Gram:\npeer\n÷ ours",
    "layer:\nours\n÷ plain",
    "\npeer\n÷ plain",
    "memory:\nours\n÷ peer",
    "error:\nours,\npeer",
    "Gram's\nfloor,\nms (×)",
)


def print_layers(
    title: str,
    rows: Sequence[LayerFigures],
    errors: dict[str, dict[str, float]],
    console: Console,
) -> None:
    """Print one line a layer: the figure and, below it, its aim.

    Args:
        title: Of the table.
        rows: The layers' figures.
        errors: By layer and arm, at the operator.
        console: Where to.
    """
    printed = table(title, "", *_COLUMNS)
    printed.caption = (
        f"peer: torch-tract; error: aim {OPERATOR_ERROR}, and no larger than the peer's"
    )
    for row in rows:
        aims = row.stem.aims
        floor = MISSING
        if row.floor is not None:
            floor = f"{row.floor:.2g}\n(× {row.over_floor:.1f})"
        plain = row.layer["plain"]
        printed.add_row(
            row.stem.name.replace(", ", ",\n"),
            f"{plain:.1f}" if plain > 1 else f"{plain:.3f}",
            against(row.gram_speedup, aims.gram if aims else None),
            against(row.ours_over_plain, aims.layer if aims else None),
            against(row.peer_over_plain),
            against(row.memory_ratio, aims.memory if aims else None),
            error_cell(errors[row.stem.name], OPERATOR_ERROR if aims else None),
            floor,
        )
    console.print(printed)
