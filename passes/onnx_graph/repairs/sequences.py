"""Splits into a sequence of tensors, through which ONNX Runtime passes no gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.repairs.gradients import gradient_path
from tract_fx.passes.onnx_graph.repairs.replacement import (
    Additions,
    Replacement,
    constant_array,
    known_rank,
)
from tract_fx.passes.onnx_graph.repairs.stop_gradients import stopped_copy
from tract_fx.passes.onnx_graph.values import FLOATING

__all__ = ["partly_used_splits", "sequences_as_splits"]


def sequences_as_splits(model: ir.Model) -> int:
    """Write SplitToSequence followed by SequenceAt as Split.

    torch.onnx.export writes split and chunk so. Where other parts of the loss have a gradient, the
    one through the sequence would be missing without a word.

    Args:
        model: The model, edited in place.

    Returns:
        The number of SplitToSequence nodes replaced; those whose sizes or indices are not known
        before running, or whose sequence is read in another way, stay.

    Raises:
        ExportError: If the rank of an input is not known.
    """  # noqa: DOC502 - raised by known_rank
    return sum(
        _replace(model.graph, node)
        for node in list(model.graph)
        if is_standard(node, "SplitToSequence")
    )


def partly_used_splits(model: ir.Model, outputs: Collection[str] | None = None) -> int:
    """Give the pieces of a Split that have no gradient a source of their own.

    ONNX Runtime's gradient of Split puts together the pieces' gradients that there are and leaves
    the others out: it has the wrong size, and entries in the wrong places, without a word. So
    pieces with a gradient become Slices of the input, and those without one Slices of a copy that
    no gradient passes. The copy is for Slices and Gathers as well, which ONNX Runtime joins to a
    Split where together they are the whole.

    Args:
        model: The model, edited in place.
        outputs: Names of the graph outputs that a loss reads; None for all.

    Returns:
        The number of nodes changed.

    Raises:
        ExportError: If the sizes of a Split's pieces are not known before running.
    """  # noqa: DOC502 - raised by _sliced
    graph = model.graph
    path = gradient_path(model, {value.name or "" for value in _sources(graph)}, outputs)
    changed, moving = 0, set(path.values)
    for node in list(graph):
        if not is_standard(node, "Split") or not any(v in moving for v in node.outputs):
            continue
        if not all(v in moving for v in node.outputs):
            moving.update(_sliced(node, moving))
            changed += 1
    for x in {node.inputs[0] for node in graph if is_standard(node, "Slice", "Gather")}:
        if x is None or x not in moving:
            continue
        readers = [
            u.node for u in x.uses() if u.idx == 0 and is_standard(u.node, "Slice", "Gather")
        ]
        still = [reader for reader in readers if reader.outputs[0] not in moving]
        if not still or len(still) == len(readers):
            continue
        copy = stopped_copy(graph, x, still[0])
        for reader in still:
            reader.replace_input_with(0, copy)
        changed += len(still)
    return changed


def _sliced(node: ir.Node, moving: set[ir.Value]) -> list[ir.Value]:
    """Write a Split as Slices of those pieces that are read.

    Args:
        node: The Split.
        moving: The values that get a gradient.

    Returns:
        The new values among them.

    Raises:
        ExportError: If the sizes of the pieces are not known before running.
    """
    x = node.inputs[0]
    assert x is not None
    axis = node.attributes.get_int("axis", 0)
    sizes = _split_sizes(node, x, axis % known_rank(x, node))
    if sizes is None:
        raise ExportError(
            f"{described(node)} has pieces of sizes that are computed, and a loss depends on "
            "some of them only",
            "ONNX Runtime Training 1.19.2 has a wrong gradient for it",
            "Export the model with fixed sizes; the batch may stay dynamic",
        )
    new = Replacement(node)
    ends = itertools.accumulate(sizes)
    pieces: list[ir.Value] = []
    result = []
    for output, size, end in zip(node.outputs, sizes, ends, strict=True):
        if not output.uses() and not output.is_graph_output():
            pieces.append(output)
            continue
        bounds = [new.int64([n]) for n in (end - size, end, axis)]
        pieces.append(new.op("Slice", x, *bounds, like=x))
        if output in moving:
            result.append(pieces[-1])
    new.finish(*pieces)
    return result


def _sources(graph: ir.Graph) -> list[ir.Value]:
    """Give every value from which a gradient could be asked, whatever is trained."""
    values = [*graph.inputs, *graph.initializers.values()]
    return [value for value in values if value.dtype is None or value.dtype in FLOATING]


def _split_sizes(node: ir.Node, x: ir.Value, axis: int) -> list[int] | None:
    """Give the sizes of a Split's pieces, None where they aren't known before running."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        array = constant_array(given)
        return None if array is None else [int(size) for size in array]
    whole = None if x.shape is None else x.shape[axis]
    if not isinstance(whole, int):
        return None
    step = math.ceil(whole / len(node.outputs))
    return [min(step, whole - start) for start in range(0, whole, step)]


def _replace(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace one SplitToSequence and its readers."""
    x, sequence = node.inputs[0], node.outputs[0]
    assert x is not None
    readers = [use.node for use in sequence.uses()]
    axis = node.attributes.get_int("axis", 0)
    sizes = _sizes(node, x, axis % known_rank(x, node))
    places = [constant_array(reader.inputs[1]) for reader in readers if len(reader.inputs) > 1]
    if (
        sizes is None
        or sequence.is_graph_output()
        or not all(is_standard(reader, "SequenceAt") for reader in readers)
        or any(place is None for place in places)
    ):
        return False
    new = Additions(node.name or sequence.name or node.op_type)
    pieces = _split(new, x, sizes, axis)
    if len(node.inputs) < 2 and not node.attributes.get_int("keepdims", 1):
        pieces = [new.op("Squeeze", piece, new.int64([axis]), like=x) for piece in pieces]
    graph.insert_before(node, new.nodes)
    for reader, place in zip(readers, places, strict=True):
        assert place is not None
        piece = pieces[int(place.item())]
        # An Identity keeps the name, and leaves each reader a value of its own.
        identity = ir.node("Identity", [piece], name=reader.name)
        graph.insert_before(reader, identity)
        old, value = reader.outputs[0], identity.outputs[0]
        name, value.type, value.shape = old.name, x.type, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(reader, safe=True)
        value.name = name
    graph.remove(node, safe=True)
    return True


def _split(new: Additions, x: ir.Value, sizes: list[int], axis: int) -> list[ir.Value]:
    """Write a Split, which has one output for each size."""
    lengths = new.int64(sizes)
    first = new.op("Split", x, lengths, like=x, axis=axis)
    node = first.producer()
    assert node is not None
    node.resize_outputs(len(sizes))
    for number, output in enumerate(node.outputs[1:], 1):
        output.name, output.type = f"{first.name}.{number}", x.type
    return list(node.outputs)


def _sizes(node: ir.Node, x: ir.Value, axis: int) -> list[int] | None:
    """Give the sizes of the pieces, None where they aren't known before running."""
    assert x.shape is not None
    whole = x.shape[axis]
    split = node.inputs[1] if len(node.inputs) > 1 else None
    if split is None:
        return [1] * whole if isinstance(whole, int) else None
    array = constant_array(split)
    if array is None:
        return None
    if array.ndim:
        return [int(size) for size in array]
    if not isinstance(whole, int):
        return None
    step = int(array)
    return [min(step, whole - start) for start in range(0, whole, step)]
