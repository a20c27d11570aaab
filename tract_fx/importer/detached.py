"""Values that were detached in PyTorch, as its exporter notes them down."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

_NOTE = "pkg.torch.onnx.fx_node"
_DETACH = ("aten.detach.", "aten.detach_.")


def detached_names(model: ir.Model) -> tuple[str, ...]:
    """Name the values that no gradient goes through.

    torch.onnx.export writes `detach()` as Identity; the operator that it came from is in the
    metadata.
    """
    return tuple(
        str(node.outputs[0].name)
        for node in model.graph
        if is_standard(node, "Identity")
        and any(name in node.metadata_props.get(_NOTE, "") for name in _DETACH)
    )
