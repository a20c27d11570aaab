"""onnx's converter of opsets: what it can't convert, and why, in words of the user's file."""

from __future__ import annotations

import onnx.defs
import onnx.helper
import onnx.version_converter
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.values import subgraphs

_SMALL = 64
"""Entries of a constant that the converter may read: sizes, axes, scales."""


def convert_opset(model: ir.Model, opset: int, target: int) -> ir.Model:
    """Convert a model to another opset."""
    try:
        return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), target))
    except Exception as error:  # the converter raises RuntimeError and others of its own
        newest = onnx.defs.onnx_opset_version()
        if not 0 < opset <= newest:
            what = f"a model of opset {opset}"
            why = f"onnx {onnx.__version__} has the opsets 1 to {newest}"
        else:
            found = _culprit(model, opset, target)
            what, why = found or ("the model", _cleaned(error))
            what = f"{what}, which onnx can't convert from opset {opset} to {target}"
        raise ExportError(
            what, why, f"Export the model with opset {target}, or without this operator"
        ) from error


def _culprit(model: ir.Model, opset: int, target: int) -> tuple[str, str] | None:
    """Find the first node that can't be converted: what it is, and why."""
    for node in model.graph.all_nodes():
        if not is_standard(node, node.op_type):
            continue
        reason = _not_of_opset(node, opset)
        if reason is None and not any(True for _ in subgraphs(node)):
            reason = _converted_alone(node, opset, target)
        if reason is not None:
            return described(node), reason
    return None


def _not_of_opset(node: ir.Node, opset: int) -> str | None:
    """Why an operator is none of an opset, None if it is one."""
    if not onnx.defs.has(node.op_type):
        return f"ONNX has no operator {node.op_type}"
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain="")
    except onnx.defs.SchemaError:
        since = onnx.defs.get_schema(node.op_type).since_version
        return f"ONNX has {node.op_type} since opset {since} alone"
    if schema.deprecated:
        return f"ONNX has had no {node.op_type} since opset {schema.since_version}"
    return None


def _converted_alone(node: ir.Node, opset: int, target: int) -> str | None:
    """Convert a graph of one node: why that fails, None if it does not."""
    read = {value.name: value for value in node.inputs if value is not None}
    constants = [
        ir.serde.serialize_tensor(value.const_value)
        for value in read.values()
        if value.const_value is not None and value.const_value.size <= _SMALL
    ]
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node)],
        "node",
        [ir.serde.serialize_value(value) for value in read.values()],
        [ir.serde.serialize_value(value) for value in node.outputs if value.name],
        constants,
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    try:
        onnx.version_converter.convert_version(
            onnx.helper.make_model(graph, opset_imports=opsets), target
        )
    except Exception as error:
        return _cleaned(error)
    return None


def _cleaned(error: Exception) -> str:
    """What the converter says, without its source file, its assertion and names of its own."""
    text = str(error).strip().rpartition("` failed: ")[2].strip(" .")
    if "is a param instead of an int" in text or "Shape of input" in text:
        return "it takes the sizes of what this node reads, and not all of them are fixed"
    if "No Previous Version" in text:
        return "the older opset has no such operator"
    return text
