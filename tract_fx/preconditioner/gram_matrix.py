"""The Gram matrix of a layer's input patches, without holding all patches in memory.

`gram` is the one entry. The patches are unfolded block by block, multiplied in the working dtype
and added up in float64, so that neither memory nor rounding grows with the batch.
"""

from __future__ import annotations

import math
import sys

import torch

from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.patches import patch_blocks

__all__ = ["gram", "gram_algorithm"]

# Entries of one block of patches. On a CPU a block should stay in a core's cache between the copy
# that unfolds it and the product that reads it; on an accelerator it should fill the machine.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 26


def gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, *, in_blocks: bool = True
) -> torch.Tensor:
    """Compute XᵀX / R for every group (arXiv 2410.23970, section 3; normalised by all rows).

    Args:
        x: The layer's input, (N, C, *spatial), of any floating dtype, with R > 0 rows.
        geometry: How the layer reads it.
        dtype: Dtype of the products, float32 or float64. Blocks are added up in float64.
        in_blocks: Whether the patches are unfolded block by block; else all of them at once.

    Returns:
        The Gram matrices, (groups, n, n), in `dtype`.
    """
    elements = _block_elements(x.device) if in_blocks else sys.maxsize
    n = geometry.columns(x)
    total = x.new_zeros((geometry.groups, n, n), dtype=torch.float64)
    for block in patch_blocks(x, geometry, dtype, elements):
        total += block @ block.mT
    return (total / geometry.rows(x)).to(dtype)


def gram_algorithm(x: torch.Tensor, geometry: PatchGeometry) -> str:
    """Say how `gram` computes the Gram of an input.

    Args:
        x: The layer's input, (N, C, *spatial).
        geometry: How the layer reads it.

    Returns:
        A phrase, for reports.
    """
    entries = geometry.rows(x) * geometry.columns(x) * geometry.groups
    blocks = math.ceil(entries / _block_elements(x.device))
    return "patches unfolded whole" if blocks <= 1 else f"patches unfolded in {blocks} blocks"


def _block_elements(device: torch.device) -> int:
    return _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE)
