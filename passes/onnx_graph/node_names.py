"""Names of nodes: what one without any is called, and how a message speaks of it."""

from __future__ import annotations

import re

import onnx_ir as ir

__all__ = ["described", "described_shape", "made_up_name", "name_in_file"]

_INFERRED = re.compile(r"\bunk__\d+\b")  # onnx's names for sizes that it can't infer


def made_up_name(node: ir.Node) -> str:
    """Make a name for a node that has none.

    Args:
        node: The node.

    Returns:
        Its operator with its first output's name.
    """
    return f"{node.op_type}_{node.outputs[0].name or ''}"


def name_in_file(node: ir.Node) -> str:
    """Give the name by which a node is found in the file that it came from.

    Args:
        node: The node.

    Returns:
        Its own name, or that of its first output where the file gives none.
    """
    own = node.name or ""
    if own and not re.fullmatch(rf"{re.escape(made_up_name(node))}(_\d+)?", own):
        return own
    return node.outputs[0].name or own


def described(node: ir.Node) -> str:
    """Speak of a node in a message.

    Args:
        node: The node.

    Returns:
        Its operator and its name; where the file has none, with the output by which it is found.
    """
    name, found_by = node.name or "", name_in_file(node)
    output = "" if name == found_by else f" (output {found_by!r})"
    return node.op_type + f" {name!r}" * bool(name) + output


def described_shape(shape: ir.Shape | None) -> str:
    """Speak of a shape in a message, with `?` for the sizes that nobody has named.

    Args:
        shape: The shape.

    Returns:
        The sizes, in brackets.
    """
    return _INFERRED.sub("?", str(shape))
