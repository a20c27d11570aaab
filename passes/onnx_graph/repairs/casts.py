"""CastLike, which ONNX Runtime has no gradient for."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, known_dtype

__all__ = ["casts_like"]


def casts_like(model: ir.Model) -> int:
    """Replace each CastLike by a Cast to the dtype of its second input.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.

    Raises:
        ExportError: If that dtype is not known.
    """  # noqa: DOC502 - raised by known_dtype
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "CastLike"):
            continue
        like = node.inputs[1]
        assert like is not None
        new = Replacement(node)
        to = known_dtype(like, node)
        new.finish(new.op("Cast", node.inputs[0], like=like, to=int(to)))
        changed += 1
    return changed
