"""The marker that carries TrAct through an export: which call, and with which λ.

A rewritten PyTorch model is exported with its `tract_fx::precondition_grad` as a node
`tract_fx::PreconditionGrad(weight, input)` before the call. ONNX Runtime knows no such operator:
the markers are read and taken out before the gradient builder, and the transform goes in after it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard, match_call

__all__ = ["LAMBDA", "MARKER", "MARKER_DOMAIN", "shortest", "take_markers"]

MARKER_DOMAIN = "tract_fx"
MARKER = "PreconditionGrad"
LAMBDA = "lambda_"


def take_markers(model: ir.Model) -> dict[str, float]:
    """Take the markers out of a forward graph, in place.

    Args:
        model: A forward graph whose nodes have names of their own.

    Returns:
        λ by the name of each call that had a marker on its weight.

    Raises:
        ExportError: A marked weight is not multiplied with the layer's input by Conv, Gemm or
            MatMul, and by that alone.
    """
    lambdas: dict[str, float] = {}
    for node in list(model.graph):
        if node.domain != MARKER_DOMAIN or node.op_type != MARKER:
            continue
        weight, calls = node.inputs[0], _calls(node.outputs[0])
        assert weight is not None
        if not calls:
            raise ExportError(
                f"the weight {weight.name!r}, which TrAct is on",
                "the exported graph does not multiply the input with it by Conv, Gemm or MatMul",
                "Report the model; meanwhile train it in PyTorch",
            )
        for call in calls:
            lambdas[str(call.name)] = shortest(node.attributes[LAMBDA].as_float())
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    return lambdas


def _calls(weight: ir.Value) -> list[ir.Node]:
    """The calls that a weight goes to, through a Transpose where there is one."""
    found: list[ir.Node] = []
    for node, index in weight.uses():
        if is_standard(node, "Shape"):
            continue
        if is_standard(node, "Transpose", "Identity"):
            found += _calls(node.outputs[0])
        elif match_call(node) is not None and index == 1:
            found.append(node)
        else:
            return []
    return found


def shortest(value: float | np.ndarray) -> float:
    """Read a float32 as the shortest number that stands for it: 0.1, not 0.10000000149.

    Args:
        value: A float32's value.

    Returns:
        The number that a user would have written.
    """
    return float(str(np.float32(value)))
