"""From a forward graph that ends in a loss to a training graph with TrAct in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.gradient_builder import build_gradients
from tract_fx.export.left_out import only_output
from tract_fx.export.value_names import gradient_names_apart
from tract_fx.passes.onnx_graph.calls import match_call
from tract_fx.passes.onnx_graph.repairs import prepare_for_gradients
from tract_fx.passes.onnx_graph.rewrite import insert_tract, present_lambdas

__all__ = ["add_tract", "build_plain_training_graph"]


def build_plain_training_graph(
    forward: ir.Model,
    *,
    loss: str,
    trainable: Sequence[str],
    frozen: Sequence[str],
    directory: Path,
) -> ir.Model:
    """Have ONNX Runtime build the gradients of a forward graph, after what that needs repaired.

    Args:
        forward: A forward graph in training mode, with the loss among its outputs. Not changed.
        loss: Name of the loss.
        trainable: Parameters that get gradients.
        frozen: Other tensors that become part of the checkpoint.
        directory: Where `checkpoint` is written, and files of the builder's own.

    Returns:
        The training graph, without TrAct.

    Raises:
        ExportError: ONNX Runtime can't differentiate the graph.
    """  # noqa: DOC502 (raised by what it calls)
    graph = forward.clone()
    only_output(graph, loss)
    gradient_names_apart(graph)
    prepare_for_gradients(graph, trainable=trainable)
    return build_gradients(ir.to_proto(graph), trainable, frozen, directory)


def add_tract(training: ir.Model, lambdas: Mapping[str, float]) -> tuple[str, ...]:
    """Put TrAct on calls of a training graph, in place.

    Args:
        training: A training graph.
        lambdas: λ by the name of the call's node.

    Returns:
        Names of the calls whose weight is frozen, on which TrAct is idle.

    Raises:
        ExportError: A call is not in the graph as it was in the forward graph.
    """
    nodes = {str(node.name): node for node in training.graph}
    calls = {}
    for name in lambdas:
        call = match_call(nodes[name]) if name in nodes else None
        if call is None:
            raise ExportError(
                f"the call {name!r}, which TrAct is on",
                "ONNX Runtime merged it with an equal call, or folded it, while building gradients",
                "Call the layer once on each input",
            )
        calls[name] = call
    idle = insert_tract(training, calls, lambdas)
    put_in = present_lambdas(training)
    assert put_in.keys() | set(idle) == lambdas.keys(), (put_in, idle, lambdas)
    return idle
