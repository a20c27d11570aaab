"""The solve: a weight gradient times (XᵀX/R + λI)⁻¹, in the form that suits the shape of X.

Rows ≥ columns: Cholesky of the regularised Gram. Rows < columns: in X's row space, by Cholesky of
XXᵀ/R in float64; no n × n matrix is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from tract_fx import torch_private
from tract_fx.errors import UnsupportedLayerError
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.gram_matrix import gram
from tract_fx.preconditioner.patches import patch_matrix

# The Gram in float32 carries an error of about eps·trace, which the solve magnifies by 1/λ. Past
# this product (an input in [0, 255], say) a CPU computes Gram and factor in float64 at once.
# Nothing cheaper was found that holds 2e-5 on photographs: at the operator, with the 768 columns of
# a ViT's 16x16 patches, float32 is off by 7.7e-5, with the factor alone in float64 by 1.7e-5 to
# 3.8e-5, with the Gram alone in float64 by 6e-5 to 7.5e-5. For noise float32 would do (1536
# columns: 5e-7), but only the least pivot tells, after half of the work.
MAX_FLOAT32_AMPLIFICATION = 1e-3
"""Largest eps · trace(XᵀX/R) / λ for which the Gram and its factor stay in float32 on a CPU.

Elsewhere both are always in float64: to read that number would be a synchronisation.
"""

# Numbers that are read at a time to tell: of half precision, a copy of them is made.
_PIECE_ELEMENTS = 1 << 22

# What a weight gradient has outside X's row space is rounding noise where it is smaller, relative
# to the whole, than two units of the dtype it was rounded to and 64 of the one it was added up in.
_ROUNDING_UNITS = 2.0
_SUMMATION_UNITS = 64.0

# What happens to the input first, as a trace names it.
_FIRST_STAGE = {"cholesky": "Gram", "row space": "row space", "no rows": "solve"}


@dataclass(frozen=True)
class SolvePlan:
    """How one weight gradient is preconditioned, settled before any of it is computed.

    Attributes:
        form: `"cholesky"` of the Gram (R ≥ n), `"row space"` (R < n), or `"no rows"`.
        rows: R.
        columns: n, of one group.
        dtype: Dtype of the Gram's products, of the factorisation and of the solve.
        noise: Relative size below which what gW has outside X's row space is rounding.
    """

    form: Literal["cholesky", "row space", "no rows"]
    rows: int
    columns: int
    dtype: torch.dtype
    noise: float


def plan_solve(
    grad_dtype: torch.dtype,
    x: torch.Tensor,
    lambda_: float,
    geometry: PatchGeometry,
    input_dtype: torch.dtype | None = None,
) -> SolvePlan:
    """Settle form and dtype, from shapes and from the flags that the layer runs under.

    On the CPU the input's values are looked at too.

    Args:
        grad_dtype: Dtype of gW.
        x: The layer's input, as `precondition_weight_gradient` takes it.
        lambda_: λ > 0.
        geometry: How the layer reads `x`.
        input_dtype: Autocast's dtype, None for `x`'s own.

    Returns:
        The plan.
    """
    dtype = torch.promote_types(torch.promote_types(grad_dtype, x.dtype), torch.float32)
    noise = _noise(grad_dtype, input_dtype, x.device, bool(geometry.kernel))
    x = geometry.batched(x if input_dtype is None else x.to(input_dtype))
    rows, columns = geometry.rows(x), geometry.columns(x)
    if rows == 0:
        return SolvePlan("no rows", rows, columns, dtype, noise)
    if rows < columns:
        return SolvePlan("row space", rows, columns, torch.float64, noise)
    if x.device.type != "cpu" or (
        dtype == torch.float32 and _float32_is_too_coarse(x, lambda_, geometry)
    ):
        dtype = torch.float64
    return SolvePlan("cholesky", rows, columns, dtype, noise)


def precondition_weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    lambda_: float,
    geometry: PatchGeometry,
    input_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute gW (XᵀX/R + λI)⁻¹ per group (arXiv 2410.23970, section 3).

    In full precision whatever the global flags and autocast say: on the CPU in float32 where that
    is exact enough, else, and on any other device, in float64.

    Args:
        grad: The weight's gradient gW, (out, C/groups, *kernel), floating.
        x: The layer's input: (*, C) for a linear layer, (N, C, *spatial) or (C, *spatial) for a
            convolution. Rounded to `input_dtype` first.
        lambda_: λ > 0.
        geometry: How the layer reads `x`.
        input_dtype: The dtype in which the layer multiplied (autocast's), None for `x`'s own.

    Returns:
        The preconditioned gradient, shape and dtype of `grad`. All NaN for a group whose part of X
        is not finite, or whose factorisation failed; gW/λ where there are no rows.

    Raises:
        UnsupportedLayerError: `grad` and `x` are not of one layer of that geometry.
    """
    with torch.no_grad():
        plan = plan_solve(grad.dtype, x, lambda_, geometry, input_dtype)
        return precondition_by_plan(grad, x, lambda_, geometry, plan, input_dtype)


