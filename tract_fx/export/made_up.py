"""Numbers for inputs that nobody gave an example of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

_KEEPING = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def made_up_numbers(
    dtype: np.dtype, shape: Sequence[int], generator: np.random.Generator, *, pixels: bool = False
) -> tuple[np.ndarray, str]:
    """Make up an input's numbers, and say which they are; whole ones may be pixels as bytes are."""
    if np.issubdtype(dtype, np.floating) or dtype.kind not in "biu":
        return generator.standard_normal(shape).astype(dtype), "noise of variance 1"
    if dtype.kind == "b" or not (pixels or dtype == np.uint8):
        return np.zeros(shape, dtype), "zeros, for the graph does not tell what they stand for"
    least, most = max(0, np.iinfo(dtype).min), min(255, np.iinfo(dtype).max)
    numbers = generator.integers(least, most, shape, endpoint=True)
    return numbers.astype(dtype), f"whole numbers from {least} to {most}"


def are_pixels(value: ir.Value) -> bool:
    """Tell whether an input's whole numbers are cast to float, rather than used as indices."""
    users = [node for node, _ in value.uses() if node.op_type != "Shape"]
    return bool(users) and all(
        node.op_type == "Cast" and _is_float(node)
        if node.op_type not in _KEEPING
        else all(map(are_pixels, node.outputs))
        for node in users
    )


def _is_float(cast: ir.Node) -> bool:
    return ir.DataType(cast.attributes.get_int("to", 0)).is_floating_point()
