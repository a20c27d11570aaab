"""Write a traced step as an ONNX graph, TrAct's subgraph in it."""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tract_fx.importer.metadata import strip_exporter_metadata
from tract_fx.passes.onnx_graph.calls import MICROSOFT
from tract_fx.step import exporter
from tract_fx.step.expand import expand_markers
from tract_fx.step.gradient_names import name_gradients
from tract_fx.step.names import BATCH, free_name
from tract_fx.step.schemas import known_operators
from tract_fx.step.trace import StepTrace


def write_step(trace: StepTrace) -> ir.Model:
    """Translate a step."""
    with known_operators():
        model, results = exporter.translate_graph(trace.graph, trace.dialect.translations)
    graph = model.graph
    for value, name in zip(graph.inputs, trace.inputs, strict=True):
        value.name = name
    for value in results:
        if value in graph.outputs or value.is_graph_input() or value.is_initializer():
            copied = ir.Node("", "Identity", [value])
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
            graph.append(copied)
            value = copied.outputs[0]
        graph.outputs.append(value)
    passes.InlinePass()(model)
    strip_exporter_metadata(model)
    _casts(graph)
    passes.RemoveUnusedNodesPass()(model)
    _keep_padding_out_of_pools(graph)
    _name(graph, trace)
    _name_batch(graph)
    expand_markers(model, trace.dialect.float64)
    name_gradients(graph, trace.gradients)
    graph.sort()
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports.setdefault(MICROSOFT, 1)
    graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.name in trace.batch]
    return model


def _casts(graph: ir.Graph) -> None:
    """Write dtypes that are known where the translation reads them off values."""
    for node in [n for n in graph if n.op_type == "CastLike"]:
        x, like = node.inputs
        if like is not None and like.dtype is not None:
            cast = ir.node("Cast", [x], {"to": ir.AttrInt64("to", int(like.dtype))})
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [cast], node.outputs, cast.outputs
            )


def _keep_padding_out_of_pools(graph: ir.Graph) -> None:
    """Part Pad from MaxPool: ONNX Runtime would pad with what is never a maximum instead."""
    for node in [n for n in graph if n.op_type == "MaxPool"]:
        x = node.inputs[0]
        producer = None if x is None else x.producer()
        if x is not None and producer is not None and producer.op_type == "Pad":
            shape = ir.node("Shape", [x])
            same = ir.node("Reshape", [x, shape.outputs[0]])
            same.outputs[0].shape, same.outputs[0].type = x.shape, x.type
            graph.insert_before(node, [shape, same])
            node.replace_input_with(0, same.outputs[0])


def _name_batch(graph: ir.Graph) -> None:
    """Call the open size "batch"."""
    sizes = [size for value in graph.inputs for size in value.shape or ()]
    symbol = next((str(size.value) for size in sizes if isinstance(size, ir.SymbolicDim)), None)
    if symbol is None:
        return
    open_size = re.compile(rf"\b{re.escape(symbol)}\b")
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        value.shape = value.shape and ir.Shape(
            size if isinstance(size, int) else open_size.sub(BATCH, str(size.value))
            for size in value.shape
        )


def _name(graph: ir.Graph, trace: StepTrace) -> None:
    """Give outputs their names, and what is inside names that are no input's or output's."""
    taken: set[str | None] = {*trace.inputs, *trace.outputs}
    for value in list(graph.initializers.values()):
        if value.name in taken:
            graph.initializers.pop(str(value.name))
            value.name = free_name(f"{value.name}_constant", taken)
            graph.register_initializer(value)
        taken.add(str(value.name))
    outputs = dict(zip(graph.outputs, trace.outputs, strict=True))
    for node in graph:
        for value in node.outputs:
            if node.op_type == "ConvGrad" and not (value.uses() or value.is_graph_output()):
                value.name = ""  # ConvGrad computes what has a name
                continue
            name = value.name or node.op_type.lower()
            value.name = outputs[value] if value in outputs else free_name(name, taken)
        node.name = next(value.name for value in node.outputs if value.name)
