"""What TrAct's gradient would be off by on a GPU, were its Gram and factor not in float64.

TF32 is carried out on the CPU, by operands that are rounded to its ten bits. Pieces of `_ROWS` rows
are summed in float32 and added up in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from operator_errors import batch, precondition, relative_error
from stems import LAMBDA, Stem
from tract_fx.preconditioner import PatchGeometry
from tract_fx.preconditioner.patches import patch_matrix

_ROWS = 4096
_LOST_BITS = 13  # float32 has 23 behind the point, TF32 10


def as_tf32(x: Tensor) -> Tensor:
    """Round float32 to the nearest TF32, ties to even; the dtype stays."""
    bits = x.contiguous().view(torch.int32)
    to_even = (bits >> _LOST_BITS) & 1
    half = (1 << (_LOST_BITS - 1)) - 1
    return (bits + half + to_even & -(1 << _LOST_BITS)).view(torch.float32)


def _in_tf32(x: Tensor) -> Tensor:
    rounded = as_tf32(x)
    return rounded @ rounded.mT


def _in_three_tf32(x: Tensor) -> Tensor:
    high = as_tf32(x)
    mixed = high @ as_tf32(x - high).mT
    return high @ high.mT + (mixed + mixed.mT)


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x @ x.mT,
    "TF32": _in_tf32,
    "3 × TF32": _in_three_tf32,
}


def arithmetic_errors(stem: Stem, standardised: bool) -> dict[str, tuple[float, float]] | None:
    """Errors at the operator, for photographs and the layer's own gradient of noise.

    Args:
        stem: The layer.
        standardised: Whether the photographs are; else they are in [0, 255].

    Returns:
        By product: with the factor in float32 and in float64; NaN where there is none. None for
        fewer rows than columns, whose solve is in float64 everywhere.
    """
    torch.manual_seed(0)
    layer: nn.Conv2d | nn.Linear = stem.build()
    x, geometry = batch(stem, standardised), PatchGeometry.of_module(layer)
    if geometry.rows(x) < geometry.columns(x):
        return None
    z = layer(x)
    (gw,) = torch.autograd.grad(z, [layer.weight], torch.randn_like(z))
    wanted = precondition(layer, gw, x, LAMBDA)
    columns = patch_matrix(x, geometry, torch.float32)[0]
    found = {}
    for name, product in PRODUCTS.items():
        total = torch.stack([product(part).double() for part in columns.split(_ROWS, 1)]).sum(0)
        total /= geometry.rows(x)
        total.diagonal().add_(LAMBDA)
        matrix = gw.flatten(1)
        errors = [
            relative_error(_solve(total.to(dtype), matrix.to(dtype)).reshape(gw.shape), wanted)
            for dtype in (torch.float32, torch.float64)
        ]
        found[name] = (errors[0], errors[1])
    return found


def _solve(matrix: Tensor, gw: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solved: Tensor = torch.cholesky_solve(gw.mT, factor).mT
    return torch.where(failed == 0, solved, torch.nan)
