"""InstanceNormalization and GroupNormalization, which onnx can't bring to an older opset."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.importer.replacement import Replacement, known_type
from tract_fx.passes.onnx_graph.calls import is_standard, opset_of

PER_CHANNEL_SINCE = 21  # GroupNormalization's scale and bias: per group before, per channel since


def normalizations_as_primitives(model: ir.Model) -> None:
    """Write InstanceNormalization and GroupNormalization with means.

    The variance is the mean of squared deviations, in two passes, as exact as the operators' own.
    """
    opset = opset_of(model)
    for node in list(model.graph):
        if is_standard(node, "InstanceNormalization"):
            _instance_norm(node)
        elif is_standard(node, "GroupNormalization"):
            _group_norm(node, per_channel=opset >= PER_CHANNEL_SINCE)


def _instance_norm(node: ir.Node) -> None:
    new = Replacement(node)
    x, scale, bias = node.inputs
    assert x is not None and scale is not None and bias is not None
    dtype, rank = known_type(x, node)
    normalized = _normalized(new, x, range(2, rank), dtype)
    shape = new.int64([1, -1, *[1] * (rank - 2)])
    new.finish(_scaled(new, normalized, scale, bias, shape))


def _group_norm(node: ir.Node, per_channel: bool) -> None:
    new = Replacement(node)
    x, scale, bias = node.inputs
    assert x is not None and scale is not None and bias is not None
    dtype, rank = known_type(x, node)
    groups = node.attributes.get_int("num_groups", 1)
    flat = new.op("Reshape", x, new.int64([0, groups, -1]), like=x)
    normalized = _normalized(new, flat, [2], dtype)
    whole = new.op("Shape", x)
    if per_channel:
        normalized = new.op("Reshape", normalized, whole, like=x)
        shape = new.int64([1, -1, *[1] * (rank - 2)])
        new.finish(_scaled(new, normalized, scale, bias, shape))
    else:
        result = _scaled(new, normalized, scale, bias, new.int64([1, -1, 1]))
        new.finish(new.op("Reshape", result, whole, like=x))


def _normalized(
    new: Replacement, x: ir.Value, axes: range | list[int], dtype: ir.DataType
) -> ir.Value:
    """Write (x − mean) / √(var + ε), both over some axes."""
    where = new.int64(list(axes))
    centred = new.op("Sub", x, new.op("ReduceMean", x, where, like=x, keepdims=1), like=x)
    square = new.op("Mul", centred, centred, like=x)
    variance = new.op("ReduceMean", square, where, like=x, keepdims=1)
    number = new.node.attributes.get_float("epsilon", 1e-5)
    epsilon = new.constant(np.array(number, dtype.numpy()))
    deviation = new.op("Sqrt", new.op("Add", variance, epsilon, like=x), like=x)
    return new.op("Div", centred, deviation, like=x)


def _scaled(
    new: Replacement, x: ir.Value, scale: ir.Value, bias: ir.Value, shape: ir.Value
) -> ir.Value:
    """Write x · scale + bias, both vectors reshaped."""
    factor = new.op("Reshape", scale, shape, like=scale)
    offset = new.op("Reshape", bias, shape, like=bias)
    return new.op("Add", new.op("Mul", x, factor, like=x), offset, like=x)
