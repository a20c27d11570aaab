"""Graphs, cut back to what some of their values need."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tract_fx.passes.onnx_graph.values import operands


def cut(graph: ir.Graph, outputs: Sequence[ir.Value]) -> None:
    """Leave in a graph what some values need: ONNX Runtime computes the rest too, read or not."""
    graph.outputs[:] = outputs
    needed: set[ir.Node] = set()
    read, pending = set(outputs), list(outputs)
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in needed:
            needed.add(node)
            given = {*operands(node), *(value for value in node.inputs if value is not None)}
            new = [value for value in given if value not in read]
            read.update(new)
            pending += new
    graph.remove([node for node in graph if node not in needed])
    graph.inputs[:] = [value for value in graph.inputs if value in read]
