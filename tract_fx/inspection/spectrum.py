"""The eigenvalues of a call's Gram, and TrAct's system for many gradients, factorised once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_fx.reference.observed import ObservedCall

_SIDE = 4096
"""Longest side of a matrix whose eigenvalues are computed, some five seconds on one core."""

_PRODUCTS = 200_000_000_000
"""Products of two numbers that a Gram may take, some ten seconds on one core."""

_ENTRIES = 1 << 26
"""Entries of X in float64 that are held for its row space, 512 MiB."""


@dataclass(frozen=True)
class Spectrum:
    """A call's Gram XᵀX/R and TrAct's system in float64.

    With R < n everything takes place in the rows' own space: X = L Qᵀ with a basis Q of that space,
    L is R × R, and LᵀL/R has the eigenvalues of the Gram that can differ from zero. What a
    gradient in this space becomes has the same norm in both coordinates.

    Attributes:
        eigenvalues: (groups · min(R, n),) descending, zero below the rounding of the largest.
        zeros: How many further eigenvalues are zero because R < n.
        compact: L, (groups, R, R); None with R ≥ n.
        factors: LU factors and pivots of XᵀX/R + λI, or of LᵀL/R + λI.
    """

    eigenvalues: Tensor
    zeros: int
    compact: Tensor | None
    factors: tuple[Tensor, Tensor]

    def coordinates(self, rows: Tensor, start: int) -> Tensor:
        """Give some rows of X, (groups, rows, n), in the coordinates that the system is in.

        That is as they are or, with R < n, as (groups, rows, R); `start` rows come before them.
        """
        if self.compact is None:
            return rows
        return self.compact[:, start : start + rows.shape[1]]

    def precondition(self, vectors: Tensor) -> Tensor:
        """Multiply (groups, *, columns), in these coordinates, with the inverse of XᵀX/R + λI."""
        flat = vectors.flatten(1, -2)
        solved: Tensor = torch.linalg.lu_solve(*self.factors, flat, left=False)
        return solved.reshape(vectors.shape)


def too_large(call: ObservedCall) -> str:
    """Say why a call's eigenvalues would take minutes or gigabytes."""
    n = call.columns
    if n > _SIDE and not call.is_linear:  # its rows come from n output channels
        return (
            f"has {n:,} columns: the statistics of convolutions stop at {_SIDE:,}, where their "
            "rows in float64 fill gigabytes. TrAct itself is not affected"
        )
    rows, per_image = call.row_count, call.row_count // len(call.images)
    size = call.groups * n
    wide = min(n, _SIDE, _ENTRIES // size, math.isqrt(_PRODUCTS // size))  # most rows with R < n
    tall = _PRODUCTS // (size * n) if n <= _SIDE else 0  # and with R ≥ n
    if rows <= wide or n <= rows <= tall:
        return ""
    most = max(wide, tall)
    fewer = f"Inspect with at most {most // per_image:,} of the {len(call.images):,} images"
    return (
        f"multiplies with {rows:,} rows of {n:,} columns: in float64 the Gram and the "
        "eigenvalues of so many take minutes or gigabytes, so there are no statistics. "
        + (fewer if most >= per_image else "TrAct itself is not affected")
    )


def spectrum(call: ObservedCall) -> Spectrum | None:
    """Compute the eigenvalues of a call's Gram and factorise TrAct's system.

    None where the Gram overflows float64. The call has λ, rows and finite input, not `too_large`.
    """
    lambda_, count, n = call.record.lambda_, call.gram_rows, call.columns
    assert lambda_ is not None and count
    compact = None
    if count >= n or call.all_rows is not None:
        gram = call.gram
    else:
        rows = torch.cat([rows for rows, _ in call.chunks()], dim=1)
        compact = torch.linalg.qr(rows.mT, mode="r").R.mT
        gram = compact.mT @ compact / count
    if not torch.isfinite(gram).all():
        return None
    values = torch.linalg.eigvalsh(gram).flatten().sort(descending=True).values
    rounding = max(count, n) * torch.finfo(torch.float64).eps * values[0]
    damped = gram.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(lambda_)
    factors, pivots, _ = torch.linalg.lu_factor_ex(damped)
    return Spectrum(
        eigenvalues=torch.where(values > rounding, values, 0.0),
        zeros=call.groups * max(0, n - count),
        compact=compact,
        factors=(factors, pivots),
    )
