"""Slices with negative steps, whose gradient ONNX Runtime can't run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, constant_array

__all__ = ["reversals_as_gathers"]


def reversals_as_gathers(model: ir.Model) -> int:
    """Write Slice with negative steps as a Gather along each of its axes.

    torch.onnx.export writes flip so; SliceGrad fails on its bounds when it runs.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced; those of sizes or bounds that aren't known before running
        stay.
    """
    changed = 0
    for node in list(model.graph):
        indices = _indices(node) if is_standard(node, "Slice") else None
        if not indices:
            continue
        new = Replacement(node)
        result = x = node.inputs[0]
        for axis, index in indices:
            result = new.op("Gather", result, new.int64(index.tolist()), like=x, axis=axis)
        assert result is not None
        new.finish(result)
        changed += 1
    return changed


def _indices(node: ir.Node) -> list[tuple[int, np.ndarray]] | None:
    """Give axes and indices, None if no step is negative or something is not known."""
    x, *bounds = node.inputs
    arrays = [constant_array(bound) for bound in bounds]
    if x is None or x.shape is None or len(arrays) < 4:
        return None
    starts, ends, axes, steps = arrays
    if starts is None or ends is None or steps is None or not np.any(steps < 0):
        return None
    if axes is None:
        axes = np.arange(len(starts))
    result = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = int(axis) % len(x.shape)
        size = x.shape[place]
        if not isinstance(size, int):
            return None
        # An end before the first entry is None in Python's slices; −1 would be the last one.
        stop = None if step < 0 and end < -size else int(end)
        result.append((place, np.arange(size)[int(start) : stop : int(step)]))
    return result
