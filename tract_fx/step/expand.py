"""Put TrAct into a step's graph where it has markers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import MICROSOFT, OnnxCall, match_call
from tract_fx.passes.onnx_graph.rewrite import insert
from tract_fx.passes.onnx_graph.weight_gradient import WeightGradient
from tract_fx.step.gradient_names import own_output_gradient, read_transposed
from tract_fx.step.names import free_name
from tract_fx.step.schemas import MARKER, MARKER_DOMAIN, WEIGHT_MARKER


def expand_markers(model: ir.Model, float64: bool) -> None:
    """Replace the markers in a step's graph, whose nodes and values have names, in place.

    Names are those of ONNX Runtime's builder: the gradient of a value `v` is `v_grad`. A call's
    node has the call's name.
    """
    own = [node for node in model.graph if node.domain == MARKER_DOMAIN]
    markers = [node for node in own if node.op_type == MARKER]
    for node in markers:
        if len(node.inputs) < 3:
            raise ExportError(
                f"the layer {_call(node)!r}, whose weight's gradient is no product of its own",
                "TrAct with fewer rows than columns takes the output's gradient, which can't be "
                "told",
                "Train it in PyTorch, where a gradient penalty's share is told apart",
            )
    weights = {_call(node): node for node in own if node.op_type == WEIGHT_MARKER}
    found = [(m, _forward(weights.pop(_call(m), None), _call(m))) for m in markers]
    for marker, call in found:
        _expand(model.graph, marker, call, float64)
    for name, weight in weights.items():  # that gets no gradient
        _name_call(model.graph, _forward(weight, name), name)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    if markers:
        model.opset_imports.setdefault(MICROSOFT, 1)
        model.graph.sort()


def _call(node: ir.Node) -> str:
    return node.attributes["call"].as_string()


def _name_call(graph: ir.Graph, call: OnnxCall, name: str) -> None:
    """Give a call's node the call's name, and whoever has it another."""
    names = {node.name: node for node in graph}
    if name in names:
        names[name].name = free_name(name, {*names})
    call.node.name = name


def _forward(weight: ir.Node | None, name: str) -> OnnxCall:
    """The call that reads a marked weight, which its mark is taken off."""
    readers = [] if weight is None else _readers(weight)
    if weight is None or not readers:
        raise ExportError(
            f"the layer {name!r}, whose weight no product reads as it is",
            "TrAct's call can't be told in the graph",
            "Report the model; meanwhile train it in PyTorch",
        )
    weight.outputs[0].replace_all_uses_with(weight.inputs[0])  # type: ignore[arg-type]
    _graph_of(weight).remove(weight, safe=True)
    call = match_call(readers[0])
    assert call is not None
    return call


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _readers(weight: ir.Node) -> list[ir.Node]:
    """The products that read a weight, in order: the call, and derivatives of it.

    One that reads it transposed becomes a Gemm that does so itself.
    """
    value = weight.outputs[0]
    read_transposed(value)
    products = {n for n in value.consumers() if match_call(n) and n.inputs[1] is value}
    return [node for node in _graph_of(weight) if node in products]


def _expand(graph: ir.Graph, marker: ir.Node, call: OnnxCall, float64: bool) -> None:
    gradient, _, dz = marker.inputs
    assert gradient is not None and dz is not None
    marker.outputs[0].replace_all_uses_with(gradient, replace_graph_outputs=True)
    wanted, name = marker.outputs[0].name, _call(marker)
    graph.remove(marker, safe=True)
    taken = {v.name for node in graph for v in node.outputs} | {v.name for v in graph.outputs}
    _name_call(graph, call, name)
    if gradient.is_graph_output():
        gradient.name = wanted
    else:
        gradient.name = free_name(f"{call.weight.name}_grad", taken)
    if f"{call.output.name}_grad" in taken:
        call.output.name = free_name(f"{name}/output", taken)
    lambda_ = np.asarray(marker.attributes["lambda_"].as_float(), np.float32)
    own = own_output_gradient(graph, gradient, dz, f"{call.output.name}_grad")
    insert(graph, name, WeightGradient(call, gradient, own), lambda_, float64)
