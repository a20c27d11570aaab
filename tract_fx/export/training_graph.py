"""From a forward graph that ends in a loss to a training graph with TrAct in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.gradient_builder import build_gradients
from tract_fx.passes.onnx_graph.calls import match_call
from tract_fx.passes.onnx_graph.repairs import prepare_for_gradients, unbiased_running_variance
from tract_fx.passes.onnx_graph.rewrite import insert_tract, present_lambdas

__all__ = ["add_tract", "build_evaluation_graph", "build_plain_training_graph"]


def build_plain_training_graph(
    forward: ir.Model,
    *,
    loss: str,
    trainable: Sequence[str],
    frozen: Sequence[str],
    directory: Path,
    unbiased_variance: bool,
) -> ir.Model:
    """Have ONNX Runtime build the gradients of a forward graph, after what that needs repaired.

    Args:
        forward: A forward graph in training mode, with the loss among its outputs. Not changed.
        loss: Name of the loss.
        trainable: Parameters that get gradients.
        frozen: Other tensors that become part of the checkpoint.
        directory: Where `checkpoint` is written, and files of the builder's own.
        unbiased_variance: Whether running variances are PyTorch's.

    Returns:
        The training graph, without TrAct.

    Raises:
        ExportError: ONNX Runtime can't differentiate the graph.
    """  # noqa: DOC502 (raised by what it calls)
    graph = forward.clone()
    only_output(graph, loss)
    prepare_for_gradients(graph, trainable=trainable)
    training = build_gradients(ir.to_proto(graph), trainable, frozen, directory)
    if unbiased_variance:
        unbiased_running_variance(training)
    return training


def only_output(model: ir.Model, name: str) -> None:
    """Leave one output, and drop the nodes that nothing needs then, in place.

    Args:
        model: A graph.
        name: Name of the output to keep.
    """
    kept = next(value for value in model.graph.outputs if value.name == name)
    model.graph.outputs[:] = [kept]
    remove_unused(model)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes whose outputs nothing reads, in place.

    Args:
        model: A graph.
    """
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)


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


def build_evaluation_graph(
    evaluation: ir.Model,
    training: ir.Model,
    *,
    loss: str,
    predictions: Sequence[str],
    parameters: Collection[str],
) -> ir.Model:
    """Make the graph that a trainer evaluates with: parameters are inputs behind the user's.

    ONNX Runtime hands the parameters over in the order in which the training graph has them, and
    all of them, so that one which evaluation does without is an input too.

    Args:
        evaluation: A forward graph in evaluation mode, with loss and predictions as outputs. Not
            changed.
        training: The training graph.
        loss: Name of the loss, the first output.
        predictions: Names of the outputs behind it.
        parameters: Names of all tensors of the checkpoint.

    Returns:
        The evaluation graph.
    """
    model = evaluation.clone()
    outputs = {value.name: value for value in model.graph.outputs}
    model.graph.outputs[:] = [outputs[name] for name in (loss, *predictions)]
    remove_unused(model)
    for given in training.graph.inputs:
        if given.name not in parameters:
            continue
        value = model.graph.initializers.pop(str(given.name), None)
        if value is None:
            value = ir.Value(name=given.name, shape=given.shape, type=given.type)
        value.const_value = None
        model.graph.inputs.append(value)
    return model
