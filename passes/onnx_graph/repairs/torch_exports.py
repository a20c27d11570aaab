"""What torch.onnx.export does not write into the graph and notes beside it."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

__all__ = ["FX_NODE", "training_batch_norms"]

FX_NODE = "pkg.torch.onnx.fx_node"
"""Key of a node's metadata that holds the operator that it came from."""

TRAINING = "_native_batch_norm_legit_functional"


def training_batch_norms(model: ir.Model) -> set[str]:
    """Name the BatchNormalization nodes that were in training mode when torch exported them.

    torch writes `training_mode=0` for each; the operator that it came from is in the metadata,
    so this must be asked before `strip_exporter_metadata`.

    Args:
        model: The model.

    Returns:
        Names of nodes, for `train_batch_norm`.
    """
    return {
        node.name
        for node in model.graph
        if is_standard(node, "BatchNormalization")
        and node.name
        and TRAINING in node.metadata_props.get(FX_NODE, "")
    }