def precondition_by_plan(
    grad: torch.Tensor,
    x: torch.Tensor,
    lambda_: float,
    geometry: PatchGeometry,
    plan: SolvePlan,
    input_dtype: torch.dtype | None = None,
    *,
    traced: bool = False,
) -> torch.Tensor:
    """Compute gW (XᵀX/R + λI)⁻¹ as planned, in full precision whatever the global flags say.

    Args:
        grad: As `precondition_weight_gradient` takes it, as are the next three and `input_dtype`.
        x: The layer's input.
        lambda_: λ > 0.
        geometry: How the layer reads `x`.
        plan: Form and dtype.
        input_dtype: The dtype in which the layer multiplied.
        traced: Whether this is for a tracer: the Gram is computed in one block, and what failed in
            float32 on the CPU is not done again in float64, so that no step depends on values.

    Returns:
        The preconditioned gradient, shape and dtype of `grad`.

    Raises:
        UnsupportedLayerError: `grad` and `x` are not of one layer of that geometry.
    """
    with torch.no_grad(), torch_private.full_precision(x.device):
        with torch_private.traced_stage(_FIRST_STAGE[plan.form]):
            x = geometry.batched(x if input_dtype is None else x.to(input_dtype))
        matrix = by_groups(grad, x, geometry)
        if plan.form == "no rows":
            result = matrix.to(plan.dtype) / lambda_
        elif plan.form == "row space":
            with torch_private.traced_stage("row space"):
                columns = patch_matrix(x, geometry, plan.dtype) / plan.rows**0.5
            result = row_space_solve(matrix.to(plan.dtype), columns, lambda_, plan.noise)
        else:
            result = _gram_solve(matrix, x, lambda_, geometry, plan.dtype, traced)
        return result.to(grad.dtype).reshape(grad.shape).contiguous()


