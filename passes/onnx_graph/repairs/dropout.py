"""Dropout that says whether it drops."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

__all__ = ["train_dropout"]


def train_dropout(model: ir.Model) -> int:
    """Put Dropout nodes that leave `training_mode` out in training mode.

    Without that input a Dropout never drops, in a training graph either. PyTorch's exporter leaves
    it out in attention.

    Args:
        model: A forward graph in training mode, edited in place.

    Returns:
        The number of nodes changed.
    """
    changed = 0
    for node in model.graph:
        if not is_standard(node, "Dropout") or (len(node.inputs) > 2 and node.inputs[2]):
            continue
        name = f"{node.name}_training_mode"
        mode = ir.val(name, const_value=ir.tensor(True, name=name))
        model.graph.register_initializer(mode)
        node.resize_inputs(3)
        node.replace_input_with(2, mode)
        changed += 1
    return changed
