"""Outputs that inference may leave out and a gradient reads."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

__all__ = ["optional_outputs"]

# Operator → its outputs. MaxPool's indices are put on by ONNX Runtime itself.
OUTPUTS = {
    "LayerNormalization": ("", "_mean", "_inv_std"),
    "Dropout": ("", "_mask"),
    "SoftmaxCrossEntropyLoss": ("", "_log_prob"),
}


def optional_outputs(model: ir.Model) -> int:
    """Give LayerNormalization, Dropout and SoftmaxCrossEntropyLoss all their outputs.

    Their gradients read the mean and inverse deviation, the mask, and the log-probabilities.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes changed.
    """
    changed = 0
    for node in model.graph:
        if not is_standard(node, *OUTPUTS):
            continue
        suffixes = OUTPUTS[node.op_type]
        before = [output.name for output in node.outputs]
        node.resize_outputs(len(suffixes))
        for output, suffix in zip(node.outputs, suffixes, strict=True):
            if not output.name:
                output.name = f"{before[0]}{suffix}"
        changed += before != [output.name for output in node.outputs]
    return changed