def by_groups(grad: torch.Tensor, x: torch.Tensor, geometry: PatchGeometry) -> torch.Tensor:
    """Bring a weight gradient to the form in which it is solved for.

    Args:
        grad: gW, (out, C/groups, *kernel).
        x: The layer's input, (N, C, *spatial).
        geometry: How the layer reads it.

    Returns:
        gW, (groups, out/groups, n).

    Raises:
        UnsupportedLayerError: `grad` and `x` are not of one layer of that geometry.
    """
    columns = geometry.columns(x)
    if math.prod(grad.shape[1:]) != columns or x.shape[1] % geometry.groups:
        raise UnsupportedLayerError(
            f"a weight gradient {tuple(grad.shape)} and an input {tuple(x.shape)} in "
            f"{geometry.groups} groups",
            "they are not of one layer",
            "Give precondition_grad the weight, the input and the arguments of one call",
        )
    return grad.reshape(geometry.groups, grad.shape[0] // geometry.groups, columns)


def _noise(
    grad: torch.dtype, input_dtype: torch.dtype | None, device: torch.device, convolution: bool
) -> float:
    """Give the relative size below which what gW has outside X's row space is rounding."""
    rounded = max(torch.finfo(t).eps for t in (grad, input_dtype or grad))
    summed = torch.finfo(torch.promote_types(grad, torch.float32)).eps
    if grad == torch.float32:
        rounded = max(rounded, torch_private.product_rounding(device, convolution))
    return _ROUNDING_UNITS * rounded + _SUMMATION_UNITS * summed


def _gram_solve(
    grad: torch.Tensor,
    x: torch.Tensor,
    lambda_: float,
    geometry: PatchGeometry,
    dtype: torch.dtype,
    traced: bool,
) -> torch.Tensor:
    """Solve by Cholesky of the Gram; (groups, out, n) to the same."""
    factor, ok = _factorise(x, lambda_, geometry, dtype, in_blocks=not traced)
    if not traced and dtype == torch.float32 and not bool(ok.all()):
        dtype = torch.float64
        factor, ok = _factorise(x, lambda_, geometry, dtype)
    # gW P = (P gWᵀ)ᵀ, P = (L Lᵀ)⁻¹ being symmetric. Two solves are quicker than cholesky_solve.
    half = torch.linalg.solve_triangular(factor, grad.to(dtype).mT, upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, half, upper=True).mT
    return torch.where(ok, solved, torch.nan)


def _factorise(
    x: torch.Tensor,
    lambda_: float,
    geometry: PatchGeometry,
    dtype: torch.dtype,
    *,
    in_blocks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor G + λI.

    After a failure LAPACK's factor is finite and solves to a finite wrong answer, hence the flag.
    It stays on the device: no synchronisation.

    Returns:
        The lower factor, (groups, n, n), and whether it may be used, (groups, 1, 1).
    """
    with torch_private.traced_stage("Gram"):
        matrix = gram(x, geometry, dtype, in_blocks=in_blocks)
    with torch_private.traced_stage("factorisation"):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        # The diagonal sums squares: it is not finite if and only if a column is not, or overflowed.
        finite = diagonal.isfinite().all(-1)
        diagonal += lambda_
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, ((info == 0) & finite)[:, None, None]


def _float32_is_too_coarse(x: torch.Tensor, lambda_: float, geometry: PatchGeometry) -> bool:
    """Judge from the mean square of the input, which the Gram's trace is n times of, about."""
    images = max(1, _PIECE_ELEMENTS * len(x) // max(1, x.numel()))
    norms = [float(torch.linalg.vector_norm(piece.float())) for piece in x.split(images)]
    mean_square = sum(norm**2 for norm in norms) / max(x.numel(), 1)
    amplification = torch.finfo(torch.float32).eps * mean_square * geometry.columns(x) / lambda_
    return not amplification <= MAX_FLOAT32_AMPLIFICATION  # also where it is NaN


def row_space_solve(
    grad: torch.Tensor, columns: torch.Tensor, lambda_: float, noise: float
) -> torch.Tensor:
    """Solve in the space of X's rows, by Cholesky of K = XXᵀ/R.

    With gW = Z X inside that space, gW P = Z (K + λI)⁻¹ X. Z = gW Xᵀ/R (K + μI)⁻¹, and refined once
    Z (I + μ (K + μI)⁻¹), with μ at the rounding of K: that leaves a part of (μ/κ)² of an eigenvalue
    κ out, and all of what is rounding alone, as where rows depend on each other.

    A layer's own gradient lies in the row space of X, and what it has outside is rounding, which
    1/λ would only magnify. A gradient penalty's does not lie there. So the outside part counts
    where it rises above `noise` relative to the whole, per group, decided on the device.

    Args:
        grad: gW, (groups, out, n), in float64: K squares what X's condition costs.
        columns: Xᵀ/√R, (groups, n, R), in float64.
        lambda_: λ > 0.
        noise: Relative size below which the outside part is rounding.

    Returns:
        gW P, (groups, out, n); all NaN for a group whose X is not finite, or whose K + λI has no
        factor (λ below the rounding of K).
    """
    with torch_private.traced_stage("row space"):
        gram = columns.mT @ columns
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        mu = torch.finfo(grad.dtype).eps * (gram.shape[-1] * trace + lambda_)
    with torch_private.traced_stage("factorisation"):
        eye = torch.eye(gram.shape[-1], dtype=grad.dtype, device=grad.device)
        thin, thin_info = torch.linalg.cholesky_ex(gram + mu * eye)
        damped, damped_info = torch.linalg.cholesky_ex(gram + lambda_ * eye)
        ok = (thin_info == 0) & (damped_info == 0) & trace[:, 0, 0].isfinite()
    z, outside, is_noise = _split(grad, columns, thin, mu, noise)
    counted = torch.where(ok[:, None, None], (~is_noise).to(grad.dtype) / lambda_, torch.nan)
    return torch.baddbmm(counted * outside, torch.cholesky_solve(z, damped).mT, columns.mT)


def without_rounding(
    grad: torch.Tensor, columns: torch.Tensor, lambda_: float, noise: float
) -> torch.Tensor:
    """Leave out what a gradient has outside the space of X's rows, where that is rounding alone.

    Args:
        grad: As `row_space_solve` takes it, as are the next three.
        columns: Xᵀ/√R.
        lambda_: λ > 0.
        noise: Relative size below which the outside part is rounding.

    Returns:
        gW, (groups, out, n), for a solve in all n dimensions.
    """
    gram = columns.mT @ columns
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    mu = torch.finfo(grad.dtype).eps * (gram.shape[-1] * trace + lambda_)
    eye = torch.eye(gram.shape[-1], dtype=grad.dtype, device=grad.device)
    thin, info = torch.linalg.cholesky_ex(gram + mu * eye)
    _, outside, is_noise = _split(grad, columns, thin, mu, noise)
    return torch.where(is_noise & (info == 0)[:, None, None], grad - outside, grad)


def _split(
    grad: torch.Tensor, columns: torch.Tensor, thin: torch.Tensor, mu: torch.Tensor, noise: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give Zᵀ of the part inside, (groups, R, out), the part outside, and whether it is rounding.

    `thin` is the factor of K + μI.
    """
    # cholesky_solve wants the unknown on the right: Zᵀ throughout.
    z = torch.cholesky_solve((grad @ columns).mT, thin)
    z = z + mu * torch.cholesky_solve(z, thin)
    outside = torch.baddbmm(grad, z.mT, columns.mT, alpha=-1)
    size = torch.linalg.matrix_norm(grad)[:, None, None]
    return z, outside, torch.linalg.matrix_norm(outside)[:, None, None] <= noise * size
