"""Operands that their node does not read."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard


def unread_operands(model: ir.Model) -> int:
    """Leave out the C of each Gemm with beta = 0, which nobody reads.

    It would be taken for a bias to train.
    """
    changed = 0
    for node in model.graph.all_nodes():
        if not is_standard(node, "Gemm") or node.attributes.get_float("beta", 1.0) != 0:
            continue
        if len(node.inputs) > 2:
            node.resize_inputs(2)
            changed += 1
    return changed
