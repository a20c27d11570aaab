"""New nodes, named by where they belong, their operator and their number."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["Nodes"]


class Nodes:
    """Collects new nodes, whose names and values' names begin with a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        like: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node and give its one output, which has the type of `like` if that is known."""
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=name)
        result = node.outputs[0]
        result.name = name
        if like is not None:
            result.type = like.type
        self.nodes.append(node)
        return result
