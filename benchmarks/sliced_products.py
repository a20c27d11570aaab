"""XᵀX of float32 from exact products of 8-bit integers, where a device's float64 is slow.

A number is four digits of seven bits, relative to the largest: x = s (q₀/2⁶ + q₁/2¹³ + q₂/2²⁰ +
q₃/2²⁷), |q| ≤ 64. Products of digits are summed in int32 without rounding, as long as there are
2¹⁹ rows or fewer; pairs of 2⁻³⁵ and less are left out (K. Ozaki et al., 2012, for the idea).
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIGITS = 4
_ROWS = 1 << 18


def add_sliced_products(sums: Tensor, matrix: Tensor, left: int) -> None:
    """Take the place of `products.add_products`: add LᵀM to sums.

    Args:
        sums: (groups, left, columns) in float64.
        matrix: M, (groups, rows, columns), float32.
        left: How many columns L has.
    """
    columns = matrix.shape[2]
    for total, group in zip(sums, matrix, strict=True):
        for part in group.split(_ROWS):
            scale, digits = _digits(part)
            for one in range(_DIGITS):
                for other in range(min(_DIGITS, _DIGITS + 1 - one)):
                    product = torch._int_mm(digits[one], digits[other].mT)[:left, :columns]
                    total += product.double() * (2.0 ** -(12 + 7 * (one + other)) * scale**2)


def _digits(matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The power of two above all numbers, and digits, each (columns, rows), int8."""
    _, exponent = torch.frexp(matrix.abs().amax().double())
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    # Rows and columns of what is multiplied are multiples of eight.
    columns, rows = (-(-size // 8) * 8 for size in (matrix.shape[1], matrix.shape[0]))
    rest = matrix.new_zeros((columns, rows))
    rest[: matrix.shape[1], : matrix.shape[0]] = (matrix / scale.float()).mT * 64
    digits = []
    for _ in range(_DIGITS):
        digit = rest.round()
        digits.append(digit.to(torch.int8))
        rest = (rest - digit) * 128
    return scale, digits
