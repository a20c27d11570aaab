"""The record of one layer call of an ONNX graph: its name, weight and geometry."""

from __future__ import annotations

import ast

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall
from tract_fx.passes.onnx_graph.geometry import conv_geometry
from tract_fx.passes.onnx_graph.values import Content, static_shape
from tract_fx.passes.records import InputLayer, layer_name
from tract_fx.preconditioner import PatchGeometry, op_name


def layer_record(
    call: OnnxCall, name: str, weight: Content, path: tuple[str, ...], lambda_: float | None
) -> InputLayer:
    """Describe a call that can be treated, its weight's shape as torch has it: (out, in, …)."""
    shape = static_shape(call.weight)
    parameters = weight.trainable or weight.parameters
    geometry: PatchGeometry | None = PatchGeometry()
    dims: int | None = 0
    if call.layout is Layout.CONVOLUTION:
        geometry = conv_geometry(call.node, call.input, call.weight)
        dims = _convolution_dims(shape, geometry)
    elif call.layout is Layout.IN_OUT and shape is not None:
        shape = shape[::-1]
    module = _layer_module(call.node, parameters)
    return InputLayer(
        name=module or layer_name(name, parameters),
        node=name,
        op=op_name(dims),
        weight=parameters,
        weight_shape=shape,
        geometry=geometry,
        path=path,
        frozen=not weight.trainable,
        lambda_=lambda_,
        module=module,
    )


def _convolution_dims(shape: tuple[int, ...] | None, geometry: PatchGeometry | None) -> int | None:
    if shape is not None:
        return len(shape) - 2
    return None if geometry is None else len(geometry.kernel)


def module_of(node: ir.Node) -> tuple[str, str] | None:
    """Tell the torch module in whose forward a node lies, as torch's exporter records it."""
    try:
        paths = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        classes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.class_hierarchy", ""))
        return str(paths[-2]), str(classes[-2])
    except (SyntaxError, ValueError, TypeError, IndexError):
        return None


def _layer_module(node: ir.Node, weight: tuple[str, ...]) -> str | None:
    """Path of the torch layer whose own forward a call is, where the exporter has recorded it."""
    module = module_of(node)
    if module is None or not module[0]:
        return None
    path, kind = module
    own = (f"{path}.weight", f"{path}.parametrizations.weight.")
    is_layer = kind.startswith(("torch.nn.modules.linear.", "torch.nn.modules.conv."))
    return path if is_layer or any(name.startswith(own) for name in weight) else None
