"""Products of a window's blocks in one Triton kernel, which reads them where they lie.

What `row_blocks` copies block by block and then multiplies is read here by index: a block begins at
an offset by its image, row and place in it, and each of its columns is an offset more. float64 by
tensor cores from compute capability 8.0 on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tract_fx.preconditioner import PatchGeometry
from tract_fx.preconditioner.products import ALIGNED, mirror_
from tract_fx.preconditioner.row_blocks import _Layer
from tract_fx.preconditioner.windows import Window, fill, planes_of

_TURNS = 32  # of a program at least


@dataclass(frozen=True)
class Tiles:
    """How a program works.

    Attributes:
        side: Columns of L and of M.
        depth: Blocks of one turn.
        warps: Warps.
    """

    side: int
    depth: int
    warps: int


@triton.jit
def _products(
    x,
    sums,
    total,
    share,
    rows,
    blocks,
    s_image,
    s_row,
    s_block,
    s_kernel,
    run: tl.constexpr,
    left_columns: tl.constexpr,
    all_columns: tl.constexpr,
    tile: tl.constexpr,
    depth: tl.constexpr,
):
    """Write a tile of LᵀM, summed over a share of the blocks, for columns L of M."""
    i = tl.program_id(0) * tile + tl.arange(0, tile)
    j = tl.program_id(1) * tile + tl.arange(0, tile)
    if tl.program_id(1) < tl.program_id(0):  # below the diagonal
        return
    at_i = (i // run) * s_kernel + i % run
    at_j = (j // run) * s_kernel + j % run
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, total)
    acc = tl.zeros((tile, tile), tl.float64)
    for start in range(first, last, depth):
        k = start + tl.arange(0, depth)
        base = (k // (rows * blocks)).to(tl.int64) * s_image
        base += k // blocks % rows * s_row + k % blocks * s_block
        there = k < last
        left = tl.load(
            x + base[None, :] + at_i[:, None],
            mask=there[None, :] & (i < left_columns)[:, None],
            other=0.0,
        )
        right = tl.load(
            x + base[:, None] + at_j[None, :],
            mask=there[:, None] & (j < all_columns)[None, :],
            other=0.0,
        )
        acc = tl.dot(left.to(tl.float64), right.to(tl.float64), acc, out_dtype=tl.float64)
    at = (
        tl.program_id(2).to(tl.int64) * (left_columns * all_columns)
        + i[:, None] * all_columns
        + j[None, :]
    )
    tl.store(sums + at, acc, mask=(i < left_columns)[:, None] & (j < all_columns)[None, :])


def block_products(
    x: Tensor,
    geometry: PatchGeometry,
    layer: _Layer,
    windows: list[Window],
    dtype: torch.dtype,
    elements: int,
    *,
    tiles: Tiles,
) -> Tensor:
    """Take the place of `row_blocks._block_products`, for one group; the products are in float64.

    Args:
        x: The layer's input, as the rest is what that function takes.
        geometry: How the layer reads it.
        layer: The layer and its plan.
        windows: Windows of one size.
        dtype: Not used.
        elements: Numbers of the input, with its padding, that are copied at a time.
        tiles: How a program works.

    Returns:
        (windows, 1, left, run, kernel rows, run).
    """
    (rows, columns), kernel = windows[0].positions, windows[0].kernel[0]
    width = min(layer.plan.width, columns)
    blocks, run, left = (
        columns // width,
        layer.plan.run(windows[0], layer.channels),
        layer.plan.left,
    )
    read = (windows[0].read(0, rows), windows[0].read(1, columns), layer.channels)
    images = min(len(x), max(1, elements // (layer.planes * math.prod(read))))
    grid = (math.ceil(left * run / tiles.side), math.ceil(kernel * run / tiles.side))
    found = []
    for window in windows:
        room = x.new_zeros(images * layer.planes * math.prod(read) + ALIGNED)
        padded = room[:-ALIGNED].view(1, images * layer.planes, *read)
        _, s_image, s_row, s_column, _ = padded.stride()
        total = x.new_zeros((left * run, kernel * run), dtype=torch.float64)
        for piece in x.split(images):
            planes = planes_of(piece, geometry)
            fill(padded, planes, window)
            count = planes.shape[1] * rows * blocks
            turns = math.ceil(count / (tiles.depth * _splits(x, grid)))
            share = tiles.depth * max(_TURNS, turns)
            sums = x.new_zeros(
                (math.ceil(count / share), left * run, kernel * run), dtype=torch.float64
            )
            _products[(*grid, len(sums))](
                room,
                sums,
                count,
                share,
                rows,
                blocks,
                s_image,
                window.stride[0] * s_row,
                width * window.stride[1] * s_column,
                window.dilation[0] * s_row,
                run=run,
                left_columns=left * run,
                all_columns=kernel * run,
                tile=tiles.side,
                depth=tiles.depth,
                num_warps=tiles.warps,
            )
            total += sums.sum(0)
        mirror_(total[:, : left * run])  # what lies below was left out, by tiles
        found.append(total.view(1, left, run, kernel, run))
    return torch.stack(found)


def _splits(x: Tensor, grid: tuple[int, int]) -> int:
    """Programs along the blocks, so that all of them fill the device four times."""
    there = x.is_cuda and torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(1, 4 * (there or 1) // math.prod(grid))
