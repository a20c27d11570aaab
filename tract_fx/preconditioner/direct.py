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

# Products up to which float64 takes no longer than asking whether float32 does: of all, or of the
# R × R matrix, where X in float32 makes the rest.
_SMALL, _SMALL_SYSTEM = 5e5, 4e6

# Products up to which these few calls take less time than the Gram by pieces, tiles and blocks.
_FEW = 4e7

# Rows from which half of XXᵀ is left out of the products: below, one product takes less time.
_TILED = 768

# Rows up to which a product in float32 is one sum.
_LONG = 8192

# Sizes between one over which and which numbers may be left to a dtype, as may their squares.
_RANGE = {torch.float32: 1e15, torch.float64: 1e150}

# What eps · trace(XXᵀ)/(λR) may be at most, and what float64 may lose, for a result in float32.
_TO_SPARE = {torch.float32: MAX_FLOAT32_AMPLIFICATION, torch.float64: 1e-7}

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
        is_quicker(x.shape, weight.shape, settings.geometry)
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
def is_quicker(x: torch.Size, weight: torch.Size, geometry: PatchGeometry) -> bool:
    """Tell by shapes whether a backward pass of its own is quicker than the op on the weight.

    Args:
        x: The input's shape.
        weight: The weight's.
        geometry: How the layer reads the input.

    Returns:
        Whether there are fewer rows than columns, or little of both.
    """
    dims = len(geometry.kernel)
    if 0 in weight or (len(x) not in (dims + 1, dims + 2) if dims else not len(x)):
        return False  # nothing to compute, or what the layer itself refuses
    batched = geometry.batched(torch.empty(x, device="meta"))
    rows, columns = geometry.rows(batched), math.prod(weight[1:])
    few = _work(rows, columns, weight[0]) <= _FEW and rows <= _LONG
    return 0 < rows and (rows < columns or few)


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
                pairs = zip(_output_gradients(dz, geometry), _rows(x, geometry), strict=True)
                with torch_private.without_autocast(x.device):
                    plain = torch.stack([gradient @ rows for gradient, rows in pairs])
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
    pairs = zip(_output_gradients(dz, geometry), _rows(x, geometry), strict=True)
    rounded = torch_private.product_rounding(x.device, False)
    rounded = rounded or torch.is_autocast_enabled(x.device.type)
    with torch_private.full_precision(x.device) if rounded else nullcontext():
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


