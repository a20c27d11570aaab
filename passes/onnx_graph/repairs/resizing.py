"""Resize, whose gradient ONNX Runtime has for CUDA and few modes alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import (
    Replacement,
    constant_array,
    known_dtype,
)

__all__ = ["resizes_as_products"]

PLAIN = {"antialias": 0, "exclude_outside": 0}


def resizes_as_products(model: ir.Model) -> int:
    """Write Resize between known sizes as a Gather or a matrix product along each axis.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced. Those with sizes that are found when run, with antialiasing,
        cropping or excluded borders stay.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "Resize"):
            continue
        plan = _plan(node)
        if plan is None:
            continue
        new = Replacement(node)
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        rank, result = len(x.shape), x
        for axis, matrix in plan:
            if _mode(node) == "nearest":
                index = new.int64(matrix.argmax(0).tolist())
                result = new.op("Gather", result, index, like=x, axis=axis)
                continue
            weights = new.constant(matrix.astype(known_dtype(x, node).numpy()))
            # MatMul works on the last axis; swapping it there and back costs nothing if it is it.
            perm = [*range(rank)]
            perm[axis], perm[-1] = perm[-1], perm[axis]
            moved = axis != rank - 1
            result = new.op("Transpose", result, like=x, perm=perm) if moved else result
            result = new.op("MatMul", result, weights, like=x)
            result = new.op("Transpose", result, like=x, perm=perm) if moved else result
        new.finish(result if result is not x else new.op("Identity", x, like=x))
        changed += 1
    return changed


def _mode(node: ir.Node) -> str:
    return node.attributes.get_string("mode", "nearest") or "nearest"


def _plan(node: ir.Node) -> list[tuple[int, np.ndarray]] | None:
    """Give the axes that change and their matrices (in, out); None for what stays a Resize."""
    x, result = node.inputs[0], node.outputs[0]
    attributes = node.attributes
    transform = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if (
        x is None
        or x.shape is None
        or "axes" in attributes
        or transform not in COORDINATES
        or any(attributes.get_int(name, 0) != value for name, value in PLAIN.items())
        or attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        return None
    rank = len(x.shape)
    scales = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    outputs = None if result.shape is None else tuple(result.shape)
    plan = []
    for axis, size in enumerate(x.shape):
        if scales is not None and scales.size == rank:
            scale = float(scales[axis])
            out = int(np.floor(size * scale)) if isinstance(size, int) else None
            if scale == 1:
                continue
        elif outputs is not None:
            if outputs[axis] == size and size is not None:
                continue
            last = outputs[axis]
            out = last if isinstance(last, int) else None
            scale = out / size if isinstance(size, int) and out is not None else 0.0
        else:
            return None
        if not isinstance(size, int) or out is None:
            return None
        plan.append((axis, _matrix(node, transform or "", size, out, scale)))
    return plan


def _asymmetric(i: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return i / scale


def _half_pixel(i: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return (i + np.float32(0.5)) / scale - np.float32(0.5)


def _pytorch_half_pixel(i: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return _half_pixel(i, size, out, scale) if out > 1 else np.zeros_like(i)


def _align_corners(i: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return i * np.float32(size - 1) / np.float32(out - 1) if out > 1 else np.zeros_like(i)


COORDINATES = {
    "asymmetric": _asymmetric,
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": _pytorch_half_pixel,
    "align_corners": _align_corners,
}
ROUNDING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
}


def _matrix(node: ir.Node, transform: str, size: int, out: int, scale: float) -> np.ndarray:
    """Give the weights of one axis: entry j of the result is Σᵢ x[i] · matrix[i, j].

    Positions are float32, as the runtime computes them: which entry is nearest may hang on it.

    Args:
        node: The Resize.
        transform: Its coordinate transformation.
        size: Entries of the input.
        out: Entries of the result.
        scale: The scale of this axis.

    Returns:
        The weights, shape (size, out).
    """
    places = np.arange(out, dtype=np.float32)
    x = COORDINATES[transform](places, size, out, np.float32(scale)).astype(np.float32)
    matrix = np.zeros((size, out))
    columns = np.arange(out)
    if _mode(node) == "nearest":
        rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
        nearest = ROUNDING[rounding or "floor"](x).astype(np.int64).clip(0, size - 1)
        matrix[nearest, columns] = 1
        return matrix
    if _mode(node) == "linear":
        x = x.clip(0, size - 1)
    low = np.floor(x).astype(np.int64)
    t = (x - low).astype(np.float64)
    for offset, weight in _taps(node, t):
        np.add.at(matrix, ((low + offset).clip(0, size - 1), columns), weight)
    return matrix


def _taps(node: ir.Node, t: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Give offsets from the entry below and their weights, at a fraction t above it."""
    if _mode(node) == "linear":
        return [(0, 1 - t), (1, t)]
    a = node.attributes.get_float("cubic_coeff_a", -0.75)
    near = [(a + 2) * s**3 - (a + 3) * s**2 + 1 for s in (t, 1 - t)]
    far = [a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a for s in (1 + t, 2 - t)]
    return [(-1, far[0]), (0, near[0]), (1, near[1]), (2, far[1])]
