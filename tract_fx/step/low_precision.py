"""A step whose large products run in half precision; everything else stays float32."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from tract_fx.passes.onnx_graph.provenance import PREFIX

PRECISIONS = ("float16", "bfloat16")
"""By their names in PyTorch."""

_MATRICES = frozenset({"Gemm", "MatMul"})
# Convolutions of bfloat16 come with opset 22, for which providers lack kernels of other operators.
_PRODUCTS = {
    "float16": (ir.DataType.FLOAT16, _MATRICES | {"Conv", "ConvTranspose"}),
    "bfloat16": (ir.DataType.BFLOAT16, _MATRICES),
}
_LOWERED, _ROUNDED, _RAISED = "/lowered", "/rounded", "/raised"


def lower_products(model: ir.Model, precision: str) -> None:
    """Round what products read and give, in place: Gemm and MatMul, in float16 convolutions.

    Parameters, their gradients, sums, norms, losses, TrAct and the update stay float32.
    """
    graph = model.graph
    dtype, products = _PRODUCTS[precision]
    lowered: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if _is_large(node, products)]:
        for place, value in enumerate(node.inputs):
            if value is None:
                continue
            producer = value.producer()
            if producer is not None and str(producer.name).endswith(_RAISED):
                lowered[value] = producer.inputs[0]  # type: ignore[assignment]
            if value not in lowered:
                cast = _cast(value, dtype, _LOWERED)
                lowered[value] = cast.outputs[0]
                graph.insert_before(node, cast)
            node.replace_input_with(place, lowered[value])
        result = node.outputs[0]
        cast = _cast(result, ir.DataType.FLOAT, _RAISED)
        result.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, result)
        graph.insert_after(node, cast)
        cast.outputs[0].name, result.name = result.name, f"{result.name}{_ROUNDED}"
        result.type = ir.TensorType(dtype)
    graph.sort()


def raise_products(model: ir.Model) -> None:
    """Take those roundings out again, in place."""
    graph = model.graph
    for node in list(graph):
        name = str(node.name)
        if node.op_type == "Cast" and name.endswith((_LOWERED, _RAISED)):
            (value,) = node.inputs
            assert value is not None
            result = node.outputs[0]
            result.replace_all_uses_with(value, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            if name.endswith(_RAISED):
                value.name, value.type = result.name, result.type


def _is_large(node: ir.Node, products: Collection[str]) -> bool:
    """Whether it is a product of float32 that is no part of TrAct's."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return (
        node.op_type in products
        and node.domain == ""
        and not str(node.name).startswith(PREFIX)
        and all(value.dtype in (ir.DataType.FLOAT, None) for value in values)
    )


def _cast(value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}{suffix}")
    cast.outputs[0].name, cast.outputs[0].shape = f"{value.name}{suffix}", value.shape
    cast.outputs[0].type = ir.TensorType(dtype)
    return cast
