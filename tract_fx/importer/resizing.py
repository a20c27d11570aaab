"""Resizing between known sizes, as a matrix along each axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _half_pixel(i: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return (i + np.float32(0.5)) / scale - np.float32(0.5)


def _align_corners(i: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return i * np.float32(size - 1) / np.float32(out - 1) if out > 1 else np.zeros_like(i)


COORDINATES: dict[str, Callable[[np.ndarray, int, int, np.float32], np.ndarray]] = {
    "asymmetric": lambda i, size, out, scale: i / scale,
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": lambda i, size, out, scale: (
        _half_pixel(i, size, out, scale) if out > 1 else np.zeros_like(i)
    ),
    "align_corners": _align_corners,
}
ROUNDING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
}


def resize_matrix(
    size: int,
    out: int,
    scale: float,
    mode: str,
    transform: str,
    nearest: str = "round_prefer_floor",
    cubic: float = -0.75,
) -> np.ndarray:
    """Give the weights of one axis, as ONNX's Resize defines them.

    Positions are float32, as runtimes compute them: which entry is nearest may hang on it.

    Args:
        size: Entries of the input.
        out: Entries of the result.
        scale: The scale of this axis.
        mode: `"nearest"`, `"linear"` or `"cubic"`.
        transform: The coordinate transformation, one of `COORDINATES`.
        nearest: How a position is rounded.
        cubic: The cubic's coefficient.

    Returns:
        The weights, (size, out): entry j of the result is Σᵢ x[i] · matrix[i, j].
    """
    places = np.arange(out, dtype=np.float32)
    x = COORDINATES[transform](places, size, out, np.float32(scale)).astype(np.float32)
    matrix = np.zeros((size, out))
    columns = np.arange(out)
    if mode == "nearest":
        matrix[ROUNDING[nearest](x).astype(np.int64).clip(0, size - 1), columns] = 1
        return matrix
    if mode == "linear":
        x = x.clip(0, size - 1)
    low = np.floor(x).astype(np.int64)
    t = (x - low).astype(np.float64)
    for offset, weight in _taps(mode, t, cubic):
        np.add.at(matrix, ((low + offset).clip(0, size - 1), columns), weight)
    return matrix


def _taps(mode: str, t: np.ndarray, a: float) -> list[tuple[int, np.ndarray]]:
    """Give offsets from the entry below and their weights, at a fraction t above it."""
    if mode == "linear":
        return [(0, 1 - t), (1, t)]
    near = [(a + 2) * s**3 - (a + 3) * s**2 + 1 for s in (t, 1 - t)]
    far = [a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a for s in (1 + t, 2 - t)]
    return [(-1, far[0]), (0, near[0]), (1, near[1]), (2, far[1])]