def _output_gradients(dz: Tensor, geometry: PatchGeometry) -> Sequence[Tensor]:
    """The output's gradient, (out/groups, R) of each group."""
    if not geometry.kernel:
        return (dz.reshape(-1, dz.shape[-1]).mT,)
    dz = geometry.batched(dz)
    split = dz.reshape(dz.shape[0], geometry.groups, dz.shape[1] // geometry.groups, -1)
    return split.permute(1, 2, 0, 3).reshape(geometry.groups, split.shape[2], -1).unbind()


def _group_gradient(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """Compute one group's, of (out, R) and (R, n).

    In float32 or float64, the system and the product each, by what the numbers allow.
    """
    count, columns = rows.shape
    by_rows, single = count < columns, rows.dtype == torch.float32
    small = _work(count, columns, dz.shape[0]) <= _SMALL
    result = None
    if single and not by_rows:
        result = _quickly_by_columns(dz, rows, lambda_, small)
    elif single and (small or count * count * columns <= _SMALL_SYSTEM):
        result = _quickly_by_rows(dz, rows, lambda_)
    if result is None and single and by_rows and not small:
        result = _by_rows(dz, rows, lambda_, torch.float32)
    return _scaled_gradient(dz, rows, lambda_) if result is None else result


def _scaled_gradient(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """The same in float64, with dz divided by its largest number.

    Where rows or columns depend on each other and λ is small, float64 may not do either: then by
    X's singular values.
    """
    count, columns = rows.shape
    largest = max(map(abs, map(float, torch.aminmax(dz))))
    if not math.isfinite(largest):
        return _finite_outputs(dz, rows, lambda_)
    if largest == 0:
        return rows.new_zeros((dz.shape[0], columns)) * rows.sum()  # NaN where X has one
    dz = dz.double() / largest  # in float32 it would be another gradient by its rounding
    if count < columns:
        result = _by_rows(dz, rows, lambda_, torch.float64)
    else:
        result = _by_columns(dz, rows, lambda_)
    if result is None and not bool(rows.isfinite().all()):
        return rows.new_full((dz.shape[0], columns), torch.nan)
    if result is None:
        result = _by_singular_values(dz.double(), rows.double(), lambda_)
    return (result * largest).to(rows.dtype)


def _quickly_by_rows(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor | None:
    """With A = XXᵀ + λR I in float64, of float32 numbers, where that leaves digits to spare.

    The least eigenvalue of A is λR at least: an error of eps trace(XXᵀ) in A, and that of the
    product with X, in float32.
    """
    x, wide, count = rows.double(), dz.double(), rows.shape[0]
    ridge, eps = lambda_ * count, torch.finfo(torch.float64).eps
    matrix = x @ x.mT
    trace = float(matrix.trace())
    if not eps * trace < _TO_SPARE[torch.float64] * ridge:
        return None
    system = _Factored.of(matrix, ridge, dz.shape[0])
    if system is None:
        return None
    solution = system.solve(wide)
    size, length = _lengths(solution, wide, ridge)
    extent, rounding = trace**0.5, torch.finfo(torch.float32).eps
    exact = eps * extent * (1 + (trace / ridge) ** 0.5) * size <= _TO_SPARE[torch.float64] * length
    exact = exact and rounding * extent * size <= _LARGEST_ERROR[rows.dtype] * length
    if not (exact and _in_range(torch.float32, size * count)):
        return None
    return solution.mul_(count).float() @ rows


def _lengths(solution: Tensor, right: Tensor, ridge: float) -> tuple[float, float]:
    """‖Z‖, and ‖ZX‖ of Z(XXᵀ + rI) = B by Z, B and r alone: 0 where digits cancel, and of NaN."""
    along, size = float((solution * right).sum()), float(torch.linalg.vector_norm(solution))
    squared = along - ridge * size**2
    return size, math.sqrt(squared) if squared > 0.01 * along else 0.0


def _in_range(dtype: torch.dtype, *sizes: float) -> bool:
    return 1 / _RANGE[dtype] < min(sizes) and max(sizes) < _RANGE[dtype]


def _quickly_by_columns(dz: Tensor, rows: Tensor, lambda_: float, small: bool) -> Tensor | None:
    """With A = XᵀX + λR I, of float32 numbers; None where digits are lost.

    Of little in float64, else in float32 on the terms on which the Gram by pieces is.
    """
    count, dtype = rows.shape[0], torch.float64 if small else torch.float32
    ridge = lambda_ * count
    if not small and (count > _LONG or not _in_range(dtype, ridge)):
        return None
    x, wide = rows.to(dtype), dz.to(dtype)
    matrix = x.mT @ x
    trace, spared = float(matrix.trace()), torch.finfo(dtype).eps / _TO_SPARE[dtype]
    if not spared * trace < ridge:
        return None
    system = _Factored.of(matrix, ridge, dz.shape[0])
    if system is None:
        return None
    result = system.solve(wide @ x)
    length = float(torch.linalg.vector_norm(result))
    if small:
        lost = trace**0.5 * float(torch.linalg.vector_norm(wide)) + trace * length
        exact = spared * lost <= ridge * length
    else:
        exact = _in_range(dtype, length, ridge * length)
    return result.mul_(count).to(rows.dtype) if exact else None


def _finite_outputs(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """The same where some outputs' gradients are not finite: NaN for those alone."""
    result = rows.new_full((dz.shape[0], rows.shape[1]), torch.nan)
    finite = dz.isfinite().all(1)
    if bool(finite.any()):
        result[finite] = _group_gradient(dz[finite], rows, lambda_)
    return result


def _by_rows(dz: Tensor, rows: Tensor, lambda_: float, dtype: torch.dtype) -> Tensor | None:
    """By the R × R matrix in a dtype; None where the result is not as exact as that of X has to be.

    With A = XXᵀ + λR I, its diagonal D² and H = D⁻¹AD⁻¹, whose rounding is one of its entries: an
    error of eps √R in w H = dz D⁻¹, with z = wD⁻¹, gives zX one of eps √R ‖w‖ ‖H⁻¹D⁻¹X‖. With μ
    the least eigenvalue of H that norm is below 1/√μ and ‖D⁻¹X‖/μ. The product's own error is
    eps ‖D⁻¹X‖ ‖w‖.
    """
    count, largest = rows.shape[0], _LARGEST_ERROR[rows.dtype]
    ridge, x = lambda_ * count, rows.to(dtype)
    if not _in_range(dtype, ridge):
        return None
    tiled = count > _TILED and dtype == torch.float32
    matrix = linear_gram(x.mT, dtype, dtype) if tiled else x @ x.mT
    system = _System.of(matrix, ridge, dz.shape[0])
    if system is None:
        return None
    wide = dz.to(dtype)
    inner = system.solve(wide * system.scale)
    solution = inner * system.scale
    size, length = _lengths(solution, wide, ridge)
    length = length or float(torch.linalg.vector_norm(solution @ x))
    if not _in_range(dtype, size, length):
        return None
    magnified = float(torch.linalg.vector_norm(inner)) / length
    least = system.least(inner)
    norm = count**0.5 * min(least**-0.5, system.extent / least)
    if not torch.finfo(dtype).eps * magnified * norm <= largest:
        return None
    magnified *= system.extent
    small = _work(count, rows.shape[1], dz.shape[0]) <= _SMALL
    for product in (dtype,) if small else dict.fromkeys((rows.dtype, dtype)):
        if _in_range(product, size * count) and torch.finfo(product).eps * magnified <= largest:
            return solution.mul_(count).to(product) @ (x if product == dtype else rows)
    return None


def _by_columns(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor | None:
    """By the n × n matrix in float64; None where that is too coarse.

    With H and D as for rows: its error and that of dz XD⁻¹ are eps (√n ‖w‖ + ‖XD⁻¹‖ ‖dz‖), and 1/μ
    of it in w.
    """
    x, wide, count, columns = rows.double(), dz.double(), *rows.shape
    system = _System.of(x.mT @ x, lambda_ * count, dz.shape[0])
    if system is None:
        return None
    inner = system.solve((wide @ x) * system.scale)
    result = inner * (system.scale * count)
    size, given, length = (float(torch.linalg.vector_norm(t)) for t in (inner, wide, result))
    error = (columns**0.5 * size + system.extent * given) / system.least(inner)
    error *= torch.finfo(torch.float64).eps * count * float(system.scale.amax())
    return result if error <= _LARGEST_ERROR[rows.dtype] * length else None


@dataclass(frozen=True)
class _Factored:
    """M + r I = LLᵀ.

    Attributes:
        factor: L.
        inverse: The inverse of LLᵀ, with which a product runs several times faster than solves with
            L; None where computing it takes longer.
    """

    factor: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, ridge: float | Tensor, outputs: int) -> _Factored | None:
        """Factor a matrix, changed in place, to solve for so many outputs; None where it fails."""
        matrix.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            return None
        inverse = torch.cholesky_inverse(factor) if 2 * outputs >= factor.shape[0] else None
        return cls(factor, inverse)

    def solve(self, left: Tensor) -> Tensor:
        """left (LLᵀ)⁻¹."""
        if self.inverse is None:
            return torch.cholesky_solve(left.mT, self.factor).mT
        return left @ self.inverse


@dataclass(frozen=True)
class _System:
    """H = D⁻¹ (M + r I) D⁻¹ with a diagonal of ones.

    Attributes:
        scale: D⁻¹, (size,).
        extent: ‖D⁻¹X‖, in Frobenius' norm, of X with M = XXᵀ.
        factored: H, factored.
    """

    scale: Tensor
    extent: float
    factored: _Factored

    @classmethod
    def of(cls, matrix: Tensor, ridge: float, outputs: int) -> _System | None:
        """Factor a matrix, changed in place; None where it has no factor or is not finite."""
        scale = (matrix.diagonal() + ridge).rsqrt()
        system = _Factored.of(
            matrix.mul_(scale[:, None]).mul_(scale), ridge * scale.square(), outputs
        )
        if system is None or not math.isfinite(float(system.factor[-1].sum())):
            return None
        left = len(matrix) - ridge * float(scale.square().sum())
        return cls(scale, math.sqrt(max(0.0, left)), system)

    def solve(self, left: Tensor) -> Tensor:
        """left H⁻¹."""
        return self.factored.solve(left)

    def least(self, solved: Tensor) -> float:
        """The least eigenvalue, by inverse iteration from what was solved for."""
        vector = solved.abs().sum(0, keepdim=True)
        for _ in range(2):
            vector = self.solve(vector / torch.linalg.vector_norm(vector))
        return 1 / float(torch.linalg.vector_norm(vector))


def _by_singular_values(dz: Tensor, rows: Tensor, lambda_: float) -> Tensor:
    """By X = U S Vᵀ: dz U (S/R + λ/S)⁻¹ Vᵀ, without singular values that are rounding."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps * values[:1]
    damped = 1 / (values / len(rows) + lambda_ / values)
    damped = torch.where(values > rounding, damped, 0.0)
    result: Tensor = (dz @ left * damped) @ right
    return result
