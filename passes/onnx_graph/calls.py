"""What one call of a layer is in an ONNX graph, and which nodes are such calls."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["MICROSOFT", "RANDOM", "Layout", "OnnxCall", "is_standard", "match_call", "opset_of"]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

RANDOM = (
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial"),
)
"""ONNX's random number generators. Dropout is none: it can be told not to draw."""


class Layout(enum.Enum):
    """How a call reads its weight operand."""

    CONVOLUTION = "(out, C/groups, *kernel)"
    OUT_IN = "(out, n)"
    IN_OUT = "(n, out)"


@dataclass(frozen=True)
class OnnxCall:
    """A Conv, Gemm or MatMul that multiplies an input with a weight.

    Attributes:
        node: The node.
        input: What the layer reads: (N, C, *spatial) for a convolution, (*, n) for a linear layer.
        weight: The weight as the node reads it, in the layout below.
        layout: The weight operand's layout.
        input_transposed: The input is (n, R): a Gemm with `transA`.
    """

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    layout: Layout
    input_transposed: bool = False

    @property
    def output(self) -> ir.Value:
        """The pre-activations, before any bias that is a node of its own."""
        return self.node.outputs[0]


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Tell whether a node is one of these operators of ONNX's own domain.

    Args:
        node: The node.
        op_types: Names of operators.

    Returns:
        Whether it is.
    """
    return node.domain in {"", "ai.onnx"} and node.op_type in op_types


def opset_of(model: ir.Model) -> int:
    """Tell a model's version of ONNX's own operators, 0 where it has none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def match_call(node: ir.Node) -> OnnxCall | None:
    """Read a node as a call of a layer, with its second operand as the weight.

    Whether that operand is a parameter, and the first the model's input, is not looked at.

    Args:
        node: The node.

    Returns:
        The call, None for other operators.
    """
    if not is_standard(node, "Conv", "Gemm", "MatMul"):
        return None
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None:
        return None
    if node.op_type == "Conv":
        return OnnxCall(node, x, weight, Layout.CONVOLUTION)
    if node.op_type == "MatMul":
        return OnnxCall(node, x, weight, Layout.IN_OUT)
    layout = Layout.OUT_IN if node.attributes.get_int("transB", 0) else Layout.IN_OUT
    return OnnxCall(node, x, weight, layout, bool(node.attributes.get_int("transA", 0)))
