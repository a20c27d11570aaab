"""Write TrAct's subgraph where a step's graph has a marker."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.value_names import free_name
from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall
from tract_fx.passes.onnx_graph.rewrite import PREFIX, PROVENANCE
from tract_fx.passes.onnx_graph.subgraph import write_tract
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.passes.onnx_graph.weight_gradient import WeightGradient
from tract_fx.passes.onnx_graph.writer import NodeWriter
from tract_fx.step.translations import MARKER, MARKER_DOMAIN

__all__ = ["expand_markers"]


def expand_markers(model: ir.Model) -> None:
    """Replace the markers, in place.

    Args:
        model: A step's graph.

    Raises:
        ExportError: A call's output gradient is not known.
    """  # noqa: DOC502 (raised by what it calls)
    markers = [n for n in model.graph if n.domain == MARKER_DOMAIN and n.op_type == MARKER]
    taken: set[str | None] = set()
    for node in markers:
        _expand(model.graph, node, free_name(node.attributes["call"].as_string(), taken))
    model.opset_imports.pop(MARKER_DOMAIN, None)
    if markers:
        model.opset_imports.setdefault("com.microsoft", 1)
        model.graph.sort()


def _expand(graph: ir.Graph, node: ir.Node, name: str) -> None:
    gradient, x = node.inputs[:2]
    dz = node.inputs[2] if len(node.inputs) > 2 else None
    assert gradient is not None and x is not None
    shape = static_shape(gradient)
    assert shape is not None
    if dz is None:
        raise ExportError(
            f"the layer {name!r}, whose weight's gradient is no product of its own",
            "TrAct with fewer rows than columns takes the output's gradient, which can't be told",
            "Train it in PyTorch, where a gradient penalty's share is told apart",
        )
    call, reference = _call(node, gradient, x, shape)
    write = NodeWriter(graph, f"{PREFIX}{name}/", {PROVENANCE: json.dumps({"call": name})})
    value = write.constant(np.asarray(node.attributes["lambda_"].as_float(), np.float32), "lambda")
    result = write_tract(write, WeightGradient(call, gradient, dz), shape, value)
    for index in range(len(reference.inputs)):
        reference.replace_input_with(index, None)
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.insert_after(node, list(write.nodes))
    graph.remove(node, safe=True)


def _call(
    node: ir.Node, gradient: ir.Value, x: ir.Value, shape: tuple[int, ...]
) -> tuple[OnnxCall, ir.Node]:
    """The call as the subgraph's writer reads one: a node that stands nowhere."""
    weight = ir.Value(shape=ir.Shape(shape), type=gradient.type)
    if "strides" not in node.attributes:
        reference = ir.Node("", "Gemm", [x, weight], {"transB": ir.AttrInt64("transB", 1)})
        return OnnxCall(reference, x, weight, Layout.OUT_IN), reference
    pads = node.attributes["pads"].as_ints()
    sides = pads * 2 if len(pads) == len(shape) - 2 else [*pads[0::2], *pads[1::2]]
    attributes = {name: node.attributes[name] for name in ("strides", "dilations", "group")}
    attributes["pads"] = ir.AttrInt64s("pads", sides)
    reference = ir.Node("", "Conv", [x, weight], attributes)
    return OnnxCall(reference, x, weight, Layout.CONVOLUTION), reference
