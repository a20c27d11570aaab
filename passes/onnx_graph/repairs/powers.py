"""Powers with a computed exponent, to which ONNX Runtime gives no gradient."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import (
    Replacement,
    constant_array,
    is_fixed,
    known_dtype,
)

__all__ = ["powers_as_exponentials"]


# What keeps all entries above zero, if its inputs' are.
KEEPING = (
    *("Add", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Identity", "Cast", "Exp", "Sigmoid"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "GlobalAveragePool", "AveragePool"),
    *("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Concat"),
)
ALWAYS = ("Exp", "Sigmoid", "Softplus", "Softmax")


def powers_as_exponentials(model: ir.Model) -> int:
    """Write aˣ with a computed exponent as Exp(x · Log a), where a > 0 by its making.

    ONNX Runtime leaves the exponent without a gradient, without a word.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    changed = 0
    for node in list(model.graph):
        base, exponent = node.inputs[:2] if is_standard(node, "Pow") else (None, None)
        if base is None or exponent is None or is_fixed(exponent) or not _is_positive(base):
            continue
        new = Replacement(node)
        if known_dtype(exponent, node) != known_dtype(base, node):
            exponent = new.op("Cast", exponent, like=base, to=int(known_dtype(base, node)))
        logarithm = new.op("Log", base, like=base)
        new.finish(new.op("Exp", new.op("Mul", exponent, logarithm, like=base), like=base))
        changed += 1
    return changed


def _is_positive(value: ir.Value) -> bool:
    """Tell whether all entries of a value are above zero, whatever the graph's inputs are."""
    if is_fixed(value):
        array = constant_array(value)
        return array is not None and bool((array > 0).all())
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return False
    if node.op_type in ALWAYS:
        return True
    if node.op_type == "Clip":
        low = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and bool((low > 0).all())
    if node.op_type not in KEEPING:
        return False
    # Of all but these, the further inputs are shapes, axes and the like; of Pow it's the exponent.
    several = node.op_type in {"Add", "Mul", "Div", "Concat"}
    read = node.inputs if several else node.inputs[:1]
    return all(operand is not None and _is_positive(operand) for operand in read)
