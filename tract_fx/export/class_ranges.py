"""Which inputs of a graph are class indices, and of how many classes.

ONNX Runtime's cross entropy does not look whether an index is one: with another it reads memory
that is not the batch's, or crashes. So a trainer has to, before the step.
"""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

__all__ = ["class_ranges"]


def class_ranges(model: ir.Model) -> dict[str, tuple[int, int | None]]:
    """Find the inputs that a cross entropy takes as class indices.

    Args:
        model: A graph.

    Returns:
        The number of classes and the ignored index, None where there is none, by input.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for node in model.graph:
        if not is_standard(node, "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"):
            continue
        scores, labels = node.inputs[0], node.inputs[1]
        while labels is not None and not labels.is_graph_input():
            maker = labels.producer()
            if maker is None or not is_standard(maker, "Reshape", "Identity", "Cast", "Squeeze"):
                labels = None
            else:
                labels = maker.inputs[0]
        if labels is None or scores is None or scores.shape is None or len(scores.shape) < 2:
            continue
        classes = scores.shape[1]
        if isinstance(classes, int):
            ignored = node.attributes.get_int("ignore_index")
            found[str(labels.name)] = (classes, ignored)
    return found
