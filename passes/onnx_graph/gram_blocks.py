"""The Gram of patches from what a Conv with unit kernels copies of the image.

Per group, f features stand in a column for each block of neighbouring patches: (channel, kernel
row < q, kernel elements between, column of the block). Their products are those of b patches:
entry (kx, kx') of the Gram is the sum over t < b of the products of columns t · stride + kx and
t · stride + kx'.

Kernel rows from q on are those of patches further down. With Z_y the features of output row y,
and row a = j · q + r of a patch at y being row r at y + j · shift, the pair of lags (j, j') is

    S(j, j') = ∑_{y < P} Z_{y + j·shift} Z_{y + j'·shift}ᵀ,   the sum of the products at distance
               j' - j over the rows from j·shift to P + j·shift.

What all j have in common, the rows from M = (lags - 1) · shift to P, is multiplied once for each
distance. The strips of M rows at the top and below P are multiplied in slices of `shift` rows,
which are added to the pairs that have them. Nothing is subtracted: a bright border would leave its
rounding behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.gram_forms import Unfolding, block_columns
from tract_fx.passes.onnx_graph.row_matrix import unfold
from tract_fx.passes.onnx_graph.writer import NodeWriter

_END = 2**31  # a Slice's, where it goes to the last


def write_unfolded_gram(write: NodeWriter, sizes: CallSizes, form: Unfolding) -> ir.Value:
    """Write XᵀX of a convolution.

    Args:
        write: Where the nodes go.
        sizes: The call.
        form: What is copied.

    Returns:
        (n, n), or (groups, n, n) for a grouped convolution.
    """
    groups = [sizes.groups] if sizes.groups > 1 else []
    copied = _copied(write, sizes, form)
    counted = f"{form.lags + 1} FusedMatMul" if form.lags > 1 else "FusedMatMul"
    write = write.noting(gram=f"{counted} per image and ReduceSum")
    if form.is_plain:
        columns = _reshape(write, copied, [0, *groups, sizes.columns, -1], "columns")
        return _sum_over_images(write, _products(write, columns, columns), "gram")
    features = sizes.columns // sizes.kernel[0] * form.rows
    if len(sizes.kernel) > 1:
        features = features // sizes.kernel[-1] * block_columns(sizes, form.block)
    split = [0, *groups, features, -1]
    if form.lags == 1:
        columns = _reshape(write, copied, split, "columns")
        products = _sum_over_images(write, _products(write, columns, columns), "block_gram")
        pairs = _reshape(write, products, [1, 1, sizes.groups, features, features], "row_pairs")
        return _in_weight_order(write, _of_patches(write, pairs, sizes, form), sizes, form)
    lags = _lag_products(write, copied, split, sizes, form)
    strips = _strip_products(write, copied, sizes.groups, features, form)
    upper = _row_pairs(write, lags, strips, sizes.groups, features, form)
    half = _in_weight_order(write, _of_patches(write, upper, sizes, form), sizes, form)
    dims = list(range(len(groups) + 2))
    swapped = {"perm": [*dims[:-2], dims[-1], dims[-2]]}
    return write.op("Add", [half, write.op("Transpose", [half], "lower_half", swapped)], "gram")


def _copied(write: NodeWriter, sizes: CallSizes, form: Unfolding) -> ir.Value:
    """Every block's features, (N, C · features, rows, …, blocks): P + (lags - 1) · shift rows."""
    if form.is_plain:
        return unfold(write, sizes, sizes.kernel)
    geometry = sizes.geometry
    assert geometry is not None
    before, after = ([sides[end] for sides in geometry.padding] for end in (0, 1))
    kernel = [form.rows, *sizes.kernel[1:]]
    # The kernel is shorter, by k - q rows, and meets the lower lags' rows below the last patch.
    after[0] += geometry.dilation[0] * (form.lags * form.rows - sizes.kernel[0])
    changed = {"pads": [*before, *after]}
    if form.block > 1:
        kernel[-1] = block_columns(sizes, form.block)
        changed["strides"] = [*geometry.stride[:-1], form.block * geometry.stride[-1]]
    return unfold(write, sizes, tuple(kernel), changed)


def _lag_products(
    write: NodeWriter, copied: ir.Value, split: list[int], sizes: CallSizes, form: Unfolding
) -> list[ir.Value]:
    """Products over the common rows for each distance, (1, [groups,] f, f) each."""
    behind = _sizes_behind_rows(sizes, form)
    spare = form.lags * form.rows - sizes.kernel[0]
    top = (form.lags - 1) * form.shift
    shifted = []
    for lag in range(form.lags):
        if lag == form.lags - 1 and spare and behind is not None:
            shifted.append(_last_lag(write, copied, split, behind, sizes, form))
            continue
        below = (form.lags - 1 - lag) * form.shift
        first = top + lag * form.shift
        part = _rows(write, copied, first, -below if below else _END, "shifted_rows")
        shifted.append(_reshape(write, part, split, "columns"))
    products = [
        _sum_over_images(write, _products(write, shifted[0], right), "lag_gram", keep=True)
        for right in shifted
    ]
    if spare and behind is not None:
        *groups, features, _ = split[1:]
        rest = features // sizes.group_channels // form.rows
        parts = [1, *groups, features, sizes.group_channels, form.rows - spare, rest]
        last = _reshape(write, products[-1], parts, "own_kernel_rows")
        zeros = write.constant(np.zeros([*parts[:-2], spare, rest], np.float32), "spare_rows")
        products[-1] = write.op("Concat", [last, zeros], "last_lag_gram", {"axis": len(parts) - 2})
    return products


