"""PyTorch's running variance in a training graph of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.repairs.replacement import Additions

__all__ = ["unbiased_running_variance"]

MICROSOFT = "com.microsoft"
SUFFIX = "_unbiased_grad.accumulation.out"
MOMENTUM, EPSILON = 0.9, 1e-5  # ONNX's defaults


def unbiased_running_variance(
    training_model: ir.Model, names: Collection[str] | None = None
) -> int:
    """Let BatchNormalization's running variance follow PyTorch's definition.

    ONNX updates it in place with the batch's biased variance v, PyTorch with v · M / (M − 1), where
    M is the number of values per channel. So (1 − m) · v / (M − 1) is added to it, with ONNX's
    momentum m and v = 1/s² − ε from the saved inverse deviation s. The error, some 2e-7 · (v + ε)
    / M per step, is small beside v + ε, which is how the running variance is used.

    The addition is an InPlaceAccumulatorV2 whose result is an output of the graph, for else it
    would be removed. With M = 1, where PyTorch raises, the running variance stops being finite.

    Models of other frameworks that follow ONNX's definition don't want this pass.

    Args:
        training_model: The training graph, edited in place.
        names: Names of the forward graph's BatchNormalization nodes; None for all.

    Returns:
        The number of nodes corrected.

    Raises:
        ExportError: If a node has no outputs for its running variance and inverse deviation.
    """  # noqa: DOC502 - raised by _variance
    graph = training_model.graph
    done = {output.name for output in graph.outputs}
    changed = 0
    for node in list(graph):
        if node.domain != MICROSOFT or node.op_type != "BatchNormInternal":
            continue
        name = (node.name or "").removesuffix("_BatchNormInternal")
        if names is not None and name not in names:
            continue
        if f"{_variance(node).name}{SUFFIX}" not in done:
            _correct(graph, node)
            changed += 1
    if changed:
        training_model.graph.opset_imports.setdefault(MICROSOFT, 1)
    return changed


def _variance(node: ir.Node) -> ir.Value:
    """Give the output that is the running variance after its update.

    Args:
        node: The BatchNormInternal.

    Returns:
        The output.

    Raises:
        ExportError: If it, or the inverse deviation, is left out.
    """
    if len(node.outputs) < 5 or not node.outputs[2].name or not node.outputs[4].name:
        raise ExportError(
            f"BatchNormInternal {node.name!r} has {len(node.outputs)} outputs",
            "its running variance and inverse deviation are needed to make the variance unbiased",
            "Build the training graph from BatchNormalization nodes with training_mode=1 and three "
            "outputs (train_batch_norm)",
        )
    return node.outputs[2]


def _correct(graph: ir.Graph, node: ir.Node) -> None:
    """Add the correction of one node's running variance at the end of the graph."""
    x, scale = node.inputs[0], node.inputs[1]
    running, inverse_deviation = _variance(node), node.outputs[4]
    assert x is not None and scale is not None
    share = 1 - node.attributes.get_float("momentum", MOMENTUM)
    new = Additions(f"{running.name}_unbiased")
    count = new.op("Div", new.op("Size", x), new.op("Size", scale))
    others = new.op("Cast", new.op("Sub", count, new.int64(1)), to=int(ir.DataType.FLOAT))
    square = new.op("Mul", inverse_deviation, inverse_deviation)
    variance = new.op(
        "Sub",
        new.op("Reciprocal", square),
        new.scalar(node.attributes.get_float("epsilon", EPSILON)),
    )
    # Rounding may put the variance of a constant channel a little below zero.
    variance = new.op("Max", variance, new.scalar(0.0))
    term = new.op("Div", new.op("Mul", variance, new.scalar(share)), others)
    updated = new.op(
        "InPlaceAccumulatorV2", running, term, new.constant(np.array([False])), domain=MICROSOFT
    )
    updated.name = f"{running.name}{SUFFIX}"
    updated.type, updated.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    graph.extend(new.nodes)
    graph.outputs.append(updated)
