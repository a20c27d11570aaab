"""Pad with values of the input, whose gradient ONNX Runtime can't build."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.node_names import described, described_shape
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, constant_array, known_rank

__all__ = ["paddings_as_gathers"]


def paddings_as_gathers(model: ir.Model) -> int:
    """Write Pad in reflect, edge and wrap mode as a Gather along each padded axis.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.

    Raises:
        ExportError: If the padding, or the size of a padded axis, is not known before running.
    """  # noqa: DOC502 - raised by _indices
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "Pad"):
            continue
        mode = node.attributes.get_string("mode", "constant")
        if mode == "constant":
            continue
        new = Replacement(node)
        result = node.inputs[0]
        assert result is not None
        x = result
        for axis, index in _indices(node, x, mode):
            result = new.op("Gather", result, new.int64(index.tolist()), like=x, axis=axis)
        if result is x:
            result = new.op("Identity", x, like=x)
        new.finish(result)
        changed += 1
    return changed


def _indices(node: ir.Node, x: ir.Value, mode: str) -> list[tuple[int, np.ndarray]]:
    """Give, for each padded axis, which entry of the input each entry of the result is.

    Args:
        node: The Pad.
        x: Its input.
        mode: The mode, which numpy has under the same name.

    Returns:
        Axes and indices.

    Raises:
        ExportError: If they aren't known before running.
    """
    rank = known_rank(x, node)
    pads = constant_array(node.inputs[1])
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = np.arange(rank) if given is None else constant_array(given)
    if pads is None or axes is None:
        raise ExportError(
            f"{described(node)} in mode {mode!r} has computed padding",
            "ONNX Runtime Training 1.19.2 has no gradient for it, and as a Gather it needs the "
            "numbers",
            "Export the model with fixed sizes; the batch may stay dynamic",
        )
    result = []
    for axis, before, after in zip(
        (int(axis) % rank for axis in axes), pads[: len(axes)], pads[len(axes) :], strict=True
    ):
        if not before and not after:
            continue
        size = x.shape[axis] if x.shape is not None else None
        if not isinstance(size, int):
            raise ExportError(
                f"{described(node)} in mode {mode!r} pads axis {axis} of {x.name!r}, of shape "
                f"{described_shape(x.shape)}",
                "ONNX Runtime Training 1.19.2 has no gradient for it, and as a Gather it needs the "
                "size of that axis",
                "Export the model with this size fixed; the batch may stay dynamic",
            )
        positions = np.arange(size)
        added = (max(int(before), 0), max(int(after), 0))
        index = np.pad(positions, added, mode=mode)  # type: ignore[call-overload]  # one of its Literals
        index = index[max(-int(before), 0) : len(index) - max(-int(after), 0)]
        result.append((axis, index))
    return result
