"""What exporters note down beside the graph."""

from __future__ import annotations

import onnx_ir as ir

# torch.onnx writes stack traces with the user's paths, and names of scopes, under such keys.
EXPORTERS = ("pkg.torch", "pkg.onnxscript", "namespace")


def strip_exporter_metadata(model: ir.Model) -> None:
    """Remove stack traces, scope names and doc strings that an exporter left.

    Other metadata stays, ours among it.
    """
    holders: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [model, model.graph]
    for node in model.graph.all_nodes():
        holders += [node, *node.outputs]
    holders += [*model.graph.inputs, *model.graph.initializers.values()]
    for holder in holders:
        for key in [key for key in holder.metadata_props if key.startswith(EXPORTERS)]:
            del holder.metadata_props[key]
        holder.doc_string = None
