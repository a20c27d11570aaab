"""The Gram matrix of a layer's input patches, without holding all patches in memory.

`gram` is the one entry. Overlapping patches go by blocks of the input's rows (`row_blocks`) where
that takes fewer products and copies than unfolding them; all else is unfolded block by block. In
both, products are in the working dtype and their sums in float64, so that neither memory nor
rounding grows with the batch.
"""

from __future__ import annotations

import math
import sys

import torch

from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.patches import patch_blocks
from tract_fx.preconditioner.row_blocks import product_cost, row_block_cost, row_block_gram

__all__ = ["gram", "gram_algorithm"]

# Entries of one block of patches, or of the rows' blocks at a time. On a CPU they should stay in a
# core's cache between the copy that makes them and the product that reads them; on an accelerator
# they should fill the machine.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 26

# Columns of a tile: of the symmetric product, tiles below the diagonal are left out.
_TILE = 128


# Row blocks take more calls for the same work.
_CALLS = 1.1


def gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, *, in_blocks: bool = True
) -> torch.Tensor:
    """Compute XᵀX / R for every group (arXiv 2410.23970, section 3; normalised by all rows).

    Args:
        x: The layer's input, (N, C, *spatial), of any floating dtype, with R > 0 rows.
        geometry: How the layer reads it.
        dtype: Dtype of the products, float32 or float64. Blocks are added up in float64.
        in_blocks: Whether the work goes block by block; else all patches are unfolded at once, as
            the definition says.

    Returns:
        The Gram matrices, (groups, n, n), in `dtype`; exactly symmetric.
    """
    if not in_blocks:
        total = _unfolded_gram(x, geometry, dtype, sys.maxsize, sys.maxsize)
    elif _goes_by_rows(x, geometry):
        total = row_block_gram(x, geometry, dtype, _block_elements(x.device))
    else:
        total = _unfolded_gram(x, geometry, dtype, _block_elements(x.device), _TILE)
    upper = (total / geometry.rows(x)).to(dtype).triu()
    return upper + upper.triu(1).mT


def _unfolded_gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, elements: int, tile: int
) -> torch.Tensor:
    """XᵀX, right on and above the diagonal: (groups, n, n) in float64."""
    n = geometry.columns(x)
    total = x.new_zeros((geometry.groups, n, n), dtype=torch.float64)
    for block in patch_blocks(x, geometry, dtype, elements):
        for start in range(0, n, tile):
            rows = block[:, start : start + tile]
            total[:, start : start + tile, start:] += rows @ block[:, start:].mT
    return total


def _goes_by_rows(x: torch.Tensor, geometry: PatchGeometry) -> bool:
    """Compare products and copies per output position and group."""
    if not geometry.kernel:
        return False
    return _CALLS * row_block_cost(x, geometry) < product_cost(geometry.columns(x))


def gram_algorithm(x: torch.Tensor, geometry: PatchGeometry) -> str:
    """Say how `gram` computes the Gram of an input.

    Args:
        x: The layer's input, (N, C, *spatial).
        geometry: How the layer reads it.

    Returns:
        A phrase, for reports.
    """
    if _goes_by_rows(x, geometry):
        return "blocks of the input's rows, patches not unfolded"
    entries = geometry.rows(x) * geometry.columns(x) * geometry.groups
    blocks = math.ceil(entries / _block_elements(x.device))
    return "patches unfolded whole" if blocks <= 1 else f"patches unfolded in {blocks} blocks"


def _block_elements(device: torch.device) -> int:
    return _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE)
