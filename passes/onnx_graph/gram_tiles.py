"""The Gram of a row matrix in tiles, of which those below the diagonal are copies."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from tract_fx.passes.onnx_graph.writer import NodeWriter

__all__ = ["write_tiled_gram"]


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
