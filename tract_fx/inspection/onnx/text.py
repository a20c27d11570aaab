"""An ONNX graph as text: a line per constant and node, with the names that the file has."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_MOST_ENTRIES = 8


def graph_text(model: ir.Model) -> str:
    """Write a graph down.

    Args:
        model: The graph.

    Returns:
        Lines such as `y = Conv(x, w, b)  {strides: [2, 2]}`; a branch's nodes are indented below
        the node that runs them.
    """
    constants = [_constant(name, value) for name, value in model.graph.initializers.items()]
    returned = ", ".join(str(value.name) for value in model.graph.outputs)
    return "\n".join([*constants, *_lines(model.graph, ""), f"return {returned}"])


def _constant(name: str, value: ir.Value) -> str:
    shape = "?" if value.shape is None else "×".join(map(str, value.shape)) or "scalar"
    line = f"{name} = {_dtype(value)} {shape}"
    tensor = value.const_value
    if tensor is None or tensor.size > _MOST_ENTRIES:
        return line
    return f"{line} {tensor.numpy().tolist()}"


def _dtype(value: ir.Value) -> str:
    return "?" if value.dtype is None else str(value.dtype).lower()


def _lines(graph: ir.Graph, indent: str) -> Iterator[str]:
    for node in graph:
        outputs = ", ".join(value.name or "_" for value in node.outputs)
        inputs = ", ".join("_" if value is None else str(value.name) for value in node.inputs)
        plain, branches = [], []
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.GRAPH:
                branches.append((name, attribute.as_graph()))
            else:
                plain.append(f"{name}: {_attribute(attribute)}")
        shown = f"  {{{', '.join(plain)}}}" if plain else ""
        yield f"{indent}{outputs} = {node.op_type}({inputs}){shown}"
        for name, branch in branches:
            yield f"{indent}  {name}:"
            yield from _lines(branch, indent + "    ")
            yield f"{indent}    return {', '.join(str(value.name) for value in branch.outputs)}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.size <= _MOST_ENTRIES:
            return str(tensor.numpy().tolist())
        return f"{str(tensor.dtype).lower()} {'×'.join(map(str, tensor.shape))}"
    value = attribute.value
    return str(list(value)) if isinstance(value, tuple) else str(value)
