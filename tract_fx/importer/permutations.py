"""Transposes: a permutation left out, and one that changes nothing."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard


def identity_permutations(model: ir.Model) -> int:
    """Write each Transpose that leaves all dimensions where they are as an Identity.

    ONNX Runtime 1.19.2 takes every Transpose beside a Gemm for a real one, and merges it; beside a
    MatMul that an Add follows as well, since it makes a Gemm of these two.
    """
    changed = 0
    for node in list(model.graph.all_nodes()):
        if not is_standard(node, "Transpose"):
            continue
        x, order = node.inputs[0], node.attributes.get_ints("perm")
        if order is None:
            unchanged = x is not None and x.shape is not None and len(x.shape) < 2
        else:
            unchanged = list(order) == list(range(len(order)))
        if unchanged:
            node.op_type = "Identity"
            node.attributes.clear()
            changed += 1
    return changed
