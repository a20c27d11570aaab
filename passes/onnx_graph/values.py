"""What the value of an ONNX graph is made of: the model's input, parameters, features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard

FLOATING = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.BFLOAT16,
)
"""The dtypes that ONNX Runtime builds gradients for."""

_VALUELESS = ("Shape", "Size", "EyeLike", "RandomNormalLike", "RandomUniformLike")
_SHAPE_KEEPING = ("Identity", "Cast", "Neg", "Abs", "Exp", "Sqrt", "Tanh", "Sigmoid", "Dropout")
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "CastLike", "Clip")


@dataclass(frozen=True)
class Content:
    """What a value is made of.

    Attributes:
        path: Names from a graph input over the nodes to here, while no trainable parameter has met
            it; empty where the value has nothing of the raw input.
        parameters: Names of the parameters in it.
        trainable: Names of those among them that are trained.
        from_layers: Whether it holds features: outputs of operations that have parameters.
        quantised: Whether integers that stand for real numbers are in it, and no input.
    """

    path: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    from_layers: bool = False
    quantised: bool = False

    @staticmethod
    def join(contents: Iterable[Content]) -> Content:
        """Combine the operands of an operation that has no parameters of its own."""
        contents = list(contents)
        return Content(
            path=next((c.path for c in contents if c.path), ()),
            parameters=tuple(dict.fromkeys(p for c in contents for p in c.parameters)),
            trainable=tuple(dict.fromkeys(p for c in contents for p in c.trainable)),
            from_layers=any(c.from_layers for c in contents),
            quantised=any(c.quantised for c in contents),
        )


FEATURES = Content(from_layers=True)
"""Outputs of operations that have parameters, whatever these have met since."""


def carries_no_values(node: ir.Node) -> bool:
    """Tell operators that read a tensor's shape, but not its entries."""
    return is_standard(node, *_VALUELESS)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Give the graphs that a control flow operator runs."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """Give the values that a node computes with, also inside the graphs that it runs."""
    inputs = node.inputs[:1] if is_standard(node, "CastLike") else node.inputs
    yield from (value for value in inputs if value is not None)
    for graph in subgraphs(node):
        inside = set(graph.inputs)
        for inner in graph:
            yield from (value for value in operands(inner) if value not in inside)
            inside.update(inner.outputs)
        yield from (value for value in graph.outputs if value not in inside)


def ancestors(output: ir.Value) -> set[ir.Node]:
    """Give all nodes that a value is computed by."""
    found: set[ir.Node] = set()
    open_values = [output]
    while open_values:
        node = open_values.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            open_values.extend(operands(node))
    return found


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Give the shape of a value, where the graph tells it.

    Looks through the operators that usually stand between a parameter and the layer: a training
    graph has no shapes for the values that its builder made.
    """
    shape = value.shape
    if shape is not None:
        dims = [d for d in shape if isinstance(d, int)]
        return tuple(dims) if len(dims) == len(shape) else None
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None or value.index() != 0:
        return None
    if is_standard(node, "Transpose"):
        inner = static_shape(node.inputs[0])
        if inner is None:
            return None
        order = node.attributes.get_ints("perm") or tuple(reversed(range(len(inner))))
        return tuple(inner[axis] for axis in order)
    if is_standard(node, *_SHAPE_KEEPING):
        return static_shape(node.inputs[0])
    if is_standard(node, *_BROADCASTING):
        return _broadcast([static_shape(v) for v in node.inputs if v is not None])
    return None


def _broadcast(shapes: list[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    rank = max(map(len, known))
    padded = [(1,) * (rank - len(shape)) + shape for shape in known]
    return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*padded, strict=True))


def is_number(value: ir.Value) -> bool:
    """Tell a tensor of one entry."""
    shape = static_shape(value)
    return shape is not None and all(size == 1 for size in shape)


def node_names(graph: ir.Graph) -> dict[ir.Node, str]:
    """Name the nodes of a graph: ONNX neither asks for names nor that they differ."""
    counts = Counter(node.name for node in graph)
    return {
        node: node.name if node.name and counts[node.name] == 1 else _output_name(node)
        for node in graph
    }


def _output_name(node: ir.Node) -> str:
    return next((value.name for value in node.outputs if value.name), node.op_type)
