"""Runs of graphs in ONNX Runtime, to read values inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from tract_fx import ort_training
from tract_fx.errors import ExportError, TractError
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.node_names import name_in_file
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET

Refused: TypeAlias = Callable[[Exception], TractError]


def accumulated_gradients(training: ir.Model) -> dict[str, str]:
    """Name the values that a training graph adds to the parameters' gradient buffers."""
    return {
        str(node.inputs[0].name).removesuffix(BUFFER): str(node.inputs[1].name)
        for node in training.graph
        if node.op_type == "InPlaceAccumulatorV2"
        and node.inputs[0] is not None
        and node.inputs[1] is not None
        and str(node.inputs[0].name).endswith(BUFFER)
    }


def can_not_run(error: Exception) -> ExportError:
    """Make the error for a graph that ONNX Runtime does not take."""
    return ExportError(
        f"ONNX Runtime can't run the exported graph ({ort_training.message_of(error)})",
        "it has an operator, or one in a dtype, that has no kernel there",
        "Write that part of the model otherwise, without autocast for one",
    )


def run_graph(
    model: ir.Model,
    feeds: Mapping[str, np.ndarray],
    names: Sequence[str],
    refused: Refused = can_not_run,
) -> dict[str, np.ndarray]:
    """Run a graph once on the CPU and read values inside it."""
    model = ir.from_proto(ir.to_proto(model))
    values = {v.name: v for node in model.graph for v in node.outputs}
    read = [name for name in dict.fromkeys(names) if name in values]
    if not read:  # ONNX Runtime takes no graph without an output
        return {name: feeds[name] for name in names}
    cut(model.graph, [values[name] for name in read])
    for value in model.graph.outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    given = {str(v.name): feeds[str(v.name)] for v in model.graph.inputs}
    for node in model.graph:
        node.name = name_in_file(node)  # what ONNX Runtime calls it in its errors
    file = ir.to_proto(model).SerializeToString()
    results = ort_training.run_once(file, given, read, refused)
    return {name: results[name] if name in results else given[name] for name in names}


def run_training_graph(
    training: ir.Model,
    feeds: Mapping[str, np.ndarray],
    parameters: Mapping[str, np.ndarray],
    names: Sequence[str],
    refused: Refused,
) -> dict[str, np.ndarray]:
    """Run a training graph once on the CPU, without accumulation, and read values inside it."""
    given: dict[str, np.ndarray] = {}
    for value in training.graph.inputs:
        name = str(value.name)
        if name in feeds:
            given[name] = np.asarray(feeds[name], order="C")
        elif name in parameters:
            given[name] = parameters[name].copy()  # running statistics are updated in place
        elif name.endswith(BUFFER):
            given[name] = np.zeros_like(parameters[name.removesuffix(BUFFER)])
        elif name == RESET:
            given[name] = np.array([True])
    return run_graph(training, given, names, refused)
