"""Values that must have no gradient, which a forward graph does not say."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import FLOATING, Additions

__all__ = ["detached_values", "steps_without_gradient"]

FX_NODE = "pkg.torch.onnx.fx_node"
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
    changed = 0
    for node in list(model.graph):
        note = node.metadata_props.get(FX_NODE, "")
        if is_standard(node, "Identity") and any(name in note for name in DETACH):
            changed += _stop(model.graph, node.outputs[0])
    return changed


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


def _stop(graph: ir.Graph, value: ir.Value) -> bool:
    """Send a value through a sequence of one, where ONNX Runtime looks for no gradient."""
    users = value.uses()
    if value.is_graph_output() or not users:
        return False
    if all(is_standard(use.node, "SequenceConstruct") for use in users):
        return False
    new = Additions(f"{value.name}/stop_gradient")
    sequence = new.op("SequenceConstruct", value)
    if value.dtype is not None:
        sequence.type = ir.SequenceType(ir.TensorType(value.dtype))
    stopped = new.op("SequenceAt", sequence, new.int64(0), like=value)
    stopped.shape = value.shape
    producer = value.producer()
    assert producer is not None
    value.replace_all_uses_with(stopped)
    new.nodes[0].replace_input_with(0, value)
    graph.insert_after(producer, new.nodes)
    return True
