"""The rows of X, and patches, in an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.writer import NodeWriter


def row_matrix(write: NodeWriter, sizes: CallSizes, *, grouped: bool = True) -> ir.Value:
    """Write X: (R, n) for a linear layer, for a convolution (groups, R, n), or (R, n) ungrouped."""
    x = cast(write, sizes.call.input, ir.DataType.FLOAT)
    if not sizes.kernel:
        if sizes.call.input_transposed:
            write = write.noting(gram="rows by Transpose")
            return write.op("Transpose", [x], "rows_of_input", {"perm": [1, 0]})
        write = write.noting(gram="rows by Reshape")
        flat = write.integers([-1, sizes.columns], "row_shape")
        return write.op("Reshape", [x, flat], "rows_of_input")
    joined = [*([sizes.groups] if grouped else []), -1, sizes.columns]
    target = write.integers(joined, "row_shape")
    if sizes.is_patchify:
        write = write.noting(gram="patches by Reshape and Transpose")
        x = write.op("Reshape", [x, write.integers(_tiles(sizes), "tile_shape")], "tiles")
        dims = len(sizes.kernel)
        # (N, C, p, k, q, l, …) -> (N, p, q, …, C, k, l, …)
        positions, elements = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
        rows = write.op("Transpose", [x], "patch_rows", {"perm": [0, *positions, 1, *elements]})
        return write.op("Reshape", [rows, target], "rows_of_input")
    split = [0, sizes.groups, sizes.columns, -1]
    columns = write.integers(split, "patch_columns")
    x = write.op("Reshape", [unfold(write, sizes, sizes.kernel), columns], "patch_matrix")
    rows = write.op("Transpose", [x], "patch_rows", {"perm": [1, 0, 3, 2]})
    return write.op("Reshape", [rows, target], "rows_of_input")


def _tiles(sizes: CallSizes) -> list[int]:
    pairs = zip(sizes.image_size, sizes.kernel, strict=True)
    tiled = [entry for size, k in pairs for entry in ((size or 0) // k, k)]
    return [0, sizes.channels, *tiled]


def unfold(
    write: NodeWriter,
    sizes: CallSizes,
    kernel: tuple[int, ...],
    changed: Mapping[str, Sequence[int]] | None = None,
    image: ir.Value | None = None,
) -> ir.Value:
    """Write a Conv that gives every input entry under a kernel a channel of its own.

    `kernel` and the `changed` attributes stand in place of the convolution's own, and a float32
    `image` in place of its input. It gives (N, C · kernel elements, *positions), the channels in
    the weight's order.
    """
    # A convolution of each channel with the unit kernels, under the layer's own attributes, so that
    # whatever they mean they mean the same here.
    elements = math.prod(kernel)
    unit = np.eye(elements, dtype=np.float32).reshape(elements, 1, *kernel)
    kernels = write.constant(np.tile(unit, (sizes.channels, *(1,) * (unit.ndim - 1))), "units")
    node = sizes.call.node
    kept = ("strides", "pads", "dilations", *(() if changed else ("auto_pad",)))
    attributes: dict[str, ir.Attr] = {
        name: node.attributes[name] for name in kept if name in node.attributes
    }
    for name, values in (changed or {}).items():
        attributes[name] = ir.AttrInt64s(name, values)
    attributes["group"] = ir.AttrInt64("group", sizes.channels)
    attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)
    shown = [
        f", {name} {_times(attributes[name].as_ints())}"
        for name in ("strides", "pads", "dilations")
        if name in attributes
    ]
    words = f"patches by Conv with unit kernels {_times(kernel)}{''.join(shown)}"
    x = cast(write, sizes.call.input, ir.DataType.FLOAT) if image is None else image
    return write.noting(gram=words).op("Conv", [x, kernels], "patches", attributes)


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def cast(write: NodeWriter, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Bring a value to another dtype, None for its own, by a Cast where it has not got it yet."""
    current = value.dtype or ir.DataType.FLOAT
    if dtype is None or current == dtype:
        return value
    return write.op("Cast", [value], "cast", {"to": int(dtype)})
