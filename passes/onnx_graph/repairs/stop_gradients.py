"""Values that must have no gradient, which a forward graph does not say."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Additions
from tract_fx.passes.onnx_graph.repairs.torch_exports import FX_NODE
from tract_fx.passes.onnx_graph.values import FLOATING

__all__ = ["detached_names", "detached_values", "steps_without_gradient", "stopped_copy"]

DETACH = ("aten.detach.", "aten.detach_.")
STEPS = ("Ceil", "Floor", "Round", "Sign")


def detached_values(model: ir.Model) -> int:
    """Let no gradient through what was `detach()` in PyTorch.

    torch.onnx.export writes it as Identity, so that its gradient would be the identity's. The
    operator that it came from is in the metadata: this pass comes before `strip_exporter_metadata`.

    Args:
        model: The model, edited in place.

    Returns:
        The number of values stopped.
    """
    return sum(_stop(model.graph, value) for value in _detached(model))


def detached_names(model: ir.Model) -> tuple[str, ...]:
    """Name the values that `detached_values` would stop.

    Args:
        model: The model.

    Returns:
        Their names.
    """
    return tuple(str(value.name) for value in _detached(model))


def _detached(model: ir.Model) -> list[ir.Value]:
    return [
        node.outputs[0]
        for node in model.graph
        if is_standard(node, "Identity")
        and any(name in node.metadata_props.get(FX_NODE, "") for name in DETACH)
    ]


def steps_without_gradient(model: ir.Model) -> int:
    """Give Round, Floor, Ceil and Sign the gradient zero, as they have in PyTorch.

    ONNX Runtime has none for them, and refuses the graph.

    Args:
        model: The model, edited in place.

    Returns:
        The number of values stopped.
    """
    changed = 0
    for node in list(model.graph):
        if is_standard(node, *STEPS) and node.outputs[0].dtype in (None, *FLOATING):
            changed += _stop(model.graph, node.outputs[0])
    return changed


def stopped_copy(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """Copy a value through a sequence of one, where ONNX Runtime looks for no gradient.

    Args:
        graph: The graph.
        value: The value to copy.
        before: The node before which the copy is made.

    Returns:
        The copy.
    """
    new = Additions(f"{value.name}/stop_gradient")
    sequence = new.op("SequenceConstruct", value)
    if value.dtype is not None:
        sequence.type = ir.SequenceType(ir.TensorType(value.dtype))
    copy = new.op("SequenceAt", sequence, new.int64(0), like=value)
    copy.shape = value.shape
    graph.insert_before(before, new.nodes)
    return copy


def _stop(graph: ir.Graph, value: ir.Value) -> bool:
    """Let all readers of a value read a copy that no gradient passes."""
    uses = list(value.uses())
    if value.is_graph_output() or not uses:
        return False
    if all(is_standard(use.node, "SequenceConstruct") for use in uses):
        return False
    producer = value.producer()
    assert producer is not None
    following = next(_after(graph, producer))
    copy = stopped_copy(graph, value, following)
    for use in uses:
        use.node.replace_input_with(use.idx, copy)
    return True


def _after(graph: ir.Graph, node: ir.Node) -> Iterator[ir.Node]:
    """Give the nodes that come after one."""
    nodes = iter(graph)
    for candidate in nodes:
        if candidate is node:
            yield from nodes
