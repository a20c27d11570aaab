"""The TrAct subgraph: from a call's weight gradient gW to gW (XᵀX/R + λI)⁻¹.

Two forms of one definition (arXiv 2410.23970, section 3):

- by columns, for R ≥ n: the n × n matrix XᵀX/R + λI is inverted and multiplied to gW;
- by rows, for R < n: gW (XᵀX/R + λI)⁻¹ = dzᵀ (XXᵀ/R + λI)⁻¹ X, with dz the gradient of the
  pre-activations. The R × R matrix is better conditioned there: XᵀX has n - R zero eigenvalues.

Which form runs is decided here where the number of rows is known, else by an If at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall
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
    layer = _Layer.of(gradient.call, weight_shape)
    rows = _known_rows(gradient, layer)
    if rows is None:
        result = _either_form(write, layer, gradient, lambda_)
    else:
        form = _by_columns if rows >= layer.columns else _by_rows
        count = write.constant(np.asarray(max(rows, 1), np.float32), "rows")
        result = form(write, layer, gradient, lambda_, count)
    return _cast(write, result, gradient.term.dtype)


@dataclass(frozen=True)
class _Layer:
    """A call and its sizes.

    Attributes:
        call: The call.
        weight_shape: Shape of the weight as the call reads it.
        groups: Number of Gram matrices.
        outputs: Output features or channels, of all groups.
        columns: n, columns of X per group.
        kernel: Kernel size per spatial dimension, empty for a linear layer.
    """

    call: OnnxCall
    weight_shape: tuple[int, ...]
    groups: int
    outputs: int
    columns: int
    kernel: tuple[int, ...]

    @classmethod
    def of(cls, call: OnnxCall, shape: tuple[int, ...]) -> _Layer:
        if call.layout is Layout.IN_OUT:
            return cls(call, shape, 1, shape[1], shape[0], ())
        groups = call.node.attributes.get_int("group", 1)
        return cls(call, shape, groups, shape[0], math.prod(shape[1:]), shape[2:])

    @property
    def channels(self) -> int:
        """Input channels of a convolution, of all groups."""
        return self.groups * self.weight_shape[1]

    @property
    def is_patchify(self) -> bool:
        """Whether the patches tile the input, so that they are a permutation of it."""
        sizes = None if self.call.input.shape is None else self.call.input.shape[2:]
        node = self.call.node
        return (
            self.groups == 1
            and bool(self.kernel)
            and tuple(node.attributes.get_ints("strides", ())) == self.kernel
            and not any(node.attributes.get_ints("pads", ()))
            and node.attributes.get_string("auto_pad", "NOTSET") in {"NOTSET", "VALID"}
            and set(node.attributes.get_ints("dilations", ())) <= {1}
            and sizes is not None
            and all(
                isinstance(size, int) and size % k == 0
                for size, k in zip(sizes, self.kernel, strict=True)
            )
        )


def _known_rows(gradient: WeightGradient, layer: _Layer) -> int | None:
    for value in (gradient.output_gradient, gradient.call.output):
        shape = static_shape(value)
        if shape is not None:
            return math.prod(shape) // layer.outputs
    return None


def _either_form(
    write: NodeWriter, layer: _Layer, gradient: WeightGradient, lambda_: ir.Value
) -> ir.Value:
    """Both forms, and an If between them."""
    shape = write.op("Shape", [gradient.output_gradient], "output_shape")
    size = write.op("ReduceProd", [shape], "size", {"keepdims": 0})
    outputs = write.constant(np.asarray(layer.outputs, np.int64), "outputs")
    rows = write.op("Div", [size, outputs], "row_count")
    count = write.op("Cast", [rows], "rows", {"to": int(ir.DataType.FLOAT)})
    columns = write.constant(np.asarray(layer.columns, np.int64), "columns")
    branches = {}
    for name, form in (("then_branch", _by_rows), ("else_branch", _by_columns)):
        inner = write.branch("by_rows" if form is _by_rows else "by_columns")
        output = form(inner, layer, gradient, lambda_, count)
        output.shape, output.type = ir.Shape(layer.weight_shape), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([], [output], nodes=list(inner.nodes), name=name)
        branches[name] = ir.AttrGraph(name, graph)
    fewer = write.op("Less", [rows, columns], "fewer_rows_than_columns")
    return write.op("If", [fewer], "by_rows_or_columns", branches)


def _by_columns(
    write: NodeWriter,
    layer: _Layer,
    gradient: WeightGradient,
    lambda_: ir.Value,
    count: ir.Value,
) -> ir.Value:
    """gW (XᵀX/R + λI)⁻¹ by the n × n matrix."""
    index = np.arange(layer.columns, dtype=np.int64)
    diagonal = write.op(
        "Equal",
        [write.constant(index[:, None], "row_index"), write.constant(index[None], "column_index")],
        "diagonal",
    )
    inverse = _regularised_inverse(write, _gram(write, layer), count, diagonal, lambda_)
    term = _cast(write, gradient.term, ir.DataType.FLOAT)
    if layer.call.layout is Layout.IN_OUT:
        return write.op("MatMul", [inverse, term], "gradient")
    if not layer.kernel:
        return write.op("MatMul", [term, inverse], "gradient")
    shape = [layer.outputs // layer.groups, layer.columns]
    if layer.groups > 1:
        shape.insert(0, layer.groups)
    term = write.op("Reshape", [term, write.integers(shape, "matrix_shape")], "plain_matrix")
    product = write.op("MatMul", [term, inverse], "product")
    target = write.integers(layer.weight_shape, "weight_shape")
    return write.op("Reshape", [product, target], "gradient")


def _by_rows(
    write: NodeWriter,
    layer: _Layer,
    gradient: WeightGradient,
    lambda_: ir.Value,
    count: ir.Value,
) -> ir.Value:
    """Compute dzᵀ (XXᵀ/R + λI)⁻¹ X by the R × R matrix; (groups, …) before all three."""
    x = _row_matrix(write, layer)
    dz = _cast(write, gradient.output_gradient, ir.DataType.FLOAT)
    if layer.kernel:
        split = [0, layer.groups, layer.outputs // layer.groups, -1]
        dz = write.op("Reshape", [dz, write.integers(split, "output_split")], "output_gradient")
        dz = write.op("Transpose", [dz], "output_gradient_by_row", {"perm": [1, 2, 0, 3]})
        joined = [layer.groups, layer.outputs // layer.groups, -1]
        dz = write.op("Reshape", [dz, write.integers(joined, "output_rows")], "dz_transposed")
    else:
        flat = write.integers([-1, layer.outputs], "output_shape")
        dz = write.op("Reshape", [dz, flat], "output_gradient")
        dz = write.op("Transpose", [dz], "dz_transposed", {"perm": [1, 0]})
    kernel = write.microsoft("FusedMatMul", [x, x], "row_gram", {"transB": 1})
    inverse = _regularised_inverse(write, kernel, count, _row_diagonal(write, kernel), lambda_)
    product = write.op("MatMul", [write.op("MatMul", [dz, inverse], "solved"), x], "product")
    alpha = layer.call.node.attributes.get_float("alpha", 1.0) if not layer.kernel else 1.0
    if alpha != 1.0:
        scale = write.constant(np.asarray(alpha, np.float32), "alpha")
        product = write.op("Mul", [product, scale], "scaled")
    if layer.call.layout is Layout.IN_OUT:
        return write.op("Transpose", [product], "gradient", {"perm": [1, 0]})
    target = write.integers(layer.weight_shape, "weight_shape")
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


def _gram(write: NodeWriter, layer: _Layer) -> ir.Value:
    """XᵀX: (n, n), or (groups, n, n) for a grouped convolution."""
    if not layer.kernel or layer.is_patchify:
        x = _row_matrix(write, layer, grouped=False)
        return write.op("Gemm", [x, x], "gram", {"transA": 1})
    patches = _patches(write, layer)
    shape = [0, layer.groups, layer.columns, -1] if layer.groups > 1 else [0, layer.columns, -1]
    columns = write.op("Reshape", [patches, write.integers(shape, "patch_split")], "columns")
    batched = write.microsoft("FusedMatMul", [columns, columns], "image_gram", {"transB": 1})
    axis = write.integers([0], "batch_axis")
    return write.op("ReduceSum", [batched, axis], "gram", {"keepdims": 0})


def _row_matrix(write: NodeWriter, layer: _Layer, *, grouped: bool = True) -> ir.Value:
    """X: (R, n) for a linear layer; for a convolution (groups, R, n), or (R, n) ungrouped."""
    x = _cast(write, layer.call.input, ir.DataType.FLOAT)
    if not layer.kernel:
        if layer.call.input_transposed:
            return write.op("Transpose", [x], "rows_of_input", {"perm": [1, 0]})
        flat = write.integers([-1, layer.columns], "row_shape")
        return write.op("Reshape", [x, flat], "rows_of_input")
    joined = [*([layer.groups] if grouped else []), -1, layer.columns]
    target = write.integers(joined, "row_shape")
    if layer.is_patchify:
        x = write.op("Reshape", [x, write.integers(_tiles(layer), "tile_shape")], "tiles")
        dims = len(layer.kernel)
        # (N, C, p, k, q, l, …) -> (N, p, q, …, C, k, l, …)
        positions, elements = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
        rows = write.op("Transpose", [x], "patch_rows", {"perm": [0, *positions, 1, *elements]})
        return write.op("Reshape", [rows, target], "rows_of_input")
    split = [0, layer.groups, layer.columns, -1]
    columns = write.integers(split, "patch_columns")
    x = write.op("Reshape", [_patches(write, layer), columns], "patch_matrix")
    rows = write.op("Transpose", [x], "patch_rows", {"perm": [1, 0, 3, 2]})
    return write.op("Reshape", [rows, target], "rows_of_input")


def _tiles(layer: _Layer) -> list[int]:
    assert layer.call.input.shape is not None
    sizes = layer.call.input.shape[2:]
    pairs = [(int(s) // k, k) for s, k in zip(sizes, layer.kernel, strict=True)]  # type: ignore[arg-type]  # known ones
    return [0, layer.channels, *(entry for pair in pairs for entry in pair)]


def _patches(write: NodeWriter, layer: _Layer) -> ir.Value:
    """Every patch as channels, (N, C · kernel elements, *positions), in the weight's order."""
    # A convolution of each channel with the unit kernels, under the layer's own attributes, so that
    # whatever they mean they mean the same here.
    elements = math.prod(layer.kernel)
    unit = np.eye(elements, dtype=np.float32).reshape(elements, 1, *layer.kernel)
    kernels = write.constant(np.tile(unit, (layer.channels, *(1,) * (unit.ndim - 1))), "units")
    node = layer.call.node
    kept = ("strides", "pads", "dilations", "auto_pad")
    attributes = {name: node.attributes[name] for name in kept if name in node.attributes}
    attributes["group"] = ir.AttrInt64("group", layer.channels)
    attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", layer.kernel)
    x = _cast(write, layer.call.input, ir.DataType.FLOAT)
    return write.op("Conv", [x, kernels], "patches", attributes)


def _cast(write: NodeWriter, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Bring a value to another dtype; the Gram, the inverse and the product are in float32."""
    current = value.dtype or ir.DataType.FLOAT
    if dtype is None or current == dtype:
        return value
    return write.op("Cast", [value], "cast", {"to": int(dtype)})
