"""How nodes are put in the place of one: names, types and where the results go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.nodes import Nodes


class Replacement(Nodes):
    """Nodes that stand in for one node of a graph, of one output, under its name.

    A constant is a Constant node, not an initializer, so that it can't be taken for a parameter.
    """

    def __init__(self, node: ir.Node) -> None:
        super().__init__(node.name or node.outputs[0].name or node.op_type)
        self.node = node

    def constant(self, array: np.ndarray) -> ir.Value:
        """Add a Constant."""
        tensor = ir.tensor(array, name=f"{self.prefix}/Constant_{len(self.nodes)}")
        result = self.op("Constant", value=tensor)
        result.dtype, result.shape = tensor.dtype, ir.Shape(array.shape)
        return result

    def int64(self, value: int | Sequence[int]) -> ir.Value:
        """Add a Constant of one or several integers."""
        return self.constant(np.array(value, np.int64))

    def finish(self, result: ir.Value) -> None:
        """Put the nodes in and take the node out; its users read the result, under its name."""
        graph = self.node.graph
        assert graph is not None
        ir.convenience.replace_nodes_and_values(
            graph, self.node, [self.node], self.nodes, self.node.outputs, [result]
        )


def known_type(value: ir.Value, node: ir.Node) -> tuple[ir.DataType, int]:
    """Give a value's dtype and number of dimensions, which its replacement needs."""
    unknown = "rank" if value.shape is None else "dtype"
    if value.shape is None or value.dtype is None:
        raise ExportError(
            f"{described(node)} reads {value.name!r} of unknown {unknown}",
            "it can't be written with other operators without it",
            "Run onnx.shape_inference.infer_shapes on the model first, or give its inputs shapes",
        )
    return value.dtype, len(value.shape)
