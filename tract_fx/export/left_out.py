"""Outputs that an exported model does without, and the nodes that nothing needs then."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import onnx_ir as ir

from tract_fx.errors import TractWarning


def remove_unused(model: ir.Model) -> None:
    """Remove nodes whose outputs nothing reads, in place.

    `onnx_ir.passes.common.RemoveUnusedNodesPass` takes initializers along, which stay in the
    state_dict, and outputs of the nodes that are left.
    """
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)


def warn_of_left_out(reasons: Mapping[str, str]) -> None:
    """Warn of outputs that an exported model does without."""
    for name, why in reasons.items():
        warnings.warn(
            f"the output {name!r}, which the loss does not read, is left out: {why}. Training is "
            "not touched, and predict() gives the other outputs.",
            TractWarning,
            stacklevel=2,
        )