def _sizes_behind_rows(sizes: CallSizes, form: Unfolding) -> list[int] | None:
    """Numbers of blocks along the spatial dimensions behind the first, if all are known."""
    known = [count for count in sizes.positions[1:] if count is not None]
    if len(known) < len(sizes.kernel) - 1:
        return None
    return [*known[:-1], known[-1] // form.block] if known else []


def _last_lag(
    write: NodeWriter,
    copied: ir.Value,
    split: list[int],
    behind: list[int],
    sizes: CallSizes,
    form: Unfolding,
) -> ir.Value:
    """The last lag's columns without its spare kernel rows, which are beyond the kernel."""
    *kept, features, _ = split
    own = sizes.kernel[0] - (form.lags - 1) * form.rows
    rest = features // sizes.group_channels // form.rows
    parts = _reshape(write, copied, [0, sizes.channels, form.rows, rest, -1, *behind], "features")
    first = write.integers([0, 2 * (form.lags - 1) * form.shift], "first_rows")
    end = write.integers([own, _END], "end_rows")
    axes = write.integers([2, 4], "row_axes")
    rows = write.op("Slice", [parts, first, end, axes], "shifted_rows")
    return _reshape(write, rows, [*kept, features // form.rows * own, -1], "columns")


def _strip_products(
    write: NodeWriter, copied: ir.Value, groups: int, features: int, form: Unfolding
) -> ir.Value:
    """Products of each strip's slices, (4 · (lags - 1)², groups, f, f): the top strip's first.

    On the left the strips' own slices, on the right those of twice their height: with the rows that
    follow at the top, and before it those above P at the bottom.

    Returns:
        In the order (strip, left slice, right slice).
    """
    moves = form.lags - 1
    height = moves * form.shift

    def strips(tall: int, name: str) -> ir.Value:
        top = _rows(write, copied, 0, tall * height, f"top_{name}")
        bottom = _rows(write, copied, -tall * height, _END, f"bottom_{name}")
        both = write.op("Concat", [top, bottom], name, {"axis": 2})
        shape = [0, groups, features, 2, tall * moves, -1]
        split = _reshape(write, both, shape, f"{name}_split")
        moved = write.op("Transpose", [split], f"{name}_features", {"perm": [3, 1, 4, 2, 0, 5]})
        return _reshape(write, moved, [2, groups, tall * moves * features, -1], f"{name}_columns")

    products = _products(write, strips(1, "strips"), strips(2, "tall_strips"), "strip_gram")
    shape = [2, groups, moves, features, 2 * moves, features]
    blocks = _reshape(write, products, shape, "strip_blocks")
    pairs = write.op("Transpose", [blocks], "strip_pairs", {"perm": [0, 2, 4, 1, 3, 5]})
    return _reshape(write, pairs, [4 * moves**2, groups, features, features], "strip_products")


def _row_pairs(
    write: NodeWriter,
    lags: Sequence[ir.Value],
    strips: ir.Value,
    groups: int,
    features: int,
    form: Unfolding,
) -> ir.Value:
    """S(j, j') for j < j', halves for j = j', else 0: (lags, lags, groups, f, f)."""
    size = groups * features**2
    products = [_reshape(write, lag, [1, size], "lag_products") for lag in lags]
    products.append(_reshape(write, strips, [-1, size], "strip_terms"))
    terms = write.op("Concat", products, "terms", {"axis": 0})
    weights = write.constant(_terms_of_pairs(form.lags), "terms_of_pairs")
    pairs = write.op("MatMul", [weights, terms], "pair_terms")
    shape = [form.lags, form.lags, groups, features, features]
    return _reshape(write, pairs, shape, "row_pairs")


def _terms_of_pairs(lags: int) -> np.ndarray:
    """Which of the lags' and the strips' products make up S(j, j'), (lags², terms)."""
    moves = lags - 1
    terms = np.zeros((lags, lags, lags + 4 * moves**2), np.float32)
    strips = terms[:, :, lags:].reshape(lags, lags, 2, moves, 2 * moves)
    for j in range(lags):
        for k in range(j, lags):
            share = 0.5 if j == k else 1.0  # the transposed half follows
            terms[j, k, k - j] = share
            for row in range(j, moves):
                strips[j, k, 0, row, row + k - j] = share
            for row in range(j):
                strips[j, k, 1, row, moves + row + k - j] = share
    return terms.reshape(lags**2, -1)


def _of_patches(write: NodeWriter, pairs: ir.Value, sizes: CallSizes, form: Unfolding) -> ir.Value:
    """From pairs of blocks to pairs of patches: sums along diagonals of the blocks' columns."""
    if form.block == 1:
        return pairs
    assert sizes.geometry is not None
    stride, kernel = sizes.geometry.stride[-1], sizes.kernel[-1]
    run = block_columns(sizes, form.block)
    # Features before the column: (channel, kernel row, elements between).
    others = sizes.columns // sizes.kernel[0] // kernel * form.rows
    split = [form.lags, form.lags, sizes.groups, others, run, others, run]
    blocks = _reshape(write, pairs, split, "columns_of_blocks")
    axes = write.integers([4, 6], "column_axes")
    shares = []
    for t in range(form.block):
        first = write.integers([t * stride] * 2, "first_columns")
        end = write.integers([t * stride + kernel] * 2, "end_columns")
        shares.append(write.op("Slice", [blocks, first, end, axes], "patch_of_block"))
    return write.op("Sum", shares, "patch_pairs")


def _in_weight_order(
    write: NodeWriter, pairs: ir.Value, sizes: CallSizes, form: Unfolding
) -> ir.Value:
    """From (lag, lag, groups, rows, rows) to ([groups,] n, n) in the order of the weight."""
    columns, channels, rows = sizes.columns, sizes.group_channels, sizes.kernel[0]
    target = [*([sizes.groups] if sizes.groups > 1 else []), columns, columns]
    if form.lags > 1:
        rest = columns // channels // rows  # kernel elements of one kernel row
        split = [form.lags, form.lags, sizes.groups, *[channels, form.rows * rest] * 2]
        parts = _reshape(write, pairs, split, "channel_pairs")
        pairs = write.op("Transpose", [parts], "ordered_pairs", {"perm": [2, 3, 0, 4, 5, 1, 6]})
        if form.lags * form.rows > rows:
            full = [sizes.groups, *[channels, form.lags * form.rows, rest] * 2]
            pairs = _reshape(write, pairs, full, "kernel_rows")
            first = write.integers([0, 0], "first_kernel_rows")
            end = write.integers([rows, rows], "end_kernel_rows")
            axes = write.integers([2, 5], "kernel_row_axes")
            pairs = write.op("Slice", [pairs, first, end, axes], "own_kernel_rows")
    return _reshape(write, pairs, target, "half_gram" if form.lags > 1 else "gram")


def _rows(write: NodeWriter, value: ir.Value, first: int, end: int, name: str) -> ir.Value:
    """A range of output rows, counted from the end where it is negative."""
    bounds = [write.integers([v], n) for v, n in ((first, "first_row"), (end, "end_row"))]
    return write.op("Slice", [value, *bounds, write.integers([2], "row_axis")], name)


def _reshape(write: NodeWriter, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
    return write.op("Reshape", [value, write.integers(shape, f"{name}_shape")], name)


def _products(
    write: NodeWriter, left: ir.Value, right: ir.Value, name: str = "image_gram"
) -> ir.Value:
    return write.microsoft("FusedMatMul", [left, right], name, {"transB": 1})


def _sum_over_images(
    write: NodeWriter, grams: ir.Value, name: str, *, keep: bool = False
) -> ir.Value:
    axis = write.integers([0], "batch_axis")
    return write.op("ReduceSum", [grams, axis], name, {"keepdims": int(keep)})


def write_tiled_gram(write: NodeWriter, rows: ir.Value, columns: int, count: int) -> ir.Value:
    """Write XᵀX.

    Args:
        write: Where the nodes go.
        rows: X, (R, n).
        columns: n.
        count: Number of equal shares of X's columns; one makes one product.

    Returns:
        (n, n).
    """
    write = write.noting(gram="Gemm" if count == 1 else f"{count * (count + 1) // 2} Gemm")
    if count == 1:
        return write.op("Gemm", [rows, rows], "gram", {"transA": 1})
    cuts = [index * columns // count for index in range(count + 1)]
    axis = write.integers([1], "column_axis")
    shares = [
        write.op(
            "Slice",
            [rows, write.integers([a], "first_column"), write.integers([b], "end_column"), axis],
            "columns",
        )
        for a, b in itertools.pairwise(cuts)
    ]
    tiles: dict[tuple[int, int], ir.Value] = {}
    for i, left in enumerate(shares):
        for j in range(i, count):
            tiles[i, j] = write.op("Gemm", [left, shares[j]], "tile", {"transA": 1})
            if j > i:
                tiles[j, i] = write.op("Transpose", [tiles[i, j]], "lower_tile", {"perm": [1, 0]})
    stripes = [
        write.op("Concat", [tiles[i, j] for j in range(count)], "stripe", {"axis": 1})
        for i in range(count)
    ]
    return write.op("Concat", stripes, "gram", {"axis": 0})
