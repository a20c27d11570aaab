"""Powers with a computed exponent, to which ONNX Runtime gives no gradient."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, constant_array, known_dtype

__all__ = ["powers_of_constants"]


def powers_of_constants(model: ir.Model) -> int:
    """Write aˣ with a constant a > 0 and a computed x as Exp(x · ln a).

    ONNX Runtime leaves the exponent without a gradient, without a word.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "Pow") or constant_array(node.inputs[1]) is not None:
            continue
        base, exponent = constant_array(node.inputs[0]), node.inputs[1]
        if base is None or exponent is None or not bool(np.all(base > 0)):
            continue
        new = Replacement(node)
        dtype = known_dtype(exponent, node).numpy()
        logarithm = new.constant(np.log(base.astype(np.float64)).astype(dtype))
        new.finish(new.op("Exp", new.op("Mul", exponent, logarithm, like=exponent), like=exponent))
        changed += 1
    return changed
