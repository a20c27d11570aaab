"""Which inputs of a graph are class indices, and how many classes there are.

ONNX Runtime's SoftmaxCrossEntropyLoss does not check its labels: with one that is out of range it
reads other memory, and the loss and the gradients are made of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from tract_fx.export.manifest import TensorSpec

__all__ = ["ClassRange", "class_ranges", "with_range"]

_LOSSES = frozenset({"SoftmaxCrossEntropyLoss", "SoftmaxCrossEntropyLossInternal"})
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
    """Find a graph's inputs that are class indices of a softmax cross entropy.

    Args:
        model: The serialised evaluation model.

    Returns:
        The ranges by input name. An input whose number of classes is not known before running is
        not in it.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(model))
    found: dict[str, ClassRange] = {}
    for node in ir.from_proto(proto).graph:
        if node.op_type not in _LOSSES:
            continue
        scores, labels = node.inputs[0], _origin(node.inputs[1])
        if scores is None or scores.shape is None or labels is None or len(scores.shape) < 2:
            continue
        classes, ignored = scores.shape[1], node.attributes.get("ignore_index")
        if not isinstance(classes, int):
            continue
        new = ClassRange(classes, None if ignored is None else ignored.as_int())
        old = found.setdefault(labels, new)
        if old != new:  # two losses of the same labels: what both take
            same = old.ignore_index == new.ignore_index
            found[labels] = ClassRange(
                min(old.classes, new.classes), new.ignore_index if same else None
            )
    return found


def with_range(spec: TensorSpec, ranges: Mapping[str, ClassRange]) -> TensorSpec:
    """Put a range into what a graph takes, where the manifest has none.

    Args:
        spec: What the graph takes.
        ranges: Of `class_ranges`.

    Returns:
        The spec.
    """
    known = ranges.get(spec.name)
    if known is None or spec.classes is not None:
        return spec
    return dataclasses.replace(spec, classes=known.classes, ignore_index=known.ignore_index)


def _origin(value: ir.Value | None) -> str | None:
    """Name the graph input that a value is a rearrangement of, None where it is of none."""
    while value is not None:
        producer = value.producer()
        if producer is None:
            return value.name if value.is_graph_input() else None
        if producer.op_type not in _REARRANGING:
            return None
        value = producer.inputs[0]
    return None
