"""The Gram matrix of a layer's input patches, without holding all patches in memory.

`gram` and `gram_sum` are the entries. A linear layer's input is multiplied as it lies. Of a
convolution's, what takes less time by a count of products and copies: blocks of the input's rows
(`row_blocks`, where patches overlap), or patches unfolded piece by piece. In all of them products
are in the working dtype and their sums in float64, so that neither memory nor rounding grows with
the batch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.patches import patch_blocks, patch_matrix
from tract_fx.preconditioner.products import (
    Work,
    add_products,
    linear_gram,
    mirror_,
    product_work,
)
from tract_fx.preconditioner.row_blocks import row_block_gram, row_block_work

# Entries of one piece of patches, or of the rows' blocks at a time. On a CPU they should stay in
# the caches between the copy that makes them and the product that reads them; on an accelerator
# they should fill the machine.
_PIECE_ELEMENTS = {"cpu": 1 << 20}
_PIECE_ELEMENTS_ELSEWHERE = 1 << 25

# What copying a number to columns of patches takes, times copying it within rows.
_STRIDED = 1.6

# What the row blocks' many calls take whatever the input's size: 0.3 ms, in multiply-adds.
_CALLS = 3e7


def gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, *, in_blocks: bool = True
) -> torch.Tensor:
    """Compute XᵀX / R for every group (arXiv 2410.23970, section 3; normalised by all rows).

    Args:
        x: The layer's input, (N, C, *spatial), of any floating dtype, with R > 0 rows.
        geometry: How the layer reads it.
        dtype: Dtype of the products, float32 or float64. Pieces are added up in float64.
        in_blocks: Whether the work goes piece by piece; else all patches are unfolded at once, as
            the definition says.

    Returns:
        The Gram matrices, (groups, n, n), in `dtype`; exactly symmetric.
    """
    rows, n = geometry.rows(x), geometry.columns(x)
    if n == 0:
        return x.new_zeros((geometry.groups, 0, 0), dtype=dtype)
    if not in_blocks:
        columns = patch_matrix(x, geometry, dtype)
        upper = ((columns @ columns.mT) / rows).triu()
        return upper + upper.triu(1).mT
    if not geometry.kernel and geometry.groups == 1:
        return linear_gram(x, dtype, dtype).div_(rows)[None]
    matrix = _upper_sum(x, geometry, dtype).div_(rows).to(dtype)
    mirror_(matrix)
    return matrix


def gram_sum(x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype) -> torch.Tensor:
    """Compute XᵀX for every group, to be added to others'.

    Args:
        x: The layer's input, (N, C, *spatial), of any floating dtype, with R > 0 rows.
        geometry: How the layer reads it.
        dtype: Dtype of the products, float32 or float64.

    Returns:
        The sums, (groups, n, n), in float64; exactly symmetric.
    """
    if geometry.columns(x) == 0:
        return x.new_zeros((geometry.groups, 0, 0), dtype=torch.float64)
    if not geometry.kernel and geometry.groups == 1:
        return linear_gram(x, dtype, torch.float64)[None]
    total = _upper_sum(x, geometry, dtype)
    mirror_(total)
    return total


def _upper_sum(x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype) -> torch.Tensor:
    """XᵀX, right on and above the diagonal: (groups, n, n) in float64."""
    # Linear layers side by side, as vmap makes them, are groups too.
    by_rows = bool(geometry.kernel) and _choose(x.shape, geometry)[0]
    compute = row_block_gram if by_rows else _unfolded_gram
    return compute(x, geometry, dtype, _piece_elements(x.device))


def _unfolded_gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, elements: int
) -> torch.Tensor:
    """XᵀX, right on and above the diagonal: (groups, n, n) in float64."""
    n = geometry.columns(x)
    total = x.new_zeros((geometry.groups, n, n), dtype=torch.float64)
    for columns in patch_blocks(x, geometry, dtype, elements):
        add_products(total, columns.mT, n)
        del columns  # before the next piece is made
    return total


@functools.lru_cache(maxsize=256)
def _choose(shape: torch.Size, geometry: PatchGeometry) -> tuple[bool, Work]:
    """Choose blocks of rows or not for a convolution, and count the work."""
    x = torch.empty(shape, device="meta")
    n, rows = geometry.columns(x), geometry.rows(x)
    unfolded = product_work(n, n, rows) + Work(0.0, _STRIDED * rows * n, 0.0)
    unfolded *= geometry.groups
    blocks = row_block_work(shape, geometry)
    return (True, blocks) if blocks.cost + _CALLS < unfolded.cost else (False, unfolded)


@dataclass(frozen=True)
class GramWork:
    """What `gram` does with an input.

    Attributes:
        algorithm: A phrase, for reports.
        multiply_adds: Products that are computed.
        copied: Numbers that are copied on the way, each read and written once.
    """

    algorithm: str
    multiply_adds: float
    copied: float


def gram_work(x: torch.Tensor, geometry: PatchGeometry) -> GramWork:
    """Count what `gram` does with an input.

    Args:
        x: The layer's input, (N, C, *spatial), with R > 0 rows.
        geometry: How the layer reads it.

    Returns:
        The algorithm that it chooses, and its work.
    """
    if not geometry.kernel:
        n = geometry.columns(x)
        work = product_work(n, n, geometry.rows(x))
        return GramWork("product of the input as it lies", work.multiply_adds, 0.0)
    by_rows, work = _choose(x.shape, geometry)
    if by_rows:
        name = "blocks of the input's rows, patches not unfolded"
    else:
        entries = geometry.rows(x) * geometry.columns(x) * geometry.groups
        pieces = math.ceil(entries / _piece_elements(x.device))
        name = "patches unfolded " + ("whole" if pieces <= 1 else f"in {pieces} pieces")
    return GramWork(name, work.multiply_adds, work.copied)


def gram_algorithm(x: torch.Tensor, geometry: PatchGeometry) -> str:
    """Say how `gram` computes the Gram of an input.

    Args:
        x: The layer's input, (N, C, *spatial), with R > 0 rows.
        geometry: How the layer reads it.

    Returns:
        A phrase, for reports.
    """
    return gram_work(x, geometry).algorithm


def _piece_elements(device: torch.device) -> int:
    return _PIECE_ELEMENTS.get(device.type, _PIECE_ELEMENTS_ELSEWHERE)
