"""Products with vectors, whose gradient ONNX Runtime shapes wrongly."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, known_rank

__all__ = ["vectors_as_matrices"]


def vectors_as_matrices(model: ir.Model) -> int:
    """Write MatMul with a vector as MatMul with a matrix of one row or column.

    ONNX Runtime's gradient for the vector is wrong, without a word.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "MatMul"):
            continue
        left, right = node.inputs[0], node.inputs[1]
        if left is None or right is None or left.shape is None or right.shape is None:
            continue
        row, column = known_rank(left, node) == 1, known_rank(right, node) == 1
        if not row and not column:
            continue
        new = Replacement(node)
        a = new.op("Unsqueeze", left, new.int64([0]), like=left) if row else left
        b = new.op("Unsqueeze", right, new.int64([1]), like=right) if column else right
        product = new.op("MatMul", a, b, like=left)
        axes = [-2] * row + [-1] * column
        new.finish(new.op("Squeeze", product, new.int64(axes), like=left))
        changed += 1
    return changed
