"""Why an ONNX operator on the input can't be treated, and what to do instead."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.layers import module_of
from tract_fx.passes.records import Refusal

__all__ = [
    "BATCHED",
    "BIASED_FILTER",
    "INPUT_IS_WEIGHT",
    "QUANTISED",
    "UNKNOWN_RANK",
    "VECTOR",
    "WEIGHT_FROM_INPUT",
    "WEIGHT_ON_THE_LEFT",
    "Why",
    "is_quantised_layer",
    "makes_quantised",
    "operation_name",
    "refuse_operation",
]


@dataclass(frozen=True)
class Why:
    """Reason, way out, and whether the operation competes with an input layer."""

    reason: str
    remedy: str
    competes: bool = True


_NAME_A_LAYER = "Name the layer to treat with layers=[…]"

BIASED_FILTER = Why(
    "its weight is a constant, and its bias is trained before a linear layer reads the input",
    "Leave the bias out of the trainable parameters, or name the layer behind it with layers=[…]",
)
INPUT_IS_WEIGHT = Why("the input is its weight or bias", _NAME_A_LAYER)
WEIGHT_FROM_INPUT = Why(
    "its weight is computed from the input, not from parameters alone", _NAME_A_LAYER
)
WEIGHT_ON_THE_LEFT = Why(
    "its weight stands on the left, so that the columns of the input are the rows",
    "Write it as MatMul(x, weight) with both operands transposed, or name another layer with "
    "layers=[…]",
)
VECTOR = Why(
    "its weight is a vector, not a matrix",
    "Give the weight an axis for its one output, (n, 1), or name another layer with layers=[…]",
)
BATCHED = Why(
    "its weight has more than two axes: a matrix of its own for each entry of the batch axes",
    "Write it as one MatMul with a matrix, or name another layer with layers=[…]",
)
UNKNOWN_RANK = Why(
    "the graph does not tell the number of axes of its weight",
    "Run onnx.shape_inference.infer_shapes on the model first, or name another layer with "
    "layers=[…]",
)
QUANTISED = Why(
    "its weight is quantised, and a gradient needs real numbers",
    "Give the model as it was before quantisation, or name another layer with layers=[…]",
)

_TRANSPOSED = Why(
    "a transposed convolution spreads its input over the output, so that its weight gradient has "
    "no rows of patches",
    _NAME_A_LAYER,
)
_LOOKUP = Why(
    "it looks rows of a table up and multiplies the input with nothing",
    "TrAct has nothing to do here; if another layer should be treated, name it with layers=[…]",
    competes=False,
)
_AFFINE = Why(
    "it scales or shifts the input by trained parameters before any linear layer reads it",
    "Leave them out of the trainable parameters, or name the layer behind it with layers=[…]",
)
_RECURRENT = Why(
    "a recurrent layer reads the input at every step together with its own state",
    "Put a linear layer in front of it, or name another layer with layers=[…]",
)
_ATTENTION = Why(
    "it holds several projections of the input in one operation",
    "Put a linear layer (an embedding of the input) in front of it, or name another layer with "
    "layers=[…]",
)
_PRODUCT = Why(
    "it multiplies the input with a parameter, where rows and columns can't be told for sure",
    "Write it as MatMul(x, weight), or name another layer with layers=[…]",
)
_ARITHMETIC = Why(
    "it combines the input with a trained parameter before any linear layer reads it",
    "Leave that out of the trainable parameters, or name the layer behind it with layers=[…]",
)
_CONTROL_FLOW = Why(
    "it runs graphs of its own that read the input and trained parameters",
    "Export the model so that no control flow is in front of the input layer, or name a layer "
    "with layers=[…]",
)
_FUSED = Why(
    "it is an operator of ONNX Runtime's own, as its graph optimisations make them",
    "Give the model as it was exported, before those optimisations, or name another layer with "
    "layers=[…]",
)
_UNKNOWN = Why("it has parameters and is neither a linear layer nor a convolution", _NAME_A_LAYER)

_BY_OPERATOR: dict[str, Why] = {
    "ConvTranspose": _TRANSPOSED,
    "DeformConv": _UNKNOWN,
    **dict.fromkeys(("Gather", "GatherND", "GatherElements"), _LOOKUP),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
    **dict.fromkeys(
        ("Attention", "MultiHeadAttention", "PackedAttention", "QAttention"), _ATTENTION
    ),
    **dict.fromkeys(("MatMul", "Einsum"), _PRODUCT),
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), _CONTROL_FLOW),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "Sum", "Mean", "Max", "Min", "Mod", "Concat", "Where"),
        _ARITHMETIC,
    ),
}
_QUANTISED_LAYERS = {
    *("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
    *("QGemm", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits", "MatMulBnb4"),
    *("QAttention", "MatMulFpQ4", "QOrderedMatMul", "QOrderedAttention"),
}


def operation_name(node: ir.Node) -> str:
    """Name an operator as its user would.

    Args:
        node: The node.

    Returns:
        Its type, with the domain where that is not ONNX's own.
    """
    return node.op_type if is_standard(node, node.op_type) else f"{node.domain}::{node.op_type}"


def makes_quantised(node: ir.Node) -> bool:
    """Tell operators between integers and the real numbers that they stand for.

    Args:
        node: Any node.

    Returns:
        True for those.
    """
    return node.op_type in {"DequantizeLinear", "QuantizeLinear", "FakeQuant"}


def is_quantised_layer(node: ir.Node) -> bool:
    """Tell operators that multiply with a matrix of integers.

    Args:
        node: Any node.

    Returns:
        True for those.
    """
    return node.op_type in _QUANTISED_LAYERS


def refuse_operation(
    node: ir.Node, name: str, path: tuple[str, ...], why: Why | None = None
) -> Refusal:
    """Make the refusal of an operation that meets the input.

    Args:
        node: The operation.
        name: Its name.
        path: Names from the graph input to it.
        why: The reason, where the caller knows it; else it is told from the operator.

    Returns:
        The refusal, with a way out.
    """
    kind = why or _kind(node)
    module = module_of(node)
    return Refusal(
        name,
        operation_name(node),
        path,
        kind.reason,
        kind.remedy,
        kind.competes,
        module=None if module is None else module[0],
    )


def _kind(node: ir.Node) -> Why:
    if node.op_type in _BY_OPERATOR:
        return _BY_OPERATOR[node.op_type]
    if "Norm" in node.op_type or node.op_type == "PRelu":
        return _AFFINE
    return _FUSED if node.domain.startswith(("com.microsoft", "com.ms.")) else _UNKNOWN
