"""A layer's call with a backward pass of its own, where that is quicker than the op on its weight.

With fewer rows than columns TrAct's gradient comes from the output's gradient dz at once:
gW (XᵀX/R + λI)⁻¹ = dzᵀ (XXᵀ/R + λI)⁻¹ X, with gW = dzᵀX (arXiv 2410.23970, section 3, and the
push-through identity). That is an R × R system, and no way back from gW to the space of X's rows.
Nothing but this call is preconditioned, whatever else the weight's gradient has, a penalty's share
say. And of a small layer all is computed in float64 by few calls, each of which takes longer than
its numbers.

The layer's function runs inside, so that it suits calls whose input needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tract_fx import torch_private
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.operators import precondition
from tract_fx.preconditioner.patches import patch_matrix
from tract_fx.preconditioner.products import add_products, mirror_
from tract_fx.preconditioner.settings import CallSettings
from tract_fx.preconditioner.solve import MAX_FLOAT32_AMPLIFICATION

__all__ = ["DirectCall", "direct_gradient", "suits_direct_call"]

# Products up to which float64 takes no longer than asking whether float32 does.
_SMALL = 5e5

# Products up to which these few calls take less time than the Gram by pieces, tiles and blocks.
_FEW = 1e7

# Rows from which half of XXᵀ is left out of the products: below, it is one tile.
_TILED = 128

# Sizes up to which the inverse, and a product with it, take less time than two triangular solves.
_INVERTED = 256

# Largest estimates of relative errors for which a result counts. On noise and photographs, 16 to
# 1024 of them, standardised and in [0, 255], a float32 error was 0.1 to 0.65 of its estimate.
_LARGEST_ERROR = {torch.float32: 3e-5, torch.float64: 4e-12}


def suits_direct_call(
    weight: Tensor, bias: Tensor | None, x: Tensor, settings: CallSettings
) -> bool:
    """Tell whether a call may be made, and is quicker, as a `DirectCall`.

    Args:
        weight: The layer's weight, whose gradient is wanted.
        bias: Its bias or None.
        x: Its input, which needs no gradient.
        settings: The rest of the call.

    Returns:
        Whether there are fewer rows than columns, or little of both, on a CPU, all is float32 or
        float64 in full precision, and nobody looks at functions.
    """
    dtype = weight.dtype
    return (
        _is_quicker(x.shape, weight.shape, settings.geometry)
        and dtype in _LARGEST_ERROR
        and x.dtype == dtype
        and (bias is None or (bias.dtype == dtype and type(bias) in (Tensor, torch.nn.Parameter)))
        and x.is_cpu
        and settings.input_dtype is None
        and not torch_private.functions_are_seen()
        and not torch_private.product_rounding(x.device, len(weight.shape) > 2)
    )


@lru_cache(maxsize=1024)
def _is_quicker(x: torch.Size, weight: torch.Size, geometry: PatchGeometry) -> bool:
    batched = geometry.batched(torch.empty(x, device="meta"))
    rows, columns = geometry.rows(batched), math.prod(weight[1:])
    return 0 < rows and 0 < columns and (rows < columns or _work(rows, columns, weight[0]) <= _FEW)


def _work(rows: int, columns: int, outputs: int) -> int:
    return rows * columns * (min(rows, columns) + outputs)


class DirectCall(torch.autograd.Function):
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
            seen = torch_private.operators_are_seen(dz, x) or not torch_private.is_of_cpu(dz)
            if torch.is_grad_enabled() or seen:
                pairs = zip(_gradient_rows(dz, geometry), _rows(x, geometry), strict=True)
                plain = torch.stack([gradient.mT @ rows for gradient, rows in pairs])
                for_weight = precondition(plain.reshape(ctx.shape), x, ctx.settings)
            else:
                for_weight = direct_gradient(dz, x, ctx.settings).reshape(ctx.shape)
        return for_weight, for_bias, None, None, None


def direct_gradient(dz: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    """Compute dzᵀX (XᵀX/R + λI)⁻¹ per group.

    Args:
        dz: The output's gradient, float32 or float64.
        x: The input, of the same dtype.
        settings: λ and how the layer reads it.

    Returns:
        (out, n) in the dtype of `dz`; all NaN for a group whose part of X is not finite.
    """
    geometry, lambda_ = settings.geometry, settings.lambda_
    pairs = zip(_gradient_rows(dz, geometry), _rows(x, geometry), strict=True)
    found = [_group_gradient(gradient, rows, lambda_) for gradient, rows in pairs]
    return found[0] if len(found) == 1 else torch.cat(found)


def _rows(x: Tensor, geometry: PatchGeometry) -> Sequence[Tensor]:
    """X, (R, n) of each group."""
    if not geometry.kernel:
        return (x.reshape(-1, x.shape[-1]),)
    x = geometry.batched(x)
    pads = [before for before, after in geometry.padding if before == after]
    if len(x) == 1 and geometry.groups == 1 and len(pads) == 2:
        # One call for what takes ten; of more images its result has to be copied once more.
        way = (geometry.kernel, geometry.dilation, tuple(pads), geometry.stride)
        return functional.unfold(x, *way).mT.unbind()
    return patch_matrix(x, geometry, x.dtype).mT.unbind()


def _gradient_rows(dz: Tensor, geometry: PatchGeometry) -> Sequence[Tensor]:
    """The output's gradient, (R, out/groups) of each group."""
    if not geometry.kernel:
        return (dz.reshape(-1, dz.shape[-1]),)
    dz = geometry.batched(dz)
    split = dz.reshape(len(dz), geometry.groups, dz.shape[1] // geometry.groups, -1)
    return split.permute(1, 0, 3, 2).reshape(geometry.groups, -1, split.shape[2]).unbind()


def _group_gradient(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """Compute one group's, of (R, out) and (R, n).

    In float32 or float64, the system and the product each, by what the numbers allow. Where rows
    depend on each other and λ is small, the solution may be so large that what X takes away of it
    again is lost in rounding, even in float64: then by X's singular values.
    """  # noqa: DOC201
    (count, columns), single = rows.shape, rows.dtype == torch.float32
    solve = _by_rows if count < columns else _by_columns
    large = _work(count, columns, dz.shape[1]) > _SMALL
    result = None
    with torch_private.full_precision(rows.device) if single and large else nullcontext():
        if single and large:
            result = solve(dz, rows, lambda_, torch.float32)
        if result is None:
            result = solve(dz, rows, lambda_, torch.float64)
    if result is None and not bool(rows.isfinite().all()):
        return rows.new_full((dz.shape[1], columns), torch.nan)
    if result is None:
        result = _by_singular_values(dz.double(), rows.double(), lambda_)
    return result.to(rows.dtype)


def _by_rows(dz: Tensor, rows: Tensor, lambda_: float, dtype: torch.dtype) -> Tensor | None:
    """By the R × R matrix in a dtype; None where the result is not as exact as that of X has to be.

    The solution z has an error of about eps · trace(XXᵀ) / √R over the least pivot, its product
    with X one of eps · ‖z‖ ‖X‖ / ‖Xᵀz‖.
    """  # noqa: DOC201
    count, largest, x = len(rows), _LARGEST_ERROR[rows.dtype], rows.to(dtype)
    if count > _TILED and dtype == torch.float32:
        sums = x.new_zeros((1, count, count), dtype=torch.float64)
        add_products(sums, x.mT[None], count)
        matrix = sums[0].to(dtype)
        mirror_(matrix)
    else:
        matrix = x @ x.mT
    trace = float(matrix.trace())
    matrix.diagonal().add_(lambda_ * count)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not math.isfinite(trace):
        return None
    if dtype == torch.float32:
        pivot = float(factor.diagonal().min()) ** 2
        if not torch.finfo(dtype).eps * trace / count**0.5 <= largest * pivot:
            return None
    wide = dz.to(dtype)
    solution = _solved(factor, wide).mul_(count)
    squared = float(solution.square().sum())
    if not squared > 0:  # no gradient, or NaN
        return solution.mT @ x
    # ‖Xᵀz‖² by the system itself.
    length = count * (float((solution * wide).sum()) - lambda_ * squared)
    magnified = math.sqrt(squared * trace / length) if length > 0 else math.inf
    small = _work(count, rows.shape[1], dz.shape[1]) <= _SMALL
    mean = math.sqrt(squared / solution.numel())
    for product in (dtype,) if small else dict.fromkeys((rows.dtype, dtype)):
        limits = torch.finfo(product)
        if limits.eps * magnified <= largest and limits.tiny < limits.eps * mean:
            return solution.to(product).mT @ (x if product == dtype else rows)
    return None


def _by_columns(dz: Tensor, rows: Tensor, lambda_: float, dtype: torch.dtype) -> Tensor | None:
    """By the n × n matrix in a dtype; None where that is float32 and too coarse, and on failure."""
    x, count = rows.to(dtype), len(rows)
    matrix = x.mT @ x
    trace = float(matrix.trace())
    if dtype == torch.float32:
        amplification = torch.finfo(dtype).eps * trace / (lambda_ * count)
        if not amplification <= MAX_FLOAT32_AMPLIFICATION:
            return None
    matrix.diagonal().add_(lambda_ * count)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not math.isfinite(trace):
        return None
    return _solved(factor, x.mT @ dz.to(dtype)).mul_(count).mT


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """Solve with a Cholesky factor; a product runs several times faster than triangular solves."""
    if len(factor) <= _INVERTED:
        return torch.cholesky_inverse(factor) @ right
    return torch.cholesky_solve(right, factor)


def _by_singular_values(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """By X = U S Vᵀ: dzᵀ U S/(S²/R + λ) Vᵀ, without singular values that are rounding."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps * values[:1]
    damped = values / (values.square() / len(rows) + lambda_)
    damped = torch.where(values > rounding, damped, 0.0)
    result: Tensor = (dz.mT @ left * damped) @ right
    return result
