"""Products with the matrix X of a layer's rows, never forming X: they are the layer itself.

X Wᵀ is the layer's forward pass, Zᵀ X its weight gradient, Z W (folded) its input gradient. All
three are differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.layer_kinds import LAYER_KINDS


def apply_rows(x: Tensor, weight: Tensor, geometry: PatchGeometry) -> Tensor:
    """X Wᵀ.

    Args:
        x: The layer's input, in any shape that the layer takes.
        weight: W, (out, C/groups, *kernel).
        geometry: How the layer reads `x`.

    Returns:
        (N, out, *positions).
    """
    x = geometry.batched(x)
    if not geometry.kernel:
        return torch.einsum(
            "rgn,gon->rgo",
            x.unflatten(1, (geometry.groups, -1)),
            weight.unflatten(0, (geometry.groups, -1)),
        ).flatten(1)
    x = geometry.padded(x)
    convolution = LAYER_KINDS[len(geometry.kernel)].function
    return convolution(x, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)


def apply_rows_transposed(z: Tensor, weight: Tensor, x: Tensor, geometry: PatchGeometry) -> Tensor:
    """Z W, its patches added up where they overlap: the transpose of `apply_rows` in `x`.

    Args:
        z: Z, (N, out, *positions).
        weight: W, (out, C/groups, *kernel).
        x: An input, for its shape.
        geometry: How the layer reads `x`.

    Returns:
        The shape of `x`.
    """
    return _transpose(lambda point: apply_rows(point, weight, geometry), x, z)


def outer_rows(z: Tensor, x: Tensor, weight: Tensor, geometry: PatchGeometry) -> Tensor:
    """Zᵀ X: the transpose of `apply_rows` in `weight`.

    Args:
        z: Z, (N, out, *positions).
        x: The layer's input.
        weight: A weight, for its shape.
        geometry: How the layer reads `x`.

    Returns:
        The shape of `weight`.
    """
    return _transpose(lambda point: apply_rows(x, point, geometry), weight, z)


def _transpose(linear: Callable[[Tensor], Tensor], point: Tensor, z: Tensor) -> Tensor:
    """Apply the transpose of a linear map to z."""
    _, pullback, *_ = torch.func.vjp(linear, torch.zeros_like(point))
    result: Tensor = pullback(z)[0]
    return result
