"""Sums, means and extrema that ONNX Runtime has no gradient for."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import (
    Replacement,
    constant_array,
    known_dtype,
    known_rank,
)
from tract_fx.passes.onnx_graph.repairs.torch_exports import FX_NODE
from tract_fx.passes.onnx_graph.values import FLOATING

__all__ = [
    "extrema_as_primitives",
    "norms_of_everything",
    "reductions_as_primitives",
    "variadic_as_binary",
]

# torch's reductions that give an index as well send the whole gradient to it.
INDEXED = ("aten.max.dim", "aten.min.dim")


def reductions_as_primitives(model: ir.Model) -> int:
    """Write ReduceL1, ReduceSumSquare and ReduceLogSum with ReduceSum.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "ReduceL1", "ReduceSumSquare", "ReduceLogSum"):
            continue
        new = Replacement(node)
        x = node.inputs[0]
        assert x is not None
        if node.op_type == "ReduceL1":
            terms = new.op("Abs", x, like=x)
        elif node.op_type == "ReduceSumSquare":
            terms = new.op("Mul", x, x, like=x)
        else:
            terms = x
        result = _reduce_sum(new, terms)
        new.finish(new.op("Log", result, like=x) if node.op_type == "ReduceLogSum" else result)
        changed += 1
    return changed


def norms_of_everything(model: ir.Model) -> int:
    """Write ReduceL2 and ReduceLogSumExp to a scalar with kept dimensions and a Squeeze.

    ONNX Runtime's gradient of one that drops all dimensions is a graph that it can't load.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "ReduceL2", "ReduceLogSumExp"):
            continue
        x = node.inputs[0]
        if x is None or node.attributes.get_int("keepdims", 1) != 0:
            continue
        rank, axes = known_rank(x, node), _constant_axes(node)
        if axes is not None and len(axes) < rank:
            continue
        new = Replacement(node)
        every = new.int64(list(range(rank)))
        kept = new.op(node.op_type, x, every, like=x, keepdims=1)
        new.finish(new.op("Squeeze", kept, every, like=x))
        changed += 1
    return changed


def extrema_as_primitives(model: ir.Model) -> int:
    """Write ReduceMax and ReduceMin as the mean of the entries that attain the extremum.

    Its gradient is shared evenly among them, as PyTorch's amax has it. Where torch's exporter notes
    `max(dim)`, which has the whole gradient at one index, the entry at that index is gathered.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced; one that is only compared with stays.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "ReduceMax", "ReduceMin") or _is_only_compared(node.outputs[0]):
            continue
        x = node.inputs[0]
        if x is None or known_dtype(x, node) not in FLOATING:
            continue
        new = Replacement(node)
        axes = _constant_axes(node)
        note = node.metadata_props.get(FX_NODE, "")
        if axes is not None and len(axes) == 1 and any(name in note for name in INDEXED):
            new.finish(_gathered(new, x, axes[0]))
        else:
            new.finish(_shared(new, x))
        changed += 1
    return changed


def variadic_as_binary(model: ir.Model) -> int:
    """Write Sum, Mean, and Max and Min of more than two, with operators of two inputs.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    pairwise = {"Sum": "Add", "Mean": "Add", "Max": "Max", "Min": "Min"}
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, *pairwise):
            continue
        if node.op_type in {"Max", "Min"} and len(node.inputs) == 2:
            continue
        new = Replacement(node)
        first, *others = node.inputs
        assert first is not None
        result = first
        for other in others:
            result = new.op(pairwise[node.op_type], result, other, like=first)
        if node.op_type == "Mean":
            divisor = new.scalar(len(node.inputs), known_dtype(first, node))
            result = new.op("Div", result, divisor, like=first)
        elif not others:
            result = new.op("Identity", result, like=first)
        new.finish(result)
        changed += 1
    return changed


def _is_only_compared(value: ir.Value) -> bool:
    """Tell whether a value has no gradient, for it is only read by comparisons."""
    return not value.is_graph_output() and all(
        is_standard(use.node, "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
        for use in value.uses()
    )


def _shared(new: Replacement, x: ir.Value) -> ir.Value:
    """Write the mean of the entries equal to the extremum, which is compared and no more."""
    node = new.node
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    extremum = new.op(node.op_type, *node.inputs, like=x, **{**options, "keepdims": 1})
    mask = new.op("Equal", x, extremum)
    mask.type = ir.TensorType(ir.DataType.BOOL)
    zero = new.scalar(0.0, known_dtype(x, node))
    total = _reduce_sum(new, new.op("Where", mask, x, zero, like=x))
    count = _reduce_sum(new, new.op("Cast", mask, like=x, to=int(known_dtype(x, node))))
    return new.op("Div", total, count, like=x)


def _gathered(new: Replacement, x: ir.Value, axis: int) -> ir.Value:
    """Write the entry at the index of the extremum along one axis."""
    index = new.op(new.node.op_type.replace("Reduce", "Arg"), x, axis=axis, keepdims=1)
    index.type = ir.TensorType(ir.DataType.INT64)
    result = new.op("GatherElements", x, index, like=x, axis=axis)
    if new.node.attributes.get_int("keepdims", 1):
        return result
    return new.op("Squeeze", result, new.int64([axis]), like=x)


def _reduce_sum(new: Replacement, terms: ir.Value) -> ir.Value:
    """Write a ReduceSum with the axes and options of the reduction that is replaced."""
    node = new.node
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None and (numbers := node.attributes.get_ints("axes")) is not None:
        axes = new.int64(numbers)
    options: dict[str, Any] = {
        "keepdims": node.attributes.get_int("keepdims", 1),
        "noop_with_empty_axes": node.attributes.get_int("noop_with_empty_axes", 0),
    }
    operands = [terms] if axes is None else [terms, axes]
    return new.op("ReduceSum", *operands, like=terms, **options)


def _constant_axes(node: ir.Node) -> list[int] | None:
    """Give the axes of a reduction, None where they aren't known before running."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        numbers = node.attributes.get_ints("axes")
        return None if numbers is None else list(numbers)
    array = constant_array(axes)
    return None if array is None else [int(axis) for axis in array.ravel()]
