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
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tract_fx import torch_private
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.operators import precondition
from tract_fx.preconditioner.patches import patch_matrix
from tract_fx.preconditioner.products import linear_gram
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

# Rows up to which a product in float32 is one sum: longer ones are added up in float64.
_LONG = 8192

# Sizes beyond which, and below one over which, numbers are not left to float32.
_TINY = 1e-30

# What float64 may lose at most for a result in float32.
_TO_SPARE = 1e-7

# Largest estimates of relative errors for which a result counts.
_LARGEST_ERROR = {torch.float32: 3e-5, torch.float64: 1e-10}


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
        and (bias is None or _is_ordinary(bias, dtype, weight.shape[0]))
        and x.is_cpu
        and settings.input_dtype is None
        and not torch_private.functions_are_seen()
        and not torch_private.product_rounding(x.device, len(weight.shape) > 2)
    )


def _is_ordinary(bias: Tensor, dtype: torch.dtype, outputs: int) -> bool:
    own = type(bias) in (Tensor, torch.nn.Parameter)
    return own and bias.dtype == dtype and bias.shape == (outputs,)


@lru_cache(maxsize=1024)
def _is_quicker(x: torch.Size, weight: torch.Size, geometry: PatchGeometry) -> bool:
    dims = len(geometry.kernel)
    if 0 in weight or (len(x) not in (dims + 1, dims + 2) if dims else not len(x)):
        return False  # nothing to compute, or what the layer itself refuses
    batched = geometry.batched(torch.empty(x, device="meta"))
    rows, columns = geometry.rows(batched), math.prod(weight[1:])
    return 0 < rows and (rows < columns or _work(rows, columns, weight[0]) <= _FEW)


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
        result = function(x, weight, bias)
        # A view of what nobody else has is no view to those who write to it.
        return result.data if result._is_view() else result

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
                with torch_private.without_autocast(x.device):
                    plain = torch.stack([gradient.mT @ rows for gradient, rows in pairs])
                for_weight = precondition(plain.reshape(ctx.shape), x, ctx.settings)
            else:
                found = direct_gradient(dz, x, ctx.settings)
                for_weight = found.reshape(ctx.shape).contiguous()
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
    if len(x) == 1 and geometry.groups == 1 and len(geometry.kernel) == len(pads) == 2:
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
    or columns depend on each other and λ is small, float64 may not do either: then by X's singular
    values.
    """  # noqa: DOC201
    (count, columns), single = rows.shape, rows.dtype == torch.float32
    large = _work(count, columns, dz.shape[1]) > _SMALL
    if single and not large and (result := _quickly(dz, rows, lambda_)) is not None:
        return result.float()
    largest = float(torch.linalg.vector_norm(dz, math.inf))
    if not math.isfinite(largest):
        return _finite_outputs(dz, rows, lambda_)
    if largest == 0:
        return rows.new_zeros((dz.shape[1], columns)) * rows.sum()  # NaN where X has one
    dz = dz / largest
    solve = _by_rows if count < columns else _by_columns
    result = None
    with torch_private.full_precision(rows.device) if single and large else nullcontext():
        if single and large and _TINY < lambda_ * count < 1 / _TINY:
            result = solve(dz, rows, lambda_, torch.float32)
        if result is None:
            result = solve(dz, rows, lambda_, torch.float64)
    if result is None and not bool(rows.isfinite().all()):
        return rows.new_full((dz.shape[1], columns), torch.nan)
    if result is None:
        result = _by_singular_values(dz.double(), rows.double(), lambda_)
    return (result * largest).to(rows.dtype)


def _quickly(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor | None:
    """In float64, of float32 numbers, where that leaves digits to spare; else None.

    With A = XXᵀ + λR I or XᵀX + λR I, whose least eigenvalue is λR at least: an error of
    eps trace(XXᵀ) in A, and those of the products with X.
    """  # noqa: DOC201
    count, x, wide = len(rows), rows.double(), dz.double()
    by_rows, ridge, eps = count < rows.shape[1], lambda_ * count, torch.finfo(torch.float64).eps
    matrix = x @ x.mT if by_rows else x.mT @ x
    trace = float(matrix.trace())
    if not eps * trace < _TO_SPARE * ridge:
        return None
    matrix.diagonal().add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    if by_rows:
        solution = _solved(factor, wide)
        result = solution.mT @ x
        error = trace**0.5 * (1 + (trace / ridge) ** 0.5)
        error *= float(torch.linalg.vector_norm(solution))
        length = float(torch.linalg.vector_norm(result))
    else:
        result = _solved(factor, x.mT @ wide).mT
        length = float(torch.linalg.vector_norm(result))
        error = trace**0.5 * float(torch.linalg.vector_norm(wide)) + trace * length
        error /= ridge
    return result.mul_(count) if eps * error <= _TO_SPARE * length else None


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """Solve; for few rows a product runs several times faster than triangular solves."""
    if len(factor) <= _INVERTED:
        return torch.cholesky_inverse(factor) @ right
    return torch.cholesky_solve(right, factor)


def _finite_outputs(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """The same where some outputs' gradients are not finite: NaN for those alone."""
    result = rows.new_full((dz.shape[1], rows.shape[1]), torch.nan)
    finite = dz.isfinite().all(0)
    if bool(finite.any()):
        result[finite] = _group_gradient(dz[:, finite], rows, lambda_)
    return result


