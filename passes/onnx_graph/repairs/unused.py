"""Nodes and initializers that nothing reads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["unused_nodes"]


def unused_nodes(model: ir.Model) -> int:
    """Remove the nodes whose results nothing reads, and then such initializers.

    Optional outputs that nothing reads are dropped as well, so `optional_outputs` comes after.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes and initializers removed.
    """

    def size() -> int:
        return len(model.graph) + len(model.graph.initializers)

    before = size()
    RemoveUnusedNodesPass()(model)
    return before - size()
