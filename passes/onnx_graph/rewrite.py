"""Rewrite: put TrAct's subgraph into an ONNX training graph, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tract_fx.errors import InvalidLambdaError, UnsupportedLayerError, UnsupportedModelError
from tract_fx.passes.onnx_graph.calls import MICROSOFT, OnnxCall, opset_of
from tract_fx.passes.onnx_graph.provenance import PREFIX, Provenance, made_nodes
from tract_fx.passes.onnx_graph.subgraph import write_tract
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.passes.onnx_graph.weight_gradient import WeightGradient, find_weight_gradient
from tract_fx.passes.onnx_graph.writer import NodeWriter
from tract_fx.preconditioner import LAMBDA_REMEDY

_OLDEST_OPSET = 13  # axes became inputs: ReduceSum, Squeeze, Unsqueeze


def insert_tract(
    model: ir.Model, calls: Mapping[str, OnnxCall], lambdas: Mapping[str, float]
) -> tuple[str, ...]:
    """Put TrAct on calls of a training graph, in place.

    The result takes the name of the plain term, and its place with every consumer: a Sum over
    several uses of the weight, the chain rule to the parameters that it is computed from, the
    accumulation.
    """
    _check_version(model)
    values = {name: _in_float32(lambda_) for name, lambda_ in lambdas.items()}
    found = {name: find_weight_gradient(model.graph, calls[name]) for name in lambdas}
    for name in lambdas:
        _check_weight(calls[name])
    for name, gradient in found.items():
        if gradient is not None:
            insert(model.graph, name, gradient, values[name])
    if any(gradient is not None for gradient in found.values()):
        model.opset_imports.setdefault(MICROSOFT, 1)
        model.graph.sort()
    return tuple(name for name, gradient in found.items() if gradient is None)


def insert(
    graph: ir.Graph,
    name: str,
    gradient: WeightGradient,
    lambda_: np.ndarray,
    float64: bool = True,
) -> None:
    """Put TrAct on the call of that name, in place; λ is a float32 of no dimension.

    With `float64` it goes over to float64 for input that float32 is too coarse for.
    """
    term = gradient.term
    # The builder leaves some types out; a gradient has that of its value.
    term.type = term.type or gradient.call.weight.type
    gradient.output_gradient.type = gradient.output_gradient.type or gradient.call.output.type
    record = Provenance(name, str(term.name), str(gradient.output_gradient.name), stage="solve")
    write = NodeWriter(graph, f"{PREFIX}{name}/", record)
    value = write.constant(lambda_, "lambda")
    users, is_output = list(term.uses()), [i for i, v in enumerate(graph.outputs) if v is term]
    result = write_tract(write, gradient, value, float64)
    for node, index in users:
        node.replace_input_with(index, result)
    for index in is_output:
        graph.outputs[index] = result
    result.name, term.name = term.name, f"{PREFIX}{name}/plain_gradient"
    result.shape, result.type = term.shape, term.type
    producer = term.producer()
    assert producer is not None
    graph.insert_after(producer, list(write.nodes))


def _check_version(model: ir.Model) -> None:
    version = opset_of(model)
    if version < _OLDEST_OPSET:
        raise UnsupportedModelError(
            f"a training graph in opset {version}",
            f"the subgraph is written in the operators of opset {_OLDEST_OPSET}",
            "Convert the forward model with onnx.version_converter, and build the training graph "
            "again",
        )


def _in_float32(lambda_: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = np.asarray(lambda_, np.float32)
    if not np.finfo(np.float32).tiny <= value < np.inf:
        raise InvalidLambdaError(
            f"lambda_={lambda_!r}",
            "in the graph λ is a float32, which that number is outside of",
            LAMBDA_REMEDY,
        )
    return value


def _check_weight(call: OnnxCall) -> None:
    if call.weight.dtype == ir.DataType.DOUBLE:
        raise UnsupportedLayerError(
            f"node {call.node.name!r} with the weight {call.weight.name!r} in float64",
            "the subgraph computes in float32, and ONNX Runtime can't train float64 parameters",
            "Make the model in float32",
        )
    if static_shape(call.weight) is None:
        raise UnsupportedLayerError(
            f"node {call.node.name!r}, weight {call.weight.name!r} of shape {call.weight.shape}",
            "the number of columns has to be known when the subgraph is made",
            "Run onnx.shape_inference on the model, or give the weight a fixed shape",
        )


def remove_from_graph(model: ir.Model) -> None:
    """Take TrAct's nodes and constants out of a training graph, in place."""
    made = made_nodes(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for call, name in dict.fromkeys((record.call, record.term) for record in made.values()):
        term, result = values[f"{PREFIX}{call}/plain_gradient"], values[name]
        result.replace_all_uses_with(term, replace_graph_outputs=True)
        result.name, term.name = None, name
    for node in reversed(made):
        _release_branches(node)
        model.graph.remove(node, safe=True)
    for name in [n for n in model.graph.initializers if n.startswith(PREFIX)]:
        del model.graph.initializers[name]
    for value in [v for v in model.graph.inputs if str(v.name).startswith(PREFIX)]:
        model.graph.inputs.remove(value)  # a step for any runtime has λ there, with a default


def _release_branches(node: ir.Node) -> None:
    """Let a node's branches let go of the values around them, which may then be removed."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                _release_branches(inner)
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
