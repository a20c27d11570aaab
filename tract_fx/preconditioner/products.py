"""Products of a matrix with itself: summed in float64, half of them left out, and their count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ALIGNED = 8
"""Matrices whose columns are a multiple of it are multiplied faster."""

# Columns of a tile. Of a symmetric product, tiles below the diagonal are left out.
_TILE = 128

# Rows of a product. One longer is divided, so that what is added up in the working dtype stays
# short. It is no slower: BLAS runs a batch of long, narrow products side by side, and one of them
# not.
_ROWS = 1024

# Such parts of a linear layer's input that are multiplied at a time, and numbers up to which more.
_PARTS = 8
_THIN = 1 << 20

# Times, in multiply-adds of a large product: 11 ps each at 180 GFLOP/s on two Zen 4 cores, where
# copying a number takes 0.2 ns, and beginning a run of neighbouring ones 0.9 ns.
_COPY = 20.0
_RUN = 80.0

# How many columns more each matrix of a product would have in its time at that pace: of 16 columns
# with 48, a third of it is reached, of 80 with 280 two thirds.
_NARROW = 32.0

# What a product takes longer whose rows do not begin at multiples of `ALIGNED` numbers.
_UNALIGNED = 1 / 8


@dataclass(frozen=True)
class Work:
    """What an algorithm does.

    Attributes:
        multiply_adds: Products.
        copied: Numbers that are copied.
        runs: Runs of neighbouring numbers that they are copied in.
        lost: Products that narrow matrices take longer by.
    """

    multiply_adds: float
    copied: float
    runs: float
    lost: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiply_adds + other.multiply_adds,
            self.copied + other.copied,
            self.runs + other.runs,
            self.lost + other.lost,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            self.multiply_adds * factor,
            self.copied * factor,
            self.runs * factor,
            self.lost * factor,
        )

    @property
    def cost(self) -> float:
        """The time it takes, in products of wide matrices."""
        return self.multiply_adds + self.lost + _COPY * self.copied + _RUN * self.runs


def product_work(left: int, columns: int, rows: float) -> Work:
    """Count the work of `add_products`.

    Args:
        left: Columns of the left matrix.
        columns: Columns of the whole.
        rows: Rows.

    Returns:
        The work.
    """
    size = _tile(left)
    below = sum(start * min(size, left - start) for start in range(0, left, size))
    products = left * columns - below
    lost = _NARROW * (left + columns) + _NARROW**2
    if columns % ALIGNED:
        lost += _UNALIGNED * products
    return Work(rows * products, 0.0, 0.0, rows * lost)


def add_products(sums: torch.Tensor, matrix: torch.Tensor, left: int) -> None:
    """Add LᵀM to sums, L being the first columns of M; right on and above LᵀL's diagonal.

    Args:
        sums: (groups, left, columns) in float64.
        matrix: M, (groups, rows, columns), floating.
        left: How many columns L has.
    """
    groups, rows, _ = matrix.shape
    parts = _parts(rows) if groups == 1 else 1
    batch = matrix.unflatten(1, (parts, rows // parts)).flatten(0, 1)
    size = _tile(left)
    for start in range(0, left, size):
        tile = slice(start, min(start + size, left))
        products = batch[:, :, tile].mT @ batch[:, :, start:]
        if parts > 1:
            dtype = sums.dtype if parts > 2 * _PARTS else None
            products = products.sum(0, keepdim=True, dtype=dtype)
        sums[:, tile, start:] += products


def complete_(sums: torch.Tensor, left: int) -> None:
    """Put in what `add_products` leaves out.

    Args:
        sums: What it was given, changed in place.
        left: How many columns L has.
    """
    if _tile(left) < left:
        mirror_(sums[:, :, :left])


def _tile(columns: int) -> int:
    """Divide columns into tiles of one size, a multiple of 16 that is `_TILE` or less."""
    tiles = max(1, math.ceil(columns / _TILE))
    return 16 * max(1, math.ceil(columns / tiles / 16))


def _parts(rows: int) -> int:
    """Divide the rows evenly into parts of `_ROWS` or less, at least two where that pays."""
    wanted = max(math.ceil(rows / _ROWS), 2 if rows >= _TILE else 1)
    return next((parts for parts in range(wanted, 2 * wanted + 1) if rows % parts == 0), 1)


def linear_gram(x: torch.Tensor, dtype: torch.dtype, result_dtype: torch.dtype) -> torch.Tensor:
    """Compute XᵀX of the matrix itself.

    Args:
        x: X, (rows, n), floating.
        dtype: Dtype of the products. Parts of many rows are added up in float64.
        result_dtype: Dtype of the result.

    Returns:
        (n, n).
    """
    count, n = x.shape
    result = x.new_empty((n, n), dtype=result_dtype)
    size = _tile(n)
    rows = _ROWS * max(_PARTS, _THIN // (_ROWS * max(1, n)))
    even = count - count % _ROWS if count > 2 * _ROWS else 0
    for start in range(0, n, size):
        tile = slice(start, min(start + size, n))
        sums = x.new_zeros((1, tile.stop - start, n - start), dtype=torch.float64)
        for piece in (*x[:even, start:].split(rows), x[even:, start:]):
            if piece.shape[0]:
                add_products(sums, piece.to(dtype)[None], sums.shape[1])
        result[tile, start:] = sums[0]
    mirror_(result)
    return result


def mirror_(matrix: torch.Tensor) -> None:
    """Copy what is above the diagonal below it.

    Args:
        matrix: (*, n, n), changed in place.
    """
    n, size = matrix.shape[-1], _tile(matrix.shape[-1])
    for start in range(0, n, size):
        end = start + size
        square = matrix[..., start:end, start:end]
        square.copy_(square.triu() + square.triu(1).mT)
        if end < n:
            matrix[..., end:, start:end] = matrix[..., start:end, end:].mT
