"""Why an ONNX operator on the input can't be treated, and what to do instead."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.modules import Why
from tract_fx.passes import reasons
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.layers import module_of
from tract_fx.passes.reasons import OR_ANOTHER, OR_BEHIND
from tract_fx.passes.records import Refusal

BIASED_FILTER = Why(
    reasons.BIASED_FILTER, f"Leave the bias out of the trainable parameters{OR_BEHIND}"
)
WEIGHT_ON_THE_LEFT = Why(
    "its weight stands on the left, so that the columns of the input are the rows",
    f"Write it as MatMul(x, weight) with both operands transposed{OR_ANOTHER}",
)
VECTOR = Why(reasons.VECTOR, f"Give the weight an axis for its one output, (n, 1){OR_ANOTHER}")
BATCHED = Why(
    "its weight has more than two axes: a matrix of its own for each entry of the batch axes",
    f"Write it as one MatMul with a matrix{OR_ANOTHER}",
)
UNKNOWN_RANK = Why(
    "the graph does not tell the number of axes of its weight",
    f"Run onnx.shape_inference.infer_shapes on the model first{OR_ANOTHER}",
)
QUANTISED = Why(
    "its weight is quantised, and a gradient needs real numbers",
    f"Give the model as it was before quantisation{OR_ANOTHER}",
)

_AFFINE = Why(reasons.AFFINE, f"Leave them out of the trainable parameters{OR_BEHIND}")
_RECURRENT = Why(reasons.RECURRENT, f"Put a linear layer in front of it{OR_ANOTHER}")
_ATTENTION = Why(
    reasons.ATTENTION, f"Put a linear layer (an embedding of the input) in front of it{OR_ANOTHER}"
)
_PRODUCT = Why(
    "it multiplies the input with a parameter, where rows and columns can't be told for sure",
    f"Write it as MatMul(x, weight){OR_ANOTHER}",
)
_ARITHMETIC = Why(reasons.ARITHMETIC, f"Leave that out of the trainable parameters{OR_BEHIND}")
_CONTROL_FLOW = Why(
    "it runs graphs of its own that read the input and trained parameters",
    "Export the model so that no control flow is in front of the input layer, or name a layer "
    "with layers=[…]",
)
_FUSED = Why(
    "it is an operator of ONNX Runtime's own, as its graph optimisations make them",
    f"Give the model as it was exported, before those optimisations{OR_ANOTHER}",
)

_BY_OPERATOR: dict[str, Why] = {
    "ConvTranspose": reasons.TRANSPOSED,
    "DeformConv": reasons.UNKNOWN,
    **dict.fromkeys(("Gather", "GatherND", "GatherElements"), reasons.LOOKUP),
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
    """Name an operator as its user would."""
    return node.op_type if is_standard(node, node.op_type) else f"{node.domain}::{node.op_type}"


def makes_quantised(node: ir.Node) -> bool:
    """Tell operators between integers and the real numbers that they stand for."""
    return node.op_type in {"DequantizeLinear", "QuantizeLinear", "FakeQuant"}


def is_quantised_layer(node: ir.Node) -> bool:
    """Tell operators that multiply with a matrix of integers."""
    return node.op_type in _QUANTISED_LAYERS


def refuse_operation(
    node: ir.Node, name: str, path: tuple[str, ...], why: Why | None = None
) -> Refusal:
    """Make the refusal of an operation that meets the input."""
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
    return _FUSED if node.domain.startswith(("com.microsoft", "com.ms.")) else reasons.UNKNOWN
