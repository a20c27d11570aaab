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
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.calls import MICROSOFT
from tract_fx.passes.onnx_graph.gram_forms import Unfolding, block_columns
from tract_fx.passes.onnx_graph.row_matrix import unfold
from tract_fx.passes.onnx_graph.writer import NodeWriter

_END = 2**31  # a Slice's, where it goes to the last


def write_unfolded_gram(write: NodeWriter, sizes: CallSizes, form: Unfolding) -> ir.Value:
    """Write XᵀX of a convolution: (n, n), or (groups, n, n) for a grouped one."""
    copied = _copied(write, sizes, form)
    counted = f"{form.lags + 1} FusedMatMul" if form.lags > 1 else "FusedMatMul"
    write = write.noting(gram=f"{counted} per image and ReduceSum")
    return _Products(write, sizes, form).gram(copied)


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


class _Products:
    """Writes the products of what was copied, and what the Gram is of them."""

    def __init__(self, write: NodeWriter, sizes: CallSizes, form: Unfolding) -> None:
        self.write, self.sizes, self.form = write, sizes, form
        features = sizes.columns // sizes.kernel[0] * form.rows
        if len(sizes.kernel) > 1:
            features = features // sizes.kernel[-1] * block_columns(sizes, form.block)
        self.features = features
        self.groups = [sizes.groups] if sizes.groups > 1 else []
        self.split = [0, *self.groups, features, -1]

    def gram(self, copied: ir.Value) -> ir.Value:
        if self.form.is_plain:
            shape = [0, *self.groups, self.sizes.columns, -1]
            columns = self._reshape(copied, shape, "columns")
            return self._sum_over_images(self._multiply(columns, columns), "gram")
        if self.form.lags == 1:
            columns = self._reshape(copied, self.split, "columns")
            products = self._sum_over_images(self._multiply(columns, columns), "block_gram")
            shape = [1, 1, self.sizes.groups, self.features, self.features]
            pairs = self._reshape(products, shape, "row_pairs")
        else:
            lags = self._lag_products(copied)
            pairs = self._row_pairs(lags, self._strip_products(copied))
        gram = self._in_weight_order(self._of_patches(pairs))
        if self.form.lags == 1:
            return gram
        dims = list(range(len(self.groups) + 2))
        swapped = {"perm": [*dims[:-2], dims[-1], dims[-2]]}
        lower = self.write.op("Transpose", [gram], "lower_half", swapped)
        return self.write.op("Add", [gram, lower], "gram")

    def _lag_products(self, copied: ir.Value) -> list[ir.Value]:
        """Products over the common rows for each distance, (1, [groups,] f, f) each."""
        sizes, form = self.sizes, self.form
        behind = self._blocks_behind_rows()
        spare = form.lags * form.rows - sizes.kernel[0]
        top = (form.lags - 1) * form.shift
        shifted = []
        for lag in range(form.lags):
            if lag == form.lags - 1 and spare and behind is not None:
                shifted.append(self._last_lag(copied, behind))
                continue
            below = (form.lags - 1 - lag) * form.shift
            first = top + lag * form.shift
            part = self._rows(copied, first, -below if below else _END, "shifted_rows")
            shifted.append(self._reshape(part, self.split, "columns"))
        products = [
            self._sum_over_images(self._multiply(shifted[0], right), "lag_gram", keep=True)
            for right in shifted
        ]
        if spare and behind is not None:
            rest = self.features // sizes.group_channels // form.rows
            shape = [1, *self.groups, self.features, sizes.group_channels, form.rows - spare, rest]
            last = self._reshape(products[-1], shape, "own_kernel_rows")
            zeros = np.zeros([*shape[:-2], spare, rest], np.float32)
            parts = [last, self.write.constant(zeros, "spare_rows")]
            axis = {"axis": len(shape) - 2}
            products[-1] = self.write.op("Concat", parts, "last_lag_gram", axis)
        return products

    def _blocks_behind_rows(self) -> list[int] | None:
        """Numbers of blocks along the spatial dimensions behind the first, if all are known."""
        known = [count for count in self.sizes.positions[1:] if count is not None]
        if len(known) < len(self.sizes.kernel) - 1:
            return None
        return [*known[:-1], known[-1] // self.form.block] if known else []

    def _last_lag(self, copied: ir.Value, behind: list[int]) -> ir.Value:
        """The last lag's columns without its spare kernel rows, which are beyond the kernel."""
        write, sizes, form = self.write, self.sizes, self.form
        own = sizes.kernel[0] - (form.lags - 1) * form.rows
        rest = self.features // sizes.group_channels // form.rows
        shape = [0, sizes.channels, form.rows, rest, -1, *behind]
        parts = self._reshape(copied, shape, "features")
        first = write.integers([0, 2 * (form.lags - 1) * form.shift], "first_rows")
        end = write.integers([own, _END], "end_rows")
        axes = write.integers([2, 4], "row_axes")
        rows = write.op("Slice", [parts, first, end, axes], "shifted_rows")
        split = [0, *self.groups, self.features // form.rows * own, -1]
        return self._reshape(rows, split, "columns")

    def _strip_products(self, copied: ir.Value) -> ir.Value:
        """Products of each strip's slices, (4 · (lags - 1)², groups, f, f): the top strip's first.

        In the order (strip, left slice, right slice): on the left the strips' own slices, on the
        right those of twice their height: with the rows that follow at the top, and before it those
        above P at the bottom.
        """
        groups, features, moves = self.sizes.groups, self.features, self.form.lags - 1
        height = moves * self.form.shift

        def strips(tall: int, name: str) -> ir.Value:
            top = self._rows(copied, 0, tall * height, f"top_{name}")
            bottom = self._rows(copied, -tall * height, _END, f"bottom_{name}")
            both = self.write.op("Concat", [top, bottom], name, {"axis": 2})
            split = self._reshape(both, [0, groups, features, 2, tall * moves, -1], f"{name}_split")
            order = {"perm": [3, 1, 4, 2, 0, 5]}
            moved = self.write.op("Transpose", [split], f"{name}_features", order)
            shape = [2, groups, tall * moves * features, -1]
            return self._reshape(moved, shape, f"{name}_columns")

        left, right = strips(1, "strips"), strips(2, "tall_strips")
        products = self._multiply(left, right, "strip_gram")
        shape = [2, groups, moves, features, 2 * moves, features]
        blocks = self._reshape(products, shape, "strip_blocks")
        pairs = self.write.op("Transpose", [blocks], "strip_pairs", {"perm": [0, 2, 4, 1, 3, 5]})
        return self._reshape(pairs, [4 * moves**2, groups, features, features], "strip_products")

    def _row_pairs(self, lags: list[ir.Value], strips: ir.Value) -> ir.Value:
        """S(j, j') for j < j', halves for j = j', else 0: (lags, lags, groups, f, f)."""
        count, shape = self.form.lags, [self.sizes.groups, self.features, self.features]
        size = math.prod(shape)
        products = [self._reshape(lag, [1, size], "lag_products") for lag in lags]
        products.append(self._reshape(strips, [-1, size], "strip_terms"))
        terms = self.write.op("Concat", products, "terms", {"axis": 0})
        weights = self.write.constant(_terms_of_pairs(count), "terms_of_pairs")
        pairs = self.write.op("MatMul", [weights, terms], "pair_terms")
        return self._reshape(pairs, [count, count, *shape], "row_pairs")

    def _of_patches(self, pairs: ir.Value) -> ir.Value:
        """From pairs of blocks to pairs of patches: sums along diagonals of the blocks' columns."""
        write, sizes, form = self.write, self.sizes, self.form
        if form.block == 1:
            return pairs
        assert sizes.geometry is not None
        stride, kernel = sizes.geometry.stride[-1], sizes.kernel[-1]
        run = block_columns(sizes, form.block)
        others = self.features // run  # before the column: (channel, kernel row, elements between)
        split = [form.lags, form.lags, sizes.groups, others, run, others, run]
        blocks = self._reshape(pairs, split, "columns_of_blocks")
        axes = write.integers([4, 6], "column_axes")
        shares = []
        for t in range(form.block):
            first = write.integers([t * stride] * 2, "first_columns")
            end = write.integers([t * stride + kernel] * 2, "end_columns")
            shares.append(write.op("Slice", [blocks, first, end, axes], "patch_of_block"))
        return write.op("Sum", shares, "patch_pairs")

    def _in_weight_order(self, pairs: ir.Value) -> ir.Value:
        """From (lag, lag, groups, rows, rows) to ([groups,] n, n) in the order of the weight."""
        write, sizes, form = self.write, self.sizes, self.form
        columns, channels, rows = sizes.columns, sizes.group_channels, sizes.kernel[0]
        target = [*self.groups, columns, columns]
        if form.lags == 1:
            return self._reshape(pairs, target, "gram")
        rest = columns // channels // rows  # kernel elements of one kernel row
        split = [form.lags, form.lags, sizes.groups, *[channels, form.rows * rest] * 2]
        parts = self._reshape(pairs, split, "channel_pairs")
        pairs = write.op("Transpose", [parts], "ordered_pairs", {"perm": [2, 3, 0, 4, 5, 1, 6]})
        if form.lags * form.rows > rows:
            full = [sizes.groups, *[channels, form.lags * form.rows, rest] * 2]
            pairs = self._reshape(pairs, full, "kernel_rows")
            first = write.integers([0, 0], "first_kernel_rows")
            end = write.integers([rows, rows], "end_kernel_rows")
            axes = write.integers([2, 5], "kernel_row_axes")
            pairs = write.op("Slice", [pairs, first, end, axes], "own_kernel_rows")
        return self._reshape(pairs, target, "half_gram")

    def _rows(self, value: ir.Value, first: int, end: int, name: str) -> ir.Value:
        """A range of output rows, counted from the end where it is negative."""
        integers = self.write.integers
        bounds = [integers([first], "first_row"), integers([end], "end_row")]
        return self.write.op("Slice", [value, *bounds, integers([2], "row_axis")], name)

    def _reshape(self, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
        return self.write.op("Reshape", [value, self.write.integers(shape, f"{name}_shape")], name)

    def _multiply(self, left: ir.Value, right: ir.Value, name: str = "image_gram") -> ir.Value:
        turned = {"transB": 1}
        return self.write.op("FusedMatMul", [left, right], name, turned, domain=MICROSOFT)

    def _sum_over_images(self, grams: ir.Value, name: str, *, keep: bool = False) -> ir.Value:
        axis = self.write.integers([0], "batch_axis")
        return self.write.op("ReduceSum", [grams, axis], name, {"keepdims": int(keep)})


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


def write_tiled_gram(write: NodeWriter, rows: ir.Value, columns: int, count: int) -> ir.Value:
    """Write XᵀX, (n, n), of X, (R, n), by products of so many equal shares of X's columns."""
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
