"""A layer's call on fewer rows than columns, with TrAct's gradient from the output's gradient.

gW (XᵀX/R + λI)⁻¹ = dzᵀ (XXᵀ/R + λI)⁻¹ X, with gW = dzᵀX (arXiv 2410.23970, section 3, and the
push-through identity): an R × R system, and no way back from gW to the space of X's rows. Nothing
but this call is preconditioned, whatever else the weight's gradient has, a penalty's share say.
The layer's function runs inside, so that it suits calls whose input needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tract_fx import torch_private
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.operators import precondition
from tract_fx.preconditioner.patches import patch_matrix
from tract_fx.preconditioner.products import add_products, mirror_
from tract_fx.preconditioner.settings import CallSettings

__all__ = ["FewRows", "few_rows_gradient", "suits_few_rows"]

# Products up to which float64 takes no longer than asking whether float32 does.
_SMALL = 5e5

# Rows from which half of XXᵀ is left out of the products: below, it is one tile.
_TILED = 128

# Largest estimates of relative errors for which a result counts. On noise and photographs, 16 to
# 1024 of them, standardised and in [0, 255], a float32 error was 0.1 to 0.65 of its estimate.
_LARGEST_ERROR = {torch.float32: 2e-5, torch.float64: 4e-12}


def suits_few_rows(weight: Tensor, bias: Tensor | None, x: Tensor, settings: CallSettings) -> bool:
    """Tell whether a call may be made by `FewRows`.

    Args:
        weight: The layer's weight, whose gradient is wanted.
        bias: Its bias or None.
        x: Its input.
        settings: The rest of the call.

    Returns:
        Whether there are fewer rows than columns, on a CPU, all is float32 or float64 in full
        precision, and nobody looks at operators or functions.
    """
    geometry, dtype = settings.geometry, weight.dtype
    tensors = (weight, x) if bias is None else (weight, x, bias)
    return (
        0 < geometry.rows(geometry.batched(x)) < math.prod(weight.shape[1:])
        and x.device.type == "cpu"
        and settings.input_dtype is None
        and dtype in (torch.float32, torch.float64)
        and all(tensor.dtype == dtype for tensor in tensors)
        and not torch_private.operators_are_seen(*tensors)
        and not torch_private.functions_are_seen()
        and not torch_private.product_rounding(x.device, bool(geometry.kernel))
    )


class FewRows(torch.autograd.Function):
    """A layer's function of (input, weight, bias), with TrAct's gradient for the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        settings: CallSettings,
    ) -> Tensor:
        """Run the function.

        Args:
            ctx: What the backward pass gets to see.
            weight: The weight.
            bias: The bias or None.
            x: The input.
            function: The layer's function, with all arguments but these.
            settings: What TrAct needs to know of it.

        Returns:
            The function's result.
        """
        ctx.save_for_backward(x)
        ctx.settings, ctx.shape = settings, weight.shape
        return function(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients.

        Args:
            ctx: What the forward pass has kept.
            dz: The output's gradient.

        Returns:
            Those of weight and bias.
        """
        for_weight = for_bias = None
        geometry = ctx.settings.geometry
        if ctx.needs_input_grad[1]:
            summed = [d for d in range(dz.dim()) if d != dz.dim() - 1 - len(geometry.kernel)]
            for_bias = dz.sum(summed) if summed else dz
        if ctx.needs_input_grad[0]:
            (x,) = ctx.saved_tensors
            gradient, images = _gradient_rows(dz, geometry), geometry.batched(x)
            seen = torch_private.operators_are_seen(dz, x) or not torch_private.is_of_cpu(dz)
            if torch.is_grad_enabled() or seen:
                plain = gradient.mT @ _rows(images, geometry, x.dtype)
                for_weight = precondition(plain.reshape(ctx.shape), x, ctx.settings)
            else:
                with torch_private.full_precision(x.device):
                    found = few_rows_gradient(gradient, images, ctx.settings)
                for_weight = found.reshape(ctx.shape)
        return for_weight, for_bias, None, None, None


def few_rows_gradient(dz: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    """Compute dzᵀ (XXᵀ/R + λI)⁻¹ X per group.

    In float32 or float64, the system and the product each, by what the numbers allow. Where rows
    depend on each other and λ is small, the solution may be so large that what X takes away of it
    again is lost in rounding, even in float64: then by X's singular values.

    Args:
        dz: The output's gradient, (groups, R, out/groups), float32 or float64.
        x: The input, (N, C, *spatial), of the same dtype.
        settings: λ and how the layer reads it.

    Returns:
        (groups, out/groups, n) in the dtype of `dz`; all NaN for a group whose part of X is not
        finite.
    """
    lambda_, geometry = settings.lambda_, settings.geometry
    rows = _rows(x, geometry, x.dtype)
    _, count, columns = rows.shape
    single = x.dtype == torch.float32
    if single and count * columns * (count + dz.shape[2]) > _SMALL:
        system = _System.solved(rows, dz, lambda_)
        if system.holds():
            result = system.solution.mT @ rows
            if system.gives(result, x.dtype):
                return result
    wide = rows.double()
    system = _System.solved(wide, dz.double(), lambda_)
    if single:
        result = system.solution.float().mT @ rows
        if system.gives(result, x.dtype):
            return result
    result = system.solution.mT @ wide
    finite = system.trace.isfinite()
    if not system.gives(result, x.dtype) and bool(finite.all()):
        return _by_singular_values(dz.double(), wide, lambda_).to(dz.dtype)
    return torch.where(finite[:, None, None], result, torch.nan).to(dz.dtype)


def _by_singular_values(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """The same by X = U S Vᵀ: dzᵀ U S/(S²/R + λ) Vᵀ, without singular values that are rounding."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rounding = rows.shape[2] * torch.finfo(rows.dtype).eps * values[:, :1]
    damped = values / (values.square() / rows.shape[1] + lambda_)
    damped = torch.where(values > rounding, damped, 0.0)
    result: Tensor = (dz.mT @ left * damped[:, None]) @ right
    return result


@dataclass(frozen=True)
class _System:
    """(XXᵀ + λR I) z = R dz, solved per group.

    Attributes:
        solution: z, (groups, R, out/groups).
        trace: The trace of XXᵀ, (groups).
        pivot: The least of the factor's pivots, (groups); NaN where there is no factor.
    """

    solution: Tensor
    trace: Tensor
    pivot: Tensor

    @classmethod
    def solved(cls, rows: Tensor, dz: Tensor, lambda_: float) -> _System:
        """Solve it, for rows (groups, R, n)."""
        count = rows.shape[1]
        if count > _TILED and rows.dtype == torch.float32:
            sums = rows.new_zeros((len(rows), count, count), dtype=torch.float64)
            add_products(sums, rows.mT, count)
            matrix = sums.to(rows.dtype)
            mirror_(matrix)
        else:
            matrix = rows @ rows.mT
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        trace = diagonal.sum(-1)
        diagonal += lambda_ * count
        factor, info = torch.linalg.cholesky_ex(matrix)
        pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1).square()
        pivot = torch.where(info == 0, pivot, torch.nan)
        return cls(torch.cholesky_solve(dz, factor).mul_(count), trace, pivot)

    def holds(self) -> bool:
        """Whether the solution does: its error is about eps · trace / √R over the least pivot."""
        dtype, count = self.solution.dtype, self.solution.shape[1]
        error = torch.finfo(dtype).eps * self.trace / count**0.5
        return bool((error <= _LARGEST_ERROR[dtype] * self.pivot).all())

    def gives(self, result: Tensor, wanted: torch.dtype) -> bool:
        """Whether the product with X does: its error is about eps · ‖z‖ · ‖X‖."""
        eps, largest = torch.finfo(result.dtype).eps, _LARGEST_ERROR[wanted]
        error = eps * torch.linalg.matrix_norm(self.solution) * self.trace.sqrt()
        enough = error <= largest * torch.linalg.matrix_norm(result)
        return bool((enough & (self.pivot > 0)).all())


def _rows(x: Tensor, geometry: PatchGeometry, dtype: torch.dtype) -> Tensor:
    """X, (groups, R, n)."""
    return patch_matrix(x, geometry, dtype).mT if geometry.kernel else x.to(dtype)[None]


def _gradient_rows(dz: Tensor, geometry: PatchGeometry) -> Tensor:
    """The output's gradient as (groups, R, out/groups)."""
    if not geometry.kernel:
        return dz.reshape(1, -1, dz.shape[-1])
    dz = geometry.batched(dz)
    split = dz.reshape(len(dz), geometry.groups, dz.shape[1] // geometry.groups, -1)
    rows: Tensor = split.permute(1, 0, 3, 2).reshape(geometry.groups, -1, split.shape[2])
    return rows
