"""Find the gradient that one call of a layer contributes to its weight, in a training graph.

ONNX Runtime's gradient builder names the gradient of a value `v` as `v_grad`; where several terms
add up to it, the terms are `v_grad_0`, `v_grad_1`, … and a Sum makes `v_grad`. A tensor of that
name is therefore a call's own term only in the simple case. The term is found by what computes it:

- Conv: `ConvGrad(dy, x, w)`, second output;
- Gemm and MatMul: the product of x and dy, each through a Reshape to a matrix where x has another
  rank than two, and through a Transpose; times the call's own alpha, and nothing added to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.errors import UnsupportedLayerError
from tract_fx.passes.onnx_graph.calls import MICROSOFT, Layout, OnnxCall, is_standard
from tract_fx.passes.onnx_graph.geometry import conv_geometry


@dataclass(frozen=True)
class WeightGradient:
    """What one call contributes to the gradient of its weight.

    Attributes:
        call: The call in the forward part of the graph.
        term: The call's own term of the weight's gradient, in the weight operand's layout.
        output_gradient: Gradient of the call's output, dL/dy, with the output's shape.
    """

    call: OnnxCall
    term: ir.Value
    output_gradient: ir.Value


def find_weight_gradient(graph: ir.Graph, call: OnnxCall) -> WeightGradient | None:
    """Find a call's own term of its weight's gradient."""
    gradients = {value.name: value for node in graph for value in node.outputs if value.name}
    pattern = re.compile(re.escape(f"{call.weight.name}_grad") + r"(_\d+)?")
    if not any(pattern.fullmatch(name) for name in gradients):
        return None
    dy = gradients.get(f"{call.output.name}_grad")
    products = [] if dy is None else _terms(call, dy)
    terms = [_turned(product, call) for product in products]
    others = _terms_of_input(call, pattern) - len(_calls_alike(call))
    if dy is None or len(terms) != 1 or others > 0 or not pattern.fullmatch(terms[0].name or ""):
        raise UnsupportedLayerError(
            f"node {call.node.name!r} ({call.node.op_type}) and {len(terms)} nodes that look like "
            f"its gradient for the weight {call.weight.name!r}",
            "the call's own term of that gradient can't be told apart from other terms",
            "Build the training graph with ONNX Runtime Training 1.19, and give the layer's input "
            "a known rank",
        )
    if call.layout is Layout.CONVOLUTION and _loses_padding(call):
        raise UnsupportedLayerError(
            f"node {call.node.name!r} (Conv) with auto_pad="
            f"{call.node.attributes.get_string('auto_pad')}",
            "ONNX Runtime's ConvGrad takes that for no padding at all, so that the plain gradient "
            "is wrong already",
            "Write the zeros as pads in the forward model, and build the training graph again",
        )
    return WeightGradient(call, terms[0], dy)


def _loses_padding(call: OnnxCall) -> bool:
    """Whether ConvGrad, which does not know auto_pad, reads other patches than Conv."""
    if call.node.attributes.get_string("auto_pad", "NOTSET") in {"NOTSET", "VALID"}:
        return False
    geometry = conv_geometry(call.node, call.input, call.weight)
    return geometry is None or any(any(sides) for sides in geometry.padding)


def _terms(call: OnnxCall, dy: ir.Value) -> list[ir.Value]:
    """Outputs of every node that computes the call's weight gradient from its input and dy."""
    if call.layout is Layout.CONVOLUTION:
        return [
            node.outputs[1]
            for node in dy.consumers()
            if node.domain == MICROSOFT
            and node.op_type == "ConvGrad"
            and list(node.inputs[:3]) == [dy, call.input, call.weight]
        ]
    matrices = _as_matrices(call.input, call)
    return [
        node.outputs[0]
        for matrix in _as_matrices(dy, call)
        for node in dict.fromkeys(matrix.consumers())
        if _is_product(node, call) and any(x in node.inputs[:2] for x in matrices)
    ]


def _terms_of_input(call: OnnxCall, pattern: re.Pattern[str]) -> int:
    """Count what is made of the call's input, and named as a term of its weight's gradient."""
    readers = {node for x in _as_matrices(call.input, call) for node in x.consumers()}
    made = {_turned(value, call) for node in readers for value in node.outputs}
    return sum(pattern.fullmatch(value.name or "") is not None for value in made)


def _calls_alike(call: OnnxCall) -> list[ir.Node]:
    """The calls that multiply the same input with the same weight."""
    readers = call.input.consumers()
    return [node for node in readers if list(node.inputs[:2]) == [call.input, call.weight]]


def _turned(product: ir.Value, call: OnnxCall) -> ir.Value:
    """The product as the weight lies, which may be its transpose."""
    node = product.producer()
    if call.layout is Layout.CONVOLUTION or node is None:
        return product
    is_in_out = node.inputs[0] in _as_matrices(call.input, call)
    if is_in_out == (call.layout is Layout.IN_OUT):
        return product
    return next(iter(_made_by("Transpose", product)), product)


def _is_product(node: ir.Node, call: OnnxCall) -> bool:
    """Tell a product with the call's factor that adds nothing."""
    fused = node.domain == MICROSOFT and node.op_type == "FusedMatMul"
    if not (fused or is_standard(node, "Gemm", "MatMul")) or any(node.inputs[2:]):
        return False
    alphas = [n.attributes.get_float("alpha", 1.0) for n in (node, call.node)]
    return alphas[0] == alphas[1]


def _as_matrices(value: ir.Value, call: OnnxCall) -> list[ir.Value]:
    """The value, where it is a matrix, what a Reshape makes of it, and the transposes of both."""
    ranks = {len(v.shape) for v in (call.input, call.output, value) if v.shape is not None}
    matrices = [value] * (ranks <= {2}) + _made_by("Reshape", value)
    return [*matrices, *(turned for matrix in matrices for turned in _made_by("Transpose", matrix))]


def _made_by(op_type: str, value: ir.Value) -> list[ir.Value]:
    return [node.outputs[0] for node in value.consumers() if is_standard(node, op_type)]
