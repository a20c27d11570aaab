"""How far a result is off from what it should be: the one meaning that every check has of it.

All is computed in float64, or complex128, entry by entry:

| found, expected | what that entry is off by |
| --- | --- |
| two numbers | their difference |
| the same infinity twice | NaN; nothing where infinities may agree |
| NaN twice | NaN; nothing where all may agree |
| NaN and anything else | NaN |
| an infinity and anything else but NaN | ∞ |

An error of NaN or ∞ is within no tolerance: ask `error <= tolerance`, never `error > tolerance`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:  # arrays come from ONNX Runtime alone, and numpy with it
    import numpy as np

Agreeing: TypeAlias = Literal["numbers", "infinities", "all"]
"""What of equal entries counts as equal: numbers alone, infinities as well, or NaN too.

NaN says of gradients that nothing is known. Of a model's results it may be what they are: the
variance of a single image."""

Values: TypeAlias = "Tensor | np.ndarray[Any, Any]"


def distance(found: Values, expected: Values, agreeing: Agreeing = "numbers") -> float:
    """Compute ‖found − expected‖ in float64.

    Args:
        found: A tensor or an array of any dtype.
        expected: What it should be.
        agreeing: What counts as equal where it is not finite.

    Returns:
        The norm, see above; ∞ for other shapes, 0 for no entries.
    """
    if found.shape != expected.shape:
        return math.inf
    other = _wide(expected)
    one = _wide(found).to(other.device)
    difference = one - other
    if agreeing != "numbers":
        same = one == other
        if agreeing == "all":
            same |= one.isnan() & other.isnan()
        difference = torch.where(same, 0.0, difference)
    return float(torch.linalg.vector_norm(difference))


def relative_error(
    found: Values, expected: Values, least: float = 0.0, agreeing: Agreeing = "numbers"
) -> float:
    """Compute ‖found − expected‖ / ‖expected‖ in float64.

    Args:
        found: A tensor or an array of any dtype.
        expected: What it should be.
        least: A norm of the expected below which the error is relative to this one.
        agreeing: What counts as equal where it is not finite.

    Returns:
        The error. Relative to zero, it is 0 where nothing is off, and else ∞ or NaN.
    """
    off, size = distance(found, expected, agreeing), max(norm(expected), least)
    if size == 0.0:
        return off if off == 0.0 or math.isnan(off) else math.inf
    return off / size


def norm(values: Values) -> float:
    """Compute the norm of what is finite, in float64.

    Args:
        values: A tensor or an array of any dtype.

    Returns:
        The norm, 0 for no entries.
    """
    wide = _wide(values)
    return float(torch.linalg.vector_norm(torch.where(wide.isfinite(), wide, 0.0)))


def _wide(values: Values) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to(torch.complex128 if values.is_complex() else torch.float64)
    dtype = "complex128" if values.dtype.kind == "c" else "float64"
    flat = values.astype(dtype, order="C", copy=True).reshape(-1)  # of a number too an array
    return torch.from_numpy(flat).reshape(values.shape)
