"""Names of nodes, from which ONNX Runtime makes the names in the backward graph."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.node_names import made_up_name

__all__ = ["named_nodes"]


def named_nodes(model: ir.Model) -> int:
    """Give each node a name of its own.

    ONNX Runtime names the backward of node F `{F.name}_Grad/…`: two nodes of one name would define
    the same values twice. The first node of a name keeps it.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes named anew.
    """
    wanted = [node.name for node in model.graph.all_nodes() if node.name]
    taken: set[str] = set()
    changed = 0
    for node in model.graph.all_nodes():
        if node.name and node.name not in taken:
            taken.add(node.name)
            continue
        stem = node.name or made_up_name(node)
        name, number = stem, 0
        reserved = taken.union(wanted)
        while name in reserved:
            number += 1
            name = f"{stem}_{number}"
        node.name = name
        taken.add(name)
        changed += 1
    return changed
