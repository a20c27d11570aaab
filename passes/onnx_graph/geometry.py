"""The patch geometry of an ONNX convolution."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.preconditioner import PatchGeometry


def conv_geometry(node: ir.Node, x: ir.Value, weight: ir.Value) -> PatchGeometry | None:
    """Read off a Conv node how it reads its input.

    None where that is not known before running: `auto_pad` of a strided convolution depends on the
    size of its input.
    """
    kernel = tuple(node.attributes.get_ints("kernel_shape") or (static_shape(weight) or ())[2:])
    if not kernel:
        return None
    dims, ones = len(kernel), (1,) * len(kernel)
    stride = tuple(node.attributes.get_ints("strides") or ones)
    dilation = tuple(node.attributes.get_ints("dilations") or ones)
    groups = node.attributes.get_int("group", 1)
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    padding: list[tuple[int, int]]
    if auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
        sizes = spatial_sizes(x, dims)
        padding = []
        for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
            sides = same_padding(auto_pad, size, d * (k - 1) + 1, s)
            if sides is None:
                return None
            padding.append(sides)
    elif auto_pad == "VALID":
        padding = [(0, 0)] * dims
    else:
        flat = tuple(node.attributes.get_ints("pads") or (0,) * (2 * dims))
        padding = list(zip(flat[:dims], flat[dims:], strict=True))
    return PatchGeometry(kernel, stride, tuple(padding), dilation, groups)


def spatial_sizes(x: ir.Value, dims: int) -> tuple[int | None, ...]:
    """Give an image's sizes behind the channels, None for each that is open until it runs."""
    if x.shape is None or len(x.shape) != dims + 2:
        return (None,) * dims
    return tuple(size if isinstance(size, int) else None for size in x.shape[2:])


def same_padding(
    auto_pad: str, size: int | None, extent: int, stride: int
) -> tuple[int, int] | None:
    """Compute the padding that makes ⌈size / stride⌉ outputs of patches along one axis."""
    if stride == 1:
        total = extent - 1
    elif size is None:
        return None
    else:
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if auto_pad == "SAME_UPPER" else (more, less)
