"""Where with broadcast operands, whose gradient ONNX Runtime forgets to reduce."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Additions, is_fixed

__all__ = ["full_size_selections"]


def full_size_selections(model: ir.Model) -> int:
    """Expand what a Where selects from to the shape of its result.

    ONNX Runtime gives a smaller operand a gradient of the result's shape, without a word. Expand's
    gradient is summed as it must be. Constants, which have no gradient, stay.

    Args:
        model: The model, edited in place.

    Returns:
        The number of operands expanded.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "Where"):
            continue
        for index in (1, 2):
            value = node.inputs[index]
            assert value is not None
            if is_fixed(value):
                continue
            others = [other for other in node.inputs if other is not None and other is not value]
            smaller = [other for other in others if not _covers(value.shape, other.shape)]
            if not smaller or _is_expanded(value, smaller):
                continue
            new = Additions(f"{node.name or node.outputs[0].name}/operand_{index}")
            whole = value
            for other in smaller:
                # Expand broadcasts both ways, so that no shape has to be known here.
                whole = new.op("Expand", whole, new.op("Shape", other), like=value)
            whole.shape = node.outputs[0].shape
            model.graph.insert_before(node, new.nodes)
            node.replace_input_with(index, whole)
            changed += 1
    return changed


def _covers(shape: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Tell whether broadcasting with another shape is known to leave a shape as it is."""
    if shape is None or other is None or len(other) > len(shape):
        return False
    pairs = zip(reversed(tuple(shape)), reversed(tuple(other)), strict=False)
    return all(theirs == 1 or (own == theirs and own is not None) for own, theirs in pairs)


def _is_expanded(value: ir.Value, others: list[ir.Value]) -> bool:
    """Tell whether a value has been expanded to these values' shapes before."""
    seen = set()
    node = value.producer()
    while node is not None and is_standard(node, "Expand"):
        source, shape = node.inputs[0], node.inputs[1]
        reader = shape.producer() if shape is not None else None
        if reader is not None and is_standard(reader, "Shape"):
            seen.add(reader.inputs[0])
        node = source.producer() if source is not None else None
    return set(others) <= seen
