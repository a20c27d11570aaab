"""Names of nodes: what one without any is called, and how a message speaks of it."""

from __future__ import annotations

import re

import onnx_ir as ir

_INFERRED = re.compile(r"\bunk__\d+\b")  # onnx's names for sizes that it can't infer


def made_up_name(node: ir.Node) -> str:
    """Make a name for a node that has none."""
    return f"{node.op_type}_{node.outputs[0].name or ''}"


def name_in_file(node: ir.Node) -> str:
    """Give the name by which a node is found in the file that it came from."""
    own = node.name or ""
    if own and not re.fullmatch(rf"{re.escape(made_up_name(node))}(_\d+)?", own):
        return own
    return node.outputs[0].name or own


def described(node: ir.Node) -> str:
    """Speak of a node in a message."""
    name, found_by = node.name or "", name_in_file(node)
    output = "" if name == found_by else f" (output {found_by!r})"
    return node.op_type + f" {name!r}" * bool(name) + output


def described_shape(shape: ir.Shape | None) -> str:
    """Speak of a shape in a message, with `?` for the sizes that nobody has named."""
    return _INFERRED.sub("?", str(shape))


def named_nodes(model: ir.Model) -> int:
    """Give each node a name of its own.

    ONNX Runtime names the backward of node F `{F.name}_Grad/…`: two nodes of one name would define
    the same values twice. The first node of a name keeps it.
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
