"""How a repair puts nodes in the place of one: names, types and where the results go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.node_names import described

__all__ = [
    "Additions",
    "Replacement",
    "constant_array",
    "is_fixed",
    "known_dtype",
    "known_rank",
]


class Additions:
    """Nodes to be put into a graph, under a name of their own.

    A constant is a Constant node, not an initializer, so that it can't be taken for a parameter.

    Args:
        prefix: What their names, and those of their results, start with.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        like: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output.

        Args:
            op_type: The operator.
            *inputs: Its inputs, None for one left out.
            domain: Its domain.
            like: A value of the result's dtype, if that is known.
            **attributes: Its attributes.

        Returns:
            The output.
        """
        name = f"{self._prefix}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=name)
        result = node.outputs[0]
        result.name = name
        if like is not None:
            result.type = like.type
        self.nodes.append(node)
        return result

    def constant(self, array: np.ndarray) -> ir.Value:
        """Add a Constant.

        Args:
            array: Its value, with its dtype.

        Returns:
            Its output.
        """
        tensor = ir.tensor(array, name=f"{self._prefix}/Constant_{len(self.nodes)}")
        result = self.op("Constant", value=tensor)
        result.dtype, result.shape = tensor.dtype, ir.Shape(array.shape)
        return result

    def int64(self, value: int | Sequence[int]) -> ir.Value:
        """Add a Constant of one or several integers.

        Args:
            value: An integer (no dimensions), or several (one dimension).

        Returns:
            Its output.
        """
        return self.constant(np.array(value, np.int64))

    def scalar(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Add a Constant of one number, without dimensions.

        Args:
            value: The number.
            dtype: Its dtype.

        Returns:
            Its output.
        """
        return self.constant(np.array(value, dtype.numpy()))


class Replacement(Additions):
    """Nodes that stand in for one node of a graph.

    They come just before it, under its name.

    Args:
        node: The node to replace; it must be in a graph.
    """

    def __init__(self, node: ir.Node) -> None:
        super().__init__(node.name or node.outputs[0].name or node.op_type)
        self.node = node

    def finish(self, *results: ir.Value) -> None:
        """Put the nodes in and take the node out; its users read the results, under its names.

        Args:
            *results: One value made here for each of the node's first outputs, or that output if it
                is unused, as the others must be.
        """
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, self.nodes)
        for old, new in zip(self.node.outputs, results, strict=False):
            if new is old:
                continue
            name, kind, shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name = None
            new.name = name
            new.type = kind if kind is not None else new.type
            new.shape = shape if shape is not None else new.shape
        graph.remove(self.node, safe=True)


def known_dtype(value: ir.Value, node: ir.Node) -> ir.DataType:
    """Give a value's dtype, which a repair needs.

    Args:
        value: The value.
        node: The node to repair.

    Returns:
        Its dtype.

    Raises:
        ExportError: If shape inference has not found it.
    """
    if value.dtype is None:
        raise ExportError(
            f"{described(node)} reads {value.name!r} of unknown dtype",
            "it can't be written with other operators without it",
            "Run onnx.shape_inference.infer_shapes on the model first",
        )
    return value.dtype


def known_rank(value: ir.Value, node: ir.Node) -> int:
    """Give a value's number of dimensions, which a repair needs.

    Args:
        value: The value.
        node: The node to repair.

    Returns:
        The number.

    Raises:
        ExportError: If shape inference has not found it.
    """
    if value.shape is None:
        raise ExportError(
            f"{described(node)} reads {value.name!r} of unknown rank",
            "it can't be written with other operators without it",
            "Run onnx.shape_inference.infer_shapes on the model first, or give its inputs shapes",
        )
    return len(value.shape)


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """Give the value of a constant: an initializer, or the output of a Constant node.

    Reshape, Squeeze, Unsqueeze, Identity and Cast of a constant, which exporters put around axes
    and indices, are constants as well.

    Args:
        value: Any value.

    Returns:
        Its value, None where it depends on the graph's inputs (or on other operators).
    """
    if value is None:
        return None
    if value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return None
    inner = constant_array(node.inputs[0]) if node.inputs else None
    if inner is None:
        return None
    if node.op_type == "Identity":
        return inner
    if node.op_type == "Cast":
        return inner.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())
    shape = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Reshape" and shape is not None and 0 not in shape:
        return inner.reshape([int(size) for size in shape])
    if node.op_type == "Unsqueeze" and shape is not None:
        return np.expand_dims(inner, tuple(int(axis) for axis in shape.ravel()))
    if node.op_type == "Squeeze":
        return inner.squeeze(None if shape is None else tuple(int(axis) for axis in shape.ravel()))
    return None


def is_fixed(value: ir.Value) -> bool:
    """Tell whether a value is a constant and no parameter; an initializer may be trained.

    Args:
        value: Any value.

    Returns:
        Whether it comes from Constant nodes alone.
    """
    return constant_array(value) is not None and not _reads_initializer(value)


def _reads_initializer(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return any(_reads_initializer(operand) for operand in node.inputs if operand is not None)
