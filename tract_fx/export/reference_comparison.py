"""Compare what a session gives with what a forward graph is in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from tract_fx.errors import ExportError
from tract_fx.export.reference_model import ReferenceModel
from tract_fx.reference.distance import distance, norm

Tensors: TypeAlias = Mapping[str, np.ndarray[Any, Any]]

BOUND = 1e-5
"""Largest relative error, beyond what float32 rounds; float32 stays below 2e-6 on smooth nets."""

REPORT = "the graph does not compute what the model does, as onnx.reference computes it in float64"
REMEDY = "Report the model; verify=False exports all the same"

ROUNDING_UNITS = 8.0
MOST_ROUNDING = 1e-3
"""A badly conditioned model magnifies the rounding of its inputs and parameters. A result may be
off by a few times what that moves it by, in float64, but by no more than this."""

_ROUNDING = 2.0**-24


def compare_values(
    reference: ReferenceModel,
    feeds: Tensors,
    found: Tensors,
    mode: str,
) -> None:
    """Compare what a session gave with what a model's forward graph is."""
    expected = reference.run(feeds)
    differing = {n: v for n, v in expected.items() if n in found and not _same(found[n], v)}
    if not differing:
        return
    moved = [reference.run(_rounded(feeds, seed)) for seed in range(2)]
    for name, value in differing.items():
        spread = max(distance(other[name], value, "all") for other in moved)
        size = norm(value)
        slack = min(ROUNDING_UNITS * spread, MOST_ROUNDING * size)
        if not _same(found[name], value, slack):
            raise ExportError(
                f"{name!r} in {mode} mode, off by {distance(found[name], value, 'all'):.2e} of "
                f"{size:.2e} on the example batch",
                REPORT,
                REMEDY,
            )


def _same(found: np.ndarray, expected: np.ndarray, slack: float = 0.0) -> bool:
    """Whether two arrays are equal to rounding; where both are not finite they are equal, too."""
    if expected.dtype.kind != "f":
        return np.array_equal(found, expected)
    return distance(found, expected, "all") <= BOUND * norm(expected) + slack + 1e-30


def _rounded(values: Tensors, seed: int) -> dict[str, np.ndarray]:
    """Move floating numbers by what float32 rounds them by, in float64; integers stay."""
    generator = np.random.default_rng(seed)
    return {
        name: value.astype(np.float64) * (1 + _ROUNDING * generator.standard_normal(value.shape))
        if value.dtype.kind == "f"
        else value
        for name, value in values.items()
    }
