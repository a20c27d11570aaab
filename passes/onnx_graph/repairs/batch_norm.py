"""BatchNormalization, of which ONNX Runtime puts every one in training mode."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.repairs.replacement import (
    Replacement,
    known_dtype,
    known_rank,
)

__all__ = ["frozen_batch_norm", "train_batch_norm"]

EPSILON = 1e-5  # ONNX's default


def frozen_batch_norm(model: ir.Model, names: Collection[str] | None = None) -> int:
    """Write BatchNormalization with fixed statistics as (x − mean) · scale / √(var + ε) + bias.

    A node that stays a BatchNormalization is trained on batch statistics, whatever its
    `training_mode`. Gradients of scale and bias come out as PyTorch's in eval mode.

    Args:
        model: The model, edited in place.
        names: Names of the nodes to freeze; None for those whose `training_mode` is 0.

    Returns:
        The number of nodes replaced.

    Raises:
        ExportError: If the rank of an input is not known, or if statistics of the batch, the
            outputs of a node in training mode, are read elsewhere.
    """  # noqa: DOC502 - raised by _require_unread
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "BatchNormalization"):
            continue
        if names is None and node.attributes.get_int("training_mode", 0) != 0:
            continue
        if names is not None and node.name not in names:
            continue
        _require_unread(node)
        new = Replacement(node)
        x, *vectors = node.inputs
        assert x is not None
        rank = known_rank(x, node)
        scale, bias, mean, variance = (_per_channel(new, vector, rank) for vector in vectors)
        epsilon = new.scalar(node.attributes.get_float("epsilon", EPSILON), known_dtype(x, node))
        deviation = new.op("Sqrt", new.op("Add", variance, epsilon, like=variance), like=variance)
        factor = new.op("Div", scale, deviation, like=scale)
        scaled = new.op("Mul", new.op("Sub", x, mean, like=x), factor, like=x)
        new.finish(new.op("Add", scaled, bias, like=x))
        changed += 1
    return changed


def train_batch_norm(model: ir.Model, names: Collection[str] | None = None) -> int:
    """Put BatchNormalization nodes of an inference graph in training mode.

    They get the outputs that the operator has then: the result and both running statistics.

    Args:
        model: The model, edited in place.
        names: Names of the nodes; None for all.

    Returns:
        The number of nodes changed.
    """
    changed = 0
    for node in model.graph:
        if not is_standard(node, "BatchNormalization"):
            continue
        if names is not None and node.name not in names:
            continue
        complete = len(node.outputs) == 3 and all(output.name for output in node.outputs)
        if node.attributes.get_int("training_mode", 0) != 0 and complete:
            continue
        node.attributes.add(ir.AttrInt64("training_mode", 1))
        node.resize_outputs(3)
        for output, suffix in zip(node.outputs[1:], ("mean", "var"), strict=True):
            if not output.name:
                output.name = f"{node.outputs[0].name}_running_{suffix}"
        changed += 1
    return changed


def _per_channel(new: Replacement, vector: ir.Value | None, rank: int) -> ir.Value:
    """Shape (C) to (1, C, 1, …), so that it broadcasts over an input of that rank."""
    assert vector is not None
    if rank <= 2:
        return vector
    shape = new.int64([1, -1, *[1] * (rank - 2)])
    return new.op("Reshape", vector, shape, like=vector)


def _require_unread(node: ir.Node) -> None:
    """Raise if an output that a frozen BatchNormalization does not have is read.

    Args:
        node: The node.

    Raises:
        ExportError: If it is.
    """
    for output in node.outputs[1:]:
        if output.uses() or output.is_graph_output():
            raise ExportError(
                f"{described(node)}, to be frozen, has its output {output.name!r} read elsewhere",
                "with fixed statistics there is no such value",
                "Export the model with this layer in eval mode, or leave it in training mode",
            )
