"""Patches of a layer's input, as strided views that are copied only in part."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tract_fx.preconditioner.geometry import PatchGeometry


def patch_matrix(x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype) -> torch.Tensor:
    """Unfold a whole input.

    Args:
        x: The input, (N, C, *spatial).
        geometry: How the layer reads it.
        dtype: Dtype of the result.

    Returns:
        Xᵀ, shape (groups, n, R).
    """
    return _columns(_patch_view(x.to(dtype), geometry), geometry.groups)


def patch_blocks(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, elements: int
) -> Iterator[torch.Tensor]:
    """Unfold an input piece by piece: over images, and over bands of an image where one is large.

    Args:
        x: The input, (N, C, *spatial).
        geometry: How the layer reads it.
        dtype: Dtype of the pieces.
        elements: How many elements a piece should have at most. A band is at least one position
            of the first spatial dimension.

    Yields:
        Pieces of Xᵀ, shape (groups, n, rows of the piece), whose rows together are all R rows.
    """
    per_image = math.prod(geometry.positions(x)) * x.shape[1] * math.prod(geometry.kernel)
    images = max(1, elements // max(1, per_image))
    for piece in x.split(images):
        view = _patch_view(piece.to(dtype), geometry)
        if per_image <= elements or not geometry.kernel:
            yield _columns(view, geometry.groups)
            continue
        bands = math.ceil(per_image / elements)
        for band in view.split(max(1, view.shape[2] // bands), dim=2):
            yield _columns(band, geometry.groups)


def _patch_view(x: torch.Tensor, geometry: PatchGeometry) -> torch.Tensor:
    """View an input (N, C, *spatial) as its patches (N, C, *positions, *kernel)."""
    x = geometry.padded(x)
    for dim, (k, s, d) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True), start=2
    ):
        x = unfolded(x, dim, k, s, d)
    return x


def unfolded(x: torch.Tensor, dim: int, kernel: int, stride: int, dilation: int) -> torch.Tensor:
    """View one dimension of a padded input as output positions and the kernel's elements.

    Args:
        x: The input.
        dim: The dimension.
        kernel: Kernel size, as are the next two in this dimension.
        stride: Stride.
        dilation: Dilation.

    Returns:
        The view: positions where `dim` was, elements last.
    """
    return x.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]


def _columns(view: torch.Tensor, groups: int) -> torch.Tensor:
    """Copy patches (N, C, *positions, *kernel) to columns (groups, n, rows)."""
    dims = (view.dim() - 2) // 2
    positions = range(2, 2 + dims)
    kernel = range(2 + dims, 2 + 2 * dims)
    columns = view.permute(1, *kernel, 0, *positions)
    rows = math.prod(view.shape[d] for d in (0, *positions))
    entries = math.prod(view.shape[d] for d in (1, *kernel))
    return columns.reshape(groups, entries // groups, rows)
