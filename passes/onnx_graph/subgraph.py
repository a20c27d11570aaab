"""The TrAct subgraph: from a call's weight gradient gW to gW (XᵀX/R + λI)⁻¹.

Two forms of one definition (arXiv 2410.23970, section 3):

- by columns, for R ≥ n: the n × n matrix XᵀX/R + λI is inverted and multiplied to gW;
- by rows, for R < n: gW (XᵀX/R + λI)⁻¹ = dzᵀ (XXᵀ/R + λI)⁻¹ X, with dz the gradient of the
  pre-activations. The R × R matrix is better conditioned there: XᵀX has n - R zero eigenvalues.

Which form runs is decided here where the number of rows is known, else by an If at run time.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.calls import Layout
from tract_fx.passes.onnx_graph.gram import write_gram
from tract_fx.passes.onnx_graph.gram_forms import choose_gram_form
from tract_fx.passes.onnx_graph.row_matrix import cast, row_matrix
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.passes.onnx_graph.weight_gradient import WeightGradient
from tract_fx.passes.onnx_graph.writer import NodeWriter

__all__ = ["write_tract"]


def write_tract(
    write: NodeWriter, gradient: WeightGradient, weight_shape: tuple[int, ...], lambda_: ir.Value
) -> ir.Value:
    """Write the nodes that make TrAct's gradient of a call's gradient.

    Args:
        write: Where the nodes go.
        gradient: What the call contributes to its weight's gradient.
        weight_shape: Shape of the weight as the call reads it.
        lambda_: λ, a float32 scalar.

    Returns:
        The preconditioned term, of the shape and dtype of the plain one.
    """
    sizes = CallSizes.of(gradient.call, weight_shape)
    rows = _known_rows(gradient, sizes)
    if rows is None:
        result = _either_form(write, sizes, gradient, lambda_)
    else:
        form = _by_columns if rows >= sizes.columns else _by_rows
        count = write.constant(np.asarray(max(rows, 1), np.float32), "rows")
        result = form(write, sizes, gradient, lambda_, count)
    return cast(write, result, gradient.term.dtype)


def _known_rows(gradient: WeightGradient, sizes: CallSizes) -> int | None:
    for value in (gradient.output_gradient, gradient.call.output):
        shape = static_shape(value)
        if shape is not None:
            return math.prod(shape) // sizes.outputs
    return None


def _either_form(
    write: NodeWriter, sizes: CallSizes, gradient: WeightGradient, lambda_: ir.Value
) -> ir.Value:
    """Both forms, and an If between them."""
    shape = write.op("Shape", [gradient.output_gradient], "output_shape")
    size = write.op("ReduceProd", [shape], "size", {"keepdims": 0})
    outputs = write.constant(np.asarray(sizes.outputs, np.int64), "outputs")
    rows = write.op("Div", [size, outputs], "row_count")
    count = write.op("Cast", [rows], "rows", {"to": int(ir.DataType.FLOAT)})
    columns = write.constant(np.asarray(sizes.columns, np.int64), "columns")
    branches = {}
    for name, form in (("then_branch", _by_rows), ("else_branch", _by_columns)):
        inner = write.branch("by_rows" if form is _by_rows else "by_columns")
        output = form(inner, sizes, gradient, lambda_, count)
        output.shape, output.type = ir.Shape(sizes.weight_shape), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([], [output], nodes=list(inner.nodes), name=name)
        branches[name] = ir.AttrGraph(name, graph)
    fewer = write.op("Less", [rows, columns], "fewer_rows_than_columns")
    return write.op("If", [fewer], "by_rows_or_columns", branches)


def _by_columns(
    write: NodeWriter,
    sizes: CallSizes,
    gradient: WeightGradient,
    lambda_: ir.Value,
    count: ir.Value,
) -> ir.Value:
    """gW (XᵀX/R + λI)⁻¹ by the n × n matrix."""
    index = np.arange(sizes.columns, dtype=np.int64)
    diagonal = write.op(
        "Equal",
        [write.constant(index[:, None], "row_index"), write.constant(index[None], "column_index")],
        "diagonal",
    )
    inverse = _regularised_inverse(
        write, write_gram(write, sizes, choose_gram_form(sizes)), count, diagonal, lambda_
    )
    term = cast(write, gradient.term, ir.DataType.FLOAT)
    if sizes.call.layout is Layout.IN_OUT:
        return write.op("MatMul", [inverse, term], "gradient")
    if not sizes.kernel:
        return write.op("MatMul", [term, inverse], "gradient")
    shape = [sizes.outputs // sizes.groups, sizes.columns]
    if sizes.groups > 1:
        shape.insert(0, sizes.groups)
    term = write.op("Reshape", [term, write.integers(shape, "matrix_shape")], "plain_matrix")
    product = write.op("MatMul", [term, inverse], "product")
    target = write.integers(sizes.weight_shape, "weight_shape")
    return write.op("Reshape", [product, target], "gradient")


def _by_rows(
    write: NodeWriter,
    sizes: CallSizes,
    gradient: WeightGradient,
    lambda_: ir.Value,
    count: ir.Value,
) -> ir.Value:
    """Compute dzᵀ (XXᵀ/R + λI)⁻¹ X by the R × R matrix; (groups, …) before all three."""
    x = row_matrix(write, sizes)
    dz = cast(write, gradient.output_gradient, ir.DataType.FLOAT)
    if sizes.kernel:
        split = [0, sizes.groups, sizes.outputs // sizes.groups, -1]
        dz = write.op("Reshape", [dz, write.integers(split, "output_split")], "output_gradient")
        dz = write.op("Transpose", [dz], "output_gradient_by_row", {"perm": [1, 2, 0, 3]})
        joined = [sizes.groups, sizes.outputs // sizes.groups, -1]
        dz = write.op("Reshape", [dz, write.integers(joined, "output_rows")], "dz_transposed")
    else:
        flat = write.integers([-1, sizes.outputs], "output_shape")
        dz = write.op("Reshape", [dz, flat], "output_gradient")
        dz = write.op("Transpose", [dz], "dz_transposed", {"perm": [1, 0]})
    kernel = write.microsoft("FusedMatMul", [x, x], "row_gram", {"transB": 1})
    inverse = _regularised_inverse(write, kernel, count, _row_diagonal(write, kernel), lambda_)
    product = write.op("MatMul", [write.op("MatMul", [dz, inverse], "solved"), x], "product")
    alpha = sizes.call.node.attributes.get_float("alpha", 1.0) if not sizes.kernel else 1.0
    if alpha != 1.0:
        scale = write.constant(np.asarray(alpha, np.float32), "alpha")
        product = write.op("Mul", [product, scale], "scaled")
    if sizes.call.layout is Layout.IN_OUT:
        return write.op("Transpose", [product], "gradient", {"perm": [1, 0]})
    target = write.integers(sizes.weight_shape, "weight_shape")
    return write.op("Reshape", [product, target], "gradient")


def _row_diagonal(write: NodeWriter, square: ir.Value) -> ir.Value:
    """Where a matrix of a size known at run time has its diagonal."""
    shape = write.op("Shape", [square], "row_gram_shape")
    last = [write.integers([-1], "last_axis"), write.integers([2**31], "end_of_axes")]
    size = write.op("Slice", [shape, *last], "side")
    zero = write.constant(np.asarray(0, np.int64), "first_row")
    one = write.constant(np.asarray(1, np.int64), "row_step")
    end = write.op("Squeeze", [size], "side_length")
    index = write.op("Range", [zero, end, one], "row_numbers")
    column = write.op("Unsqueeze", [index, write.integers([1], "axis")], "row_index")
    return write.op("Equal", [column, index], "diagonal")


def _regularised_inverse(
    write: NodeWriter, gram: ir.Value, count: ir.Value, diagonal: ir.Value, lambda_: ir.Value
) -> ir.Value:
    """(gram/R + λI)⁻¹; all NaN for a matrix that holds an infinity."""
    mean = write.op("Div", [gram, count], "mean_gram")
    zero = write.constant(np.asarray(0, np.float32), "zero")
    ridge = write.op("Where", [diagonal, lambda_, zero], "ridge")
    matrix = write.op("Add", [mean, ridge], "regularised")
    inverse = write.microsoft("Inverse", [matrix], "unguarded_inverse")
    # The factorisation takes 1/∞ for 0, and gives a finite inverse of some matrices with ∞.
    axes = write.integers([-2, -1], "matrix_axes")
    total = write.op("ReduceSum", [matrix, axes], "sum_of_entries", {"keepdims": 1})
    poison = write.op("Sub", [total, total], "zero_or_nan")
    return write.op("Add", [inverse, poison], "inverse")
