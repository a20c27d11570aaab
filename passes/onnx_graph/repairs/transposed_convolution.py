"""ConvTranspose, whose gradient ONNX Runtime has for CUDA alone."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement

__all__ = ["transposed_convolutions_as_convolutions"]


def transposed_convolutions_as_convolutions(model: ir.Model) -> int:
    """Write ConvTranspose as a Conv over the input with zeros between its entries.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced. Those of unknown sizes, with `auto_pad` or `output_shape`
        stay.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "ConvTranspose"):
            continue
        x, weight = node.inputs[0], node.inputs[1]
        attributes = node.attributes
        if (
            attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
            or "output_shape" in attributes
            or x is None
            or weight is None
            or not _is_static(x, 1)
            or not _is_static(weight, 0)
        ):
            continue
        _write(node, x, weight)
        changed += 1
    return changed


def _is_static(value: ir.Value, first: int) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape[first:])


def _sizes(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [size if isinstance(size, int) else 0 for size in value.shape]


def _write(node: ir.Node, x: ir.Value, weight: ir.Value) -> None:
    new = Replacement(node)
    attributes = node.attributes
    _, channels, *spatial = _sizes(x)
    _, per_group, *kernel = _sizes(weight)
    rank = len(spatial)
    groups = attributes.get_int("group", 1)
    strides = list(attributes.get_ints("strides") or [1] * rank)
    dilations = list(attributes.get_ints("dilations") or [1] * rank)
    pads = list(attributes.get_ints("pads") or [0] * (2 * rank))
    added = list(attributes.get_ints("output_padding") or [0] * rank)
    spread = x
    if any(stride > 1 for stride in strides):
        # (N, C, H, W) → (N, C, H, 1, W, 1) → (N, C, H, s, W, s) → (N, C, H·s, W·s)
        apart = [n for size in spatial for n in (size, 1)]
        spread = new.op("Reshape", x, new.int64([0, channels, *apart]), like=x)
        after = [n for stride in strides for n in (0, stride - 1)]
        zeros = new.int64([*[0] * (2 + 2 * rank), 0, 0, *after])
        spread = new.op("Pad", spread, zeros, like=x)
        joined = [size * stride for size, stride in zip(spatial, strides, strict=True)]
        spread = new.op("Reshape", spread, new.int64([0, channels, *joined]), like=x)
    reach = [(size - 1) * step for size, step in zip(kernel, dilations, strict=True)]
    begin = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
    # The zeros after the last entry are part of what `spread` ends with.
    end = [
        r - p + o - (s - 1) for r, p, o, s in zip(reach, pads[rank:], added, strides, strict=True)
    ]
    spread = new.op("Pad", spread, new.int64([0, 0, *begin, 0, 0, *end]), like=x)
    bias = [value for value in node.inputs[2:] if value is not None]
    turned = _turned(new, weight, groups, channels, per_group, kernel)
    result = new.op(
        "Conv",
        spread,
        turned,
        *bias,
        like=x,
        kernel_shape=kernel,
        dilations=dilations,
        strides=[1] * rank,
        pads=[0] * (2 * rank),
        group=groups,
    )
    new.finish(result)


def _turned(
    new: Replacement,
    weight: ir.Value,
    groups: int,
    channels: int,
    per_group: int,
    kernel: list[int],
) -> ir.Value:
    """From (C, out/groups, *kernel) to (out, C/groups, *kernel), with each kernel reversed."""
    rank = len(kernel)
    apart = new.int64([groups, channels // groups, per_group, *kernel])
    turned = new.op("Reshape", weight, apart, like=weight)
    perm = [0, 2, 1, *range(3, 3 + rank)]
    turned = new.op("Transpose", turned, like=weight, perm=perm)
    shape = new.int64([groups * per_group, channels // groups, *kernel])
    turned = new.op("Reshape", turned, shape, like=weight)
    for axis, size in enumerate(kernel, 2):
        if size > 1:
            order = new.int64(list(range(size))[::-1])
            turned = new.op("Gather", turned, order, like=weight, axis=axis)
    return turned
