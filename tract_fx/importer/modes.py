"""A training-mode graph's form for evaluation, and what in a graph is random."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import RANDOM, is_standard
from tract_fx.passes.onnx_graph.node_names import described


def evaluation_mode(model: ir.Model) -> None:
    """Turn a forward graph in training mode into its form for evaluation.

    BatchNormalization uses its running statistics and has one output; Dropout nodes go.
    """
    random_free(model)
    for node in model.graph:
        if is_standard(node, "BatchNormalization"):
            _drop_outputs(node)
            if node.attributes.get_int("training_mode", 0):
                node.attributes.add(ir.AttrInt64("training_mode", 0))


def random_free(model: ir.Model) -> None:
    """Take out all Dropout nodes, so that two runs of a graph can be compared."""
    for node in list(model.graph):
        if is_standard(node, "Dropout"):
            _drop_outputs(node)
            _bypass(model.graph, node)


def random_operators(model: ir.Model) -> list[str]:
    """Name the nodes whose result differs from run to run."""
    return [
        node.name or node.outputs[0].name or node.op_type
        for node in model.graph.all_nodes()
        if is_standard(node, *RANDOM) or (is_standard(node, "Dropout") and not _is_off(node))
    ]


def training_switch(node: ir.Node) -> bool | None:
    """Tell whether a Dropout says that it trains, None where it does not say or computes it."""
    given = _number(node, 2)
    return None if given is None else bool(given)


def _is_off(node: ir.Node) -> bool:
    """Tell whether a Dropout is known to let its input through."""
    says_nothing = len(node.inputs) < 3 or node.inputs[2] is None
    return says_nothing or training_switch(node) is False or _number(node, 1) == 0


def _number(node: ir.Node, place: int) -> float | None:
    value = node.inputs[place] if len(node.inputs) > place else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().reshape(-1)[0].item()


def _drop_outputs(node: ir.Node) -> None:
    """Leave a node its first output alone; those of a graph that are its others go too."""
    graph = node.graph
    assert graph is not None
    for output in node.outputs[1:]:
        if output.uses():
            raise ExportError(
                f"{described(node)} has its output {output.name!r} read by other nodes",
                "in evaluation there is no such value",
                "Export the model in eval mode as well",
            )
        while output in graph.outputs:
            graph.outputs.remove(output)
    node.resize_outputs(1)


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Let the users of a node's output read its input; a graph's output stays under its name."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if not result.is_graph_output():
        result.replace_all_uses_with(source)
        graph.remove(node, safe=True)
        return
    # The graph's output keeps its name, also where its source has one to keep or feeds others.
    identity = ir.node("Identity", [source], name=node.name)
    graph.insert_before(node, identity)
    copy = identity.outputs[0]
    copy.type, copy.shape, name = result.type, result.shape, result.name
    result.replace_all_uses_with(copy, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    copy.name = name


def train_batch_norm(model: ir.Model, names: Collection[str]) -> None:
    """Put BatchNormalization nodes of an inference graph in training mode.

    They get the outputs that the operator has then: the result and both running statistics.
    """
    for node in model.graph:
        if is_standard(node, "BatchNormalization") and node.name in names:
            node.attributes.add(ir.AttrInt64("training_mode", 1))
            node.resize_outputs(3)
            for output, suffix in zip(node.outputs[1:], ("mean", "var"), strict=True):
                output.name = output.name or f"{node.outputs[0].name}_running_{suffix}"
