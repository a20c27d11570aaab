"""Operators of the domain ai.onnx.ml, which scikit-learn's models have beside standard ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from tract_fx.importer.replacement import Replacement
from tract_fx.passes.onnx_graph.models import as_ir_model

_DOMAIN = "ai.onnx.ml"
# One float32 for each number that they read; onnx infers no shape for them.
_ELEMENTWISE = ("Normalizer", "Imputer", "Binarizer")


def read_with_scores(model: onnx.ModelProto | ir.Model | str | Path) -> ir.Model:
    """Read a model; a classifier's scores stay among its outputs where they are dictionaries."""
    result = as_ir_model(model)
    if isinstance(model, ir.Model) or _DOMAIN not in result.opset_imports:
        return result
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    with_scores = without_dictionaries(proto)
    return result if with_scores is proto else as_ir_model(with_scores)


def standardised_preprocessing(model: ir.Model) -> None:
    """Write each Scaler as a difference and a product; note what others keep of their shape.

    Without it no shape is known behind such a step, and on a GPU it would run on the CPU.
    """
    for node in list(model.graph):
        x = node.inputs[0] if node.inputs else None
        if node.domain != _DOMAIN or x is None:
            continue
        if node.op_type == "Scaler":
            _write_out(node, x)
        elif node.op_type in _ELEMENTWISE and node.outputs[0].shape is None:
            node.outputs[0].shape = x.shape
            node.outputs[0].type = node.outputs[0].type or ir.TensorType(ir.DataType.FLOAT)


def _write_out(node: ir.Node, x: ir.Value) -> None:
    """Write (x - offset) * scale, in float32 as ONNX Runtime computes it."""
    new = Replacement(node)
    offset, scale = (
        new.constant(np.asarray(node.attributes.get_floats(name, (default,)), np.float32))
        for name, default in (("offset", 0.0), ("scale", 1.0))
    )
    if x.dtype != ir.DataType.FLOAT:
        shape, x = x.shape, new.op("Cast", x, to=int(ir.DataType.FLOAT), like=offset)
        x.shape = shape
    result = new.op("Mul", new.op("Sub", x, offset, like=offset), scale, like=offset)
    result.shape = x.shape
    new.finish(result)


def without_dictionaries(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the scores of a scikit-learn classifier as a tensor, not as a list of dictionaries.

    onnx-ir can't read the type of a ZipMap's output, so that this is done before.
    """
    maps = {i: n for i, n in enumerate(model.graph.node) if n.op_type == "ZipMap"}
    if not maps:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for number, node in maps.items():
        copy.graph.node[number].CopyFrom(
            onnx.helper.make_node("Identity", node.input, node.output, name=node.name)
        )
        for output in copy.graph.output:
            if output.name == node.output[0]:
                output.CopyFrom(
                    onnx.helper.make_tensor_value_info(
                        output.name, onnx.TensorProto.FLOAT, [None, None]
                    )
                )
    return copy
