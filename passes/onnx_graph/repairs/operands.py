"""Operands: read twice by one node, where ONNX Runtime counts one reading, or not read at all."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Additions
from tract_fx.passes.onnx_graph.values import FLOATING

__all__ = ["separate_operands", "unread_operands"]


def separate_operands(model: ir.Model) -> int:
    """Let no node read a parameter twice: it reads the parameter's copy.

    The builder counts the nodes that read a parameter, not their readings, so that w · w gives two
    gradients of one name ("Duplicate definition of name"). For values that nodes compute it counts
    readings, so that all of them may be of one copy; a copy of some would be merged again.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes that read a copy.
    """
    changed = 0
    for node in list(model.graph):
        for value in {value for value in node.inputs if value is not None}:
            if list(node.inputs).count(value) < 2 or value.producer() is not None:
                continue
            if value.dtype not in FLOATING:
                continue
            new = Additions(f"{node.name or node.outputs[0].name}/{value.name}")
            copy = new.op("Identity", value, like=value)
            copy.shape = value.shape
            model.graph.insert_before(node, new.nodes)
            for index, operand in enumerate(node.inputs):
                if operand is value:
                    node.replace_input_with(index, copy)
            changed += 1
    return changed


def unread_operands(model: ir.Model) -> int:
    """Leave out the C of each Gemm with beta = 0, which nobody reads.

    The builder has no gradient for such a Gemm, and its C would be taken for a bias to train.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes changed.
    """
    changed = 0
    for node in model.graph.all_nodes():
        if not is_standard(node, "Gemm") or node.attributes.get_float("beta", 1.0) != 0:
            continue
        if len(node.inputs) > 2:
            node.resize_inputs(2)
            changed += 1
    return changed
