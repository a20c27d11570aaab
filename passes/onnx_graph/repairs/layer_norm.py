"""LayerNormalization without a bias, whose gradient ONNX Runtime can't build."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Additions, known_dtype

__all__ = ["layer_norm_biases"]


def layer_norm_biases(model: ir.Model) -> int:
    """Give each LayerNormalization that has no bias one of zeros.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes changed.

    Raises:
        ExportError: If the dtype of a scale is not known.
    """  # noqa: DOC502 - raised by known_dtype
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "LayerNormalization"):
            continue
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            continue
        scale = node.inputs[1]
        assert scale is not None
        new = Additions(f"{node.name or node.outputs[0].name}/bias")
        zero = ir.tensor(np.zeros(1, known_dtype(scale, node).numpy()))
        bias = new.op("ConstantOfShape", new.op("Shape", scale), like=scale, value=zero)
        bias.shape = scale.shape
        model.graph.insert_before(node, new.nodes)
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        changed += 1
    return changed
