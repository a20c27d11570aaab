"""How time and memory of the Gram grow with the batch and the pixels, torch-tract beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from layer_figures import gram_arms
from memory import peak_bytes
from precision import FLOAT32
from stems import CIFAR, IMAGENET, Stem
from timing import interleaved
from tract_fx.preconditioner import PatchGeometry

# torch-tract holds the patches twice. Beyond this it is left out.
_PEER_BYTES = 4e9
_COPIES, _NUMBER = 2, 4

_REPEATS = 3
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Series:
    """A layer on inputs of growing size.

    Attributes:
        title: What grows, for the plot.
        label: The axis.
        stem: The layer.
        sizes: Where along the axis.
        shapes: The input's, for each.
        figures: By arm: sizes, milliseconds and peak bytes.
    """

    title: str
    label: str
    stem: Stem
    sizes: list[int]
    shapes: list[tuple[int, int, int, int]]
    figures: dict[str, list[tuple[int, float, int]]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "title": self.title,
            "axis": self.label,
            "layer": self.stem.kind,
            "figures": {
                arm: [
                    {"size": size, "milliseconds": ms, "peak_bytes": peak}
                    for size, ms, peak in points
                ]
                for arm, points in self.figures.items()
            },
        }


def all_series(quick: bool) -> list[Series]:
    """The series: batches of small and of large images, and sides of images."""
    batches = [4**i for i in range(3 if quick else 6)]
    sides = [2**i for i in range(5, 8 if quick else 10)]
    made = []
    for stem in (CIFAR, IMAGENET):
        shape = stem.shape[1:]
        title = f"{stem.kind}, images of {shape[0]}x{shape[1]}²"
        shapes = [(batch, shape[0], shape[1], shape[2]) for batch in batches]
        made.append(Series(title, "batch", stem, batches, shapes))
    pixels = [side * side for side in sides]
    shapes = [(8, 3, side, side) for side in sides]
    made.append(
        Series(f"{IMAGENET.kind}, 8 images", "pixels of an image", IMAGENET, pixels, shapes)
    )
    return made


def measure_growth(quick: bool, console: Console) -> list[Series]:
    """Measure all series.

    Args:
        quick: Whether the large inputs are left out.
        console: For the progress.

    Returns:
        The series with their figures.
    """
    return [
        measured(series, track(range(len(series.sizes)), series.title, console=console))
        for series in all_series(quick)
    ]


def measured(series: Series, order: Sequence[int] | Any) -> Series:
    """Measure one series: the largest input is made once, the others are parts of it."""
    torch.manual_seed(0)
    layer = series.stem.build()
    largest = torch.randn(max(series.shapes, key=math.prod))
    figures: dict[str, list[tuple[int, float, int]]] = {}
    for index in order:
        size, shape = series.sizes[index], series.shapes[index]
        x = largest.flatten()[: math.prod(shape)].reshape(shape)
        calls = {
            name: (lambda gram=gram, x=x: gram(x))
            for name, gram in gram_arms(layer, FLOAT32).items()
        }
        if _peer_bytes(x, PatchGeometry.of_module(layer)) > _PEER_BYTES:
            del calls["torch-tract"]
        peaks = {name: peak_bytes(call, _CPU) for name, call in calls.items()}  # warms up, too
        for name, ms in interleaved(calls, _REPEATS, warm_ups=0).items():
            figures.setdefault(name, []).append((size, ms, peaks[name]))
    return replace(series, figures=figures)


def _peer_bytes(x: Tensor, geometry: PatchGeometry) -> int:
    return _COPIES * _NUMBER * geometry.rows(x) * geometry.columns(x)