def _by_rows(dz: Tensor, rows: Tensor, lambda_: float, dtype: torch.dtype) -> Tensor | None:
    """By the R × R matrix in a dtype; None where the result is not as exact as that of X has to be.

    With A = XXᵀ + λR I, its diagonal D² and H = D⁻¹AD⁻¹, whose rounding is one of its entries: an
    error of eps √R in H w = D⁻¹ dz, with z = R D⁻¹w, gives Xᵀz one of R eps √R ‖w‖ ‖XᵀD⁻¹H⁻¹‖.
    With μ the least eigenvalue of H that norm is below 1/√μ and ‖D⁻¹X‖/μ. The product's own error
    is R eps ‖D⁻¹X‖ ‖w‖.
    """  # noqa: DOC201
    count, largest, x = len(rows), _LARGEST_ERROR[rows.dtype], rows.to(dtype)
    tiled = count > _TILED and dtype == torch.float32
    matrix = linear_gram(x.mT, dtype) if tiled else x @ x.mT
    system = _System.of(matrix, lambda_ * count)
    if system is None:
        return None
    wide = dz.to(dtype)
    inner = system.solve(wide * system.scale)
    solution = inner * (system.scale * count)
    size = count * float(torch.linalg.vector_norm(inner))
    # ‖Xᵀz‖² by the system itself, where nothing cancels.
    along = count * float((solution * wide).sum())
    squared = float(solution.square().sum())
    length = along - lambda_ * count * squared
    if not length > 0.01 * along:
        length = float(torch.linalg.vector_norm(solution.mT @ x)) ** 2
    if not 0 < length < math.inf:
        return None
    magnified, least = size / math.sqrt(length), system.least(inner)
    norm = count**0.5 * min(least**-0.5, system.extent / least)
    if not torch.finfo(dtype).eps * magnified * norm <= largest:
        return None
    magnified *= system.extent
    small = _work(count, rows.shape[1], dz.shape[1]) <= _SMALL
    for product in (dtype,) if small else dict.fromkeys((rows.dtype, dtype)):
        limits = torch.finfo(product)
        within = _TINY**2 < squared < _TINY**-2 or product == torch.float64
        if within and limits.eps * magnified <= largest:
            return solution.to(product).mT @ (x if product == dtype else rows)
    return None


def _by_columns(dz: Tensor, rows: Tensor, lambda_: float, dtype: torch.dtype) -> Tensor | None:
    """By the n × n matrix in a dtype; None where that is too coarse.

    In float32 as the Gram by pieces is, on the same terms. In float64 with H and D as for rows: its
    error and that of D⁻¹Xᵀdz are eps (√n ‖w‖ + ‖XD⁻¹‖ ‖dz‖), and 1/μ of it in w.
    """  # noqa: DOC201
    x, count, columns = rows.to(dtype), *rows.shape
    matrix, ridge, wide = x.mT @ x, lambda_ * count, dz.to(dtype)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32:
        coarse = not eps * float(matrix.trace()) <= MAX_FLOAT32_AMPLIFICATION * ridge
        if count > _LONG or coarse:
            return None
        matrix.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(matrix)
        return None if int(info) else _solved(factor, x.mT @ wide).mul_(count).mT
    system = _System.of(matrix, ridge)
    if system is None:
        return None
    inner = system.solve((x.mT @ wide) * system.scale)
    result = inner * (system.scale * count)
    size, given, length = (float(torch.linalg.vector_norm(t)) for t in (inner, wide, result))
    error = (columns**0.5 * size + system.extent * given) / system.least(inner)
    error *= eps * count * float(system.scale.amax())
    return result.mT if error <= _LARGEST_ERROR[rows.dtype] * length else None


@dataclass(frozen=True)
class _System:
    """D⁻¹ (M + r I) D⁻¹ with a diagonal of ones, factored.

    Attributes:
        scale: D⁻¹, (size, 1).
        extent: ‖D⁻¹X‖, in Frobenius' norm, of X with M = XXᵀ.
        factor: The Cholesky factor.
        inverse: The inverse; None where solving with the factor takes less time.
    """

    scale: Tensor
    extent: float
    factor: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, ridge: float) -> _System | None:
        """Factor a matrix, in place; None where it has no factor or is not finite."""
        matrix.diagonal().add_(ridge)
        scale = matrix.diagonal().rsqrt()[:, None]
        factor, info = torch.linalg.cholesky_ex(matrix.mul_(scale).mul_(scale.mT))
        if int(info) or not math.isfinite(float(factor[-1].sum())):
            return None
        inverse = torch.cholesky_inverse(factor) if len(factor) <= _INVERTED else None
        left = len(factor) - ridge * float(scale.square().sum())
        return cls(scale, math.sqrt(max(0.0, left)), factor, inverse)

    def solve(self, right: Tensor) -> Tensor:
        if self.inverse is None:
            return torch.cholesky_solve(right, self.factor)
        return self.inverse @ right

    def least(self, solved: Tensor) -> float:
        """The least eigenvalue, by inverse iteration from what was solved for."""
        vector = solved.abs().sum(1, keepdim=True)
        for _ in range(2):
            vector = self.solve(vector / torch.linalg.vector_norm(vector))
        return 1 / float(torch.linalg.vector_norm(vector))


def _by_singular_values(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """By X = U S Vᵀ: dzᵀ U (S/R + λ/S)⁻¹ Vᵀ, without singular values that are rounding."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps * values[:1]
    damped = 1 / (values / len(rows) + lambda_ / values)
    damped = torch.where(values > rounding, damped, 0.0)
    result: Tensor = (dz.mT @ left * damped) @ right
    return result
