"""Small graphs, and runs of graphs in whatever ONNX Runtime is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import parser


def graph(text: str, weights: Mapping[str, np.ndarray[Any, Any]], opset: int = 18) -> ir.Model:
    """Parse a graph, and give it initializers."""
    proto = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}, "ai.onnx.ml" : 3]>\n{text}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    for output in proto.graph.output:  # the parser has no way to leave a shape open
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def run(
    graph: ir.Model, feeds: Mapping[str, np.ndarray[Any, Any]], names: tuple[str, ...]
) -> dict[str, np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(list(names), given), strict=True))
