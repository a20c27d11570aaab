"""The Gram XᵀX in float64, for input whose Gram is too coarse in float32.

On the CPU ONNX Runtime has no Conv and no FusedMatMul in float64, and its optimizer makes a
FusedMatMul of every MatMul of a Transpose. What a Conv with unit kernels copies is exact in
float32, and an Einsum it leaves alone. Image by image: in float64 a batch's patches would fill the
memory.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.row_matrix import cast, row_matrix, unfold
from tract_fx.passes.onnx_graph.writer import NodeWriter


def in_float64(write: NodeWriter, value: ir.Value) -> ir.Value:
    """Widen a float32 value."""
    return _wide(write.op("Cast", [value], "wide", {"to": int(ir.DataType.DOUBLE)}))


def _wide(value: ir.Value) -> ir.Value:
    """Say what no shape inference finds out behind operators of ONNX Runtime's own."""
    value.type = ir.TensorType(ir.DataType.DOUBLE)
    return value


def write_wide_gram(write: NodeWriter, sizes: CallSizes) -> ir.Value:
    """Write XᵀX in float64: (n, n), or (groups, n, n) for a grouped convolution."""
    if not sizes.kernel:
        rows = in_float64(write, row_matrix(write, sizes))
        by = write.noting(gram="Einsum")
        return _wide(by.op("Einsum", [rows, rows], "wide_gram", {"equation": "ri,rj->ij"}))
    groups = [sizes.groups] if sizes.groups > 1 else []
    shape = [*groups, sizes.columns, sizes.columns]
    images = cast(write, sizes.call.input, ir.DataType.FLOAT)
    body = ir.AttrGraph("body", _one_more_image(write.branch("image"), sizes, shape))
    start = write.constant(np.zeros(shape), "no_gram")
    attributes: dict[str, int | ir.Attr] = {"body": body, "num_scan_inputs": 1}
    by = write.noting(gram="Einsum per image, in a Scan")
    return _wide(by.op("Scan", [start, images], "wide_gram", attributes))


def _one_more_image(write: NodeWriter, sizes: CallSizes, shape: list[int]) -> ir.Graph:
    """A graph from the Gram so far, and an image, to the Gram with that image's patches."""
    so_far = ir.val(f"{write.prefix}gram_so_far", ir.DataType.DOUBLE, shape)
    size = [sizes.channels, *sizes.image_size]
    image = ir.val(f"{write.prefix}image", ir.DataType.FLOAT, size)
    batch = write.op("Unsqueeze", [image, write.integers([0], "batch_axis")], "batch_of_one")
    patches = unfold(write, sizes, sizes.kernel, image=batch)
    columns = write.integers([*shape[:-1], -1], "columns_shape")
    wide = in_float64(write, write.op("Reshape", [patches, columns], "columns"))
    equation = "gip,gjp->gij" if sizes.groups > 1 else "ip,jp->ij"
    own = write.op("Einsum", [wide, wide], "image_gram", {"equation": equation})
    total = write.op("Add", [so_far, own], "gram")
    total.shape, total.type = so_far.shape, so_far.type
    return ir.Graph([so_far, image], [total], nodes=list(write.nodes), name="body")
