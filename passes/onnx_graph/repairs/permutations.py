"""Transpose that leaves its permutation out, on which ONNX Runtime's gradient builder fails."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

__all__ = ["explicit_permutations"]


def explicit_permutations(model: ir.Model) -> int:
    """Write `perm` on each Transpose that reverses the dimensions by leaving it out.

    Args:
        model: The model, edited in place. Shapes are inferred.

    Returns:
        The number of nodes changed.
    """
    changed = 0
    for node in model.graph.all_nodes():
        if not is_standard(node, "Transpose") or "perm" in node.attributes:
            continue
        x = node.inputs[0]
        if x is not None and x.shape is not None:
            node.attributes.add(ir.AttrInt64s("perm", tuple(reversed(range(len(x.shape))))))
            changed += 1
    return changed
