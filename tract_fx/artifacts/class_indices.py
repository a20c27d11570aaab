"""Which inputs of a graph are class indices, and how many classes there are.

ONNX Runtime's SoftmaxCrossEntropyLoss does not check its labels: with one that is out of range it
reads other memory, and the loss and the gradients are made of that. Its gathers, of which other
losses and embeddings are made, take -1 for the last entry, where PyTorch raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from tract_fx.artifacts.manifest import TensorSpec

_LOSSES = frozenset({"SoftmaxCrossEntropyLoss", "SoftmaxCrossEntropyLossInternal"})
_GATHERS = frozenset({"Gather", "GatherElements"})
# What leaves each label as it is.
_REARRANGING = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclasses.dataclass(frozen=True)
class ClassRange:
    """The labels that a loss takes.

    Attributes:
        classes: Number of classes; labels are 0 to `classes` − 1.
        ignore_index: One label more, which counts for nothing; None where there is none.
    """

    classes: int
    ignore_index: int | None


def class_ranges(model: bytes) -> dict[str, ClassRange]:
    """Find a graph's inputs that are class indices of a softmax cross entropy."""
    proto = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(model))
    found: dict[str, ClassRange] = {}
    for node in ir.from_proto(proto).graph:
        read = _read(node)
        if read is None:
            continue
        labels, new = read
        old = found.setdefault(labels, new)
        if old != new:  # two losses of the same labels: what both take
            same = old.ignore_index == new.ignore_index
            found[labels] = ClassRange(
                min(old.classes, new.classes), new.ignore_index if same else None
            )
    return found


def with_range(spec: TensorSpec, ranges: Mapping[str, ClassRange]) -> TensorSpec:
    """Put a range into what a graph takes, where the manifest has none."""
    known = ranges.get(spec.name)
    if known is None or spec.classes is not None:
        return spec
    return dataclasses.replace(spec, classes=known.classes, ignore_index=known.ignore_index)


def _read(node: ir.Node) -> tuple[str, ClassRange] | None:
    """The input that a node takes as indices, and their range."""
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    shape, kept = node.inputs[0].shape, None
    if node.op_type in _LOSSES:
        axis, kept = 1, node.attributes.get_int("ignore_index", None)
        labels = _origin(node.inputs[1])
    elif node.op_type in _GATHERS:
        axis = node.attributes.get_int("axis", 0)
        labels, kept = _origin_of_index(node.inputs[1])
    else:
        return None
    if labels is None or not -len(shape) <= axis < len(shape):
        return None
    count = shape[axis]
    return (labels, ClassRange(count, kept)) if isinstance(count, int) else None


def _origin_of_index(value: ir.Value | None) -> tuple[str | None, int | None]:
    """The graph input behind an index, and which of its values is replaced by another index."""
    source = _behind(value)
    node = None if source is None else source.producer()
    if node is None or node.op_type != "Where":
        return _origin(source), None
    condition, *branches = node.inputs
    labels = next(filter(None, map(_origin, branches)), None)
    return labels, None if labels is None else _compared(condition)


def _compared(condition: ir.Value | None) -> int | None:
    """The constant that a condition compares with."""
    node = None if condition is None else condition.producer()
    if node is not None and node.op_type == "Not" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    for value in () if node is None or node.op_type != "Equal" else map(_behind, node.inputs):
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is not None and tensor.size == 1:
            return int(tensor.numpy().item())
    return None


def _origin(value: ir.Value | None) -> str | None:
    """Name the graph input that a value is a rearrangement of, None where it is of none."""
    source = _behind(value)
    return source.name if source is not None and source.is_graph_input() else None


def _behind(value: ir.Value | None) -> ir.Value | None:
    """Look behind what leaves each label as it is."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _REARRANGING:
            break
        value = node.inputs[0]
    return value
