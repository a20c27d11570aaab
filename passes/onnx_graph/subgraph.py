"""The TrAct subgraph: from a call's weight gradient gW to gW (XᵀX/R + λI)⁻¹.

Two forms of one definition (arXiv 2410.23970, section 3):

- by columns, for R ≥ n: the n × n matrix XᵀX/R + λI is inverted and multiplied to gW;
- by rows, for R < n: gW (XᵀX/R + λI)⁻¹ = dzᵀ (XXᵀ/R + λI)⁻¹ X, with dz the gradient of the
  pre-activations. The R × R matrix is better conditioned there: XᵀX has n - R zero eigenvalues.

Which form runs is decided here where the number of rows is known, else by an If at run time. Inside
another If goes over to float64 where the input is not standardised (images in [0, 255]) and float32
has too few digits for XᵀX: by the input's mean square, as the pass does in PyTorch on a CPU. All
NaN says that float64 has too few as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.calls import MICROSOFT, Layout
from tract_fx.passes.onnx_graph.gram_blocks import write_tiled_gram, write_unfolded_gram
from tract_fx.passes.onnx_graph.gram_forms import GramForm, Tiles, choose_gram_form
from tract_fx.passes.onnx_graph.row_matrix import cast, row_matrix
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.passes.onnx_graph.weight_gradient import WeightGradient
from tract_fx.passes.onnx_graph.wide_gram import in_float64, write_wide_gram
from tract_fx.passes.onnx_graph.writer import NodeWriter
from tract_fx.preconditioner.solve import MAX_FLOAT32_AMPLIFICATION

Branch = Callable[[NodeWriter], ir.Value]


@dataclass(frozen=True)
class _Operands:
    """What both forms compute with, in both precisions: λ and R are float32 scalars."""

    gradient: WeightGradient
    sizes: CallSizes
    lambda_: ir.Value
    count: ir.Value


def write_tract(
    write: NodeWriter, gradient: WeightGradient, lambda_: ir.Value, float64: bool
) -> ir.Value:
    """Write the nodes that make of a call's gradient TrAct's, of its shape and dtype.

    λ is a float32 scalar. Input that float32 is too coarse for is treated in float64, or without it
    gives NaN.
    """
    sizes = CallSizes.of(gradient.call)
    rows, of_gram = _known_rows(gradient, sizes), write.noting(stage="Gram")
    if rows is None:
        count, fewer = _count_rows(of_gram, sizes, gradient)
    else:
        count = write.constant(np.asarray(max(rows, 1), np.float32), "rows")
    operands = _Operands(gradient, sizes, lambda_, count)
    amplification = _amplification(of_gram, operands)
    coarse = _exceeds(of_gram, amplification, np.float32)

    def by(form: Callable[[NodeWriter, _Operands, bool], ir.Value]) -> Branch:
        def narrow(inner: NodeWriter) -> ir.Value:
            return form(inner, operands, False)

        def wide(inner: NodeWriter) -> ir.Value:
            result = form(inner, operands, True)
            result = inner.op("Cast", [result], "narrow", {"to": int(ir.DataType.FLOAT)})
            return guarded(inner, _exceeds(inner, amplification, np.float64), result)

        def guarded(inner: NodeWriter, beyond: ir.Value, result: ir.Value) -> ir.Value:
            nan = inner.constant(np.asarray(np.nan, np.float32), "nan")
            return inner.op("Where", [beyond, nan, result], "guarded")

        if not float64:
            return lambda inner: guarded(inner, coarse, narrow(inner))
        return lambda inner: _choose(
            inner, sizes, coarse, "float64_or_float32", {"in_float64": wide, "in_float32": narrow}
        )

    if rows is None:
        forms = {"by_rows": by(_by_rows), "by_columns": by(_by_columns)}
        result = _choose(write, sizes, fewer, "by_rows_or_columns", forms)
    else:
        result = by(_by_columns if rows >= sizes.columns else _by_rows)(write)
    return cast(write, result, gradient.term.dtype)


def _choose(
    write: NodeWriter,
    sizes: CallSizes,
    condition: ir.Value,
    name: str,
    branches: dict[str, Branch],
) -> ir.Value:
    """Write an If between two ways to compute the gradient, in float32, the first where true."""
    attributes = {}
    for branch, (prefix, compute) in zip(
        ("then_branch", "else_branch"), branches.items(), strict=True
    ):
        inner = write.branch(prefix)
        output = compute(inner)
        output.shape, output.type = ir.Shape(sizes.weight_shape), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([], [output], nodes=list(inner.nodes), name=branch)
        attributes[branch] = ir.AttrGraph(branch, graph)
    return write.op("If", [condition], name, attributes)


def _known_rows(gradient: WeightGradient, sizes: CallSizes) -> int | None:
    for value in (gradient.output_gradient, gradient.call.output):
        shape = static_shape(value)
        if shape is not None:
            return math.prod(shape) // sizes.outputs
    return None


def _count_rows(
    write: NodeWriter, sizes: CallSizes, gradient: WeightGradient
) -> tuple[ir.Value, ir.Value]:
    """R in float32, and whether it is less than n."""
    shape = write.op("Shape", [gradient.output_gradient], "output_shape")
    size = write.op("ReduceProd", [shape], "size", {"keepdims": 0})
    outputs = write.constant(np.asarray(sizes.outputs, np.int64), "outputs")
    rows = write.op("Div", [size, outputs], "row_count")
    count = write.op("Cast", [rows], "rows", {"to": int(ir.DataType.FLOAT)})
    columns = write.constant(np.asarray(sizes.columns, np.int64), "columns")
    return count, write.op("Less", [rows, columns], "fewer_rows_than_columns")


def _amplification(write: NodeWriter, operands: _Operands) -> ir.Value:
    """About trace(XᵀX/R) / λ: what the solve makes of a rounding error in the Gram."""
    x = cast(write, operands.sizes.call.input, ir.DataType.FLOAT)
    squares = write.op("ReduceSumSquare", [x], "input_squares", {"keepdims": 0})
    elements = write.op("Size", [x], "input_size")
    count = write.op("Cast", [elements], "input_elements", {"to": int(ir.DataType.FLOAT)})
    mean_square = write.op("Div", [squares, count], "mean_square")
    columns = write.constant(np.asarray(operands.sizes.columns, np.float32), "column_count")
    trace = write.op("Mul", [mean_square, columns], "trace")
    return write.op("Div", [trace, operands.lambda_], "amplification")


def _exceeds(write: NodeWriter, amplification: ir.Value, dtype: type[np.floating[Any]]) -> ir.Value:
    """Whether a dtype has too few digits for it."""
    most = MAX_FLOAT32_AMPLIFICATION / float(np.finfo(dtype).eps)
    limit = write.constant(np.asarray(most, np.float32), "largest_amplification")
    return write.op("Greater", [amplification, limit], f"is_beyond_{dtype.__name__}")


def _by_columns(write: NodeWriter, operands: _Operands, wide: bool) -> ir.Value:
    """gW (XᵀX/R + λI)⁻¹ by the n × n matrix."""
    sizes = operands.sizes
    write = write.noting(form="column space")
    of_gram = write.noting(stage="Gram")
    index = np.arange(sizes.columns, dtype=np.int64)
    diagonal = of_gram.op(
        "Equal",
        [write.constant(index[:, None], "row_index"), write.constant(index[None], "column_index")],
        "diagonal",
    )
    if wide:
        gram = write_wide_gram(of_gram, sizes)
    else:
        gram = write_gram(of_gram, sizes, choose_gram_form(sizes))
    inverse = _regularised_inverse(write, operands, gram, diagonal, wide)
    term = _in_precision(write, operands.gradient.term, wide)
    if sizes.call.layout is Layout.IN_OUT:
        return _product(write, inverse, term, "gradient", wide)
    if not sizes.kernel:
        return _product(write, term, inverse, "gradient", wide)
    shape = [sizes.outputs // sizes.groups, sizes.columns]
    if sizes.groups > 1:
        shape.insert(0, sizes.groups)
    term = write.op("Reshape", [term, write.integers(shape, "matrix_shape")], "plain_matrix")
    product = _product(write, term, inverse, "product", wide)
    target = write.integers(sizes.weight_shape, "weight_shape")
    return write.op("Reshape", [product, target], "gradient")


def _by_rows(write: NodeWriter, operands: _Operands, wide: bool) -> ir.Value:
    """Compute dzᵀ (XXᵀ/R + λI)⁻¹ X by the R × R matrix; (groups, …) before all three."""
    sizes = operands.sizes
    write = write.noting(form="row space")
    of_gram = write.noting(stage="Gram")
    x = row_matrix(of_gram, sizes)
    dz = _in_precision(write, operands.gradient.output_gradient, wide)
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
    if wide:
        x, by = in_float64(of_gram, x), of_gram.noting(gram="Einsum")
        kernel = by.op("Einsum", [x, x], "row_gram", {"equation": "...ri,...si->...rs"})
    else:
        by = of_gram.noting(gram="FusedMatMul")
        kernel = by.op("FusedMatMul", [x, x], "row_gram", {"transB": 1}, domain=MICROSOFT)
    diagonal = _row_diagonal(of_gram, kernel)
    inverse = _regularised_inverse(write, operands, kernel, diagonal, wide)
    solved = _product(write, dz, inverse, "solved", wide)
    product = _product(write, solved, x, "product", wide)
    alpha = sizes.call.node.attributes.get_float("alpha", 1.0) if not sizes.kernel else 1.0
    if alpha != 1.0:
        scale = write.constant(np.asarray(alpha, np.float64 if wide else np.float32), "alpha")
        product = write.op("Mul", [product, scale], "scaled")
    if sizes.call.layout is Layout.IN_OUT:
        return write.op("Transpose", [product], "gradient", {"perm": [1, 0]})
    target = write.integers(sizes.weight_shape, "weight_shape")
    return write.op("Reshape", [product, target], "gradient")


def _product(write: NodeWriter, left: ir.Value, right: ir.Value, name: str, wide: bool) -> ir.Value:
    if not wide:
        return write.op("MatMul", [left, right], name)
    # Of MatMul and a Transpose ONNX Runtime makes a FusedMatMul, which has no float64 on the CPU.
    return write.op("Einsum", [left, right], name, {"equation": "...ij,...jk->...ik"})


def _in_precision(write: NodeWriter, value: ir.Value, wide: bool) -> ir.Value:
    return in_float64(write, value) if wide else cast(write, value, ir.DataType.FLOAT)


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
    write: NodeWriter, operands: _Operands, gram: ir.Value, diagonal: ir.Value, wide: bool
) -> ir.Value:
    """(gram/R + λI)⁻¹; all NaN for a matrix that holds an infinity."""
    of_gram, write = write.noting(stage="Gram"), write.noting(stage="factorisation")
    count = _in_precision(of_gram, operands.count, wide)
    lambda_ = _in_precision(of_gram, operands.lambda_, wide)
    mean = of_gram.op("Div", [gram, count], "mean_gram")
    zero = write.constant(np.asarray(0, np.float64 if wide else np.float32), "zero")
    ridge = of_gram.op("Where", [diagonal, lambda_, zero], "ridge")
    matrix = of_gram.op("Add", [mean, ridge], "regularised")
    inverse = write.op("Inverse", [matrix], "unguarded_inverse", domain=MICROSOFT)
    # The factorisation takes 1/∞ for 0, and gives a finite inverse of some matrices with ∞.
    axes = write.integers([-2, -1], "matrix_axes")
    total = write.op("ReduceSum", [matrix, axes], "sum_of_entries", {"keepdims": 1})
    poison = write.op("Sub", [total, total], "zero_or_nan")
    return write.op("Add", [inverse, poison], "inverse")


def write_gram(write: NodeWriter, sizes: CallSizes, form: GramForm) -> ir.Value:
    """Write XᵀX in one of its possible forms: (n, n), or with the groups of several before it."""
    if isinstance(form, Tiles):
        rows = row_matrix(write, sizes, grouped=False)
        return write_tiled_gram(write, rows, sizes.columns, form.count)
    return write_unfolded_gram(write, sizes, form)
