"""The solve with one Gram over the processes of a group: S = Σ XₖᵀXₖ, R = Σ Rₖ.

P = (S/R + λI)⁻¹ is the same in all processes, so that the mean of their gWₖ P, by whatever reduces
gradients, is the mean gradient times P: TrAct of the one large batch.

No process chooses by its own rows what all have to do together. At a layer's first time they tell
each other how many they have. Where all together are n or more, S is added up: n (n + 1)/2 numbers
in float64, in which a rank-deficient S loses nothing; of each gradient the rounding outside of its
own rows' space is left out first. Where they are fewer, X is gathered, R n numbers, for as long as
they are fewer, which is asked each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tract_fx import torch_private
from tract_fx.preconditioner.gram_matrix import gram_sum
from tract_fx.preconditioner.patches import patch_matrix
from tract_fx.preconditioner.process_groups import GramScope, agree, resolve, waited
from tract_fx.preconditioner.settings import CallSettings
from tract_fx.preconditioner.solve import (
    SolvePlan,
    by_groups,
    plan_solve,
    precondition_by_plan,
    row_space_solve,
    without_rounding,
)


@dataclass(frozen=True)
class Shared:
    """Who shares a Gram.

    Attributes:
        group: The process group.
        layer: The layer's name, for errors.
    """

    group: Any
    layer: str


def precondition_over_group(
    grad: Tensor, x: Tensor, settings: CallSettings, scope: GramScope
) -> Tensor:
    """Compute gW (S/R + λI)⁻¹ per group of channels. All processes of the group have to call it.

    Args:
        grad: This process's weight gradient, (out, C/groups, *kernel), floating.
        x: This process's input, as `precondition_weight_gradient` takes it.
        settings: The call's.
        scope: Whose rows the Gram is of.

    Returns:
        The preconditioned gradient, shape and dtype of `grad`. All NaN, in all processes, for a
        group of channels whose part of X is not finite in one of them.

    Raises:
        ProcessGroupError: The processes' layers differ, or not all have come.
        UnsupportedLayerError: `grad` and `x` are not of one layer of that geometry.
    """
    geometry, lambda_ = settings.geometry, settings.lambda_
    with torch.no_grad(), torch_private.full_precision(x.device):
        group = resolve(scope.group)
        plan = plan_solve(grad.dtype, x, lambda_, geometry, settings.input_dtype)
        if group is None:
            return precondition_by_plan(grad, x, lambda_, geometry, plan, settings.input_dtype)
        x = geometry.batched(x if settings.input_dtype is None else x.to(settings.input_dtype))
        matrix = by_groups(grad, x, geometry).double()
        alike = f"λ = {lambda_}, {plan.columns} columns, {geometry}, {x.dtype}"
        fewer = agree(group, scope.layer, alike, plan.rows) < plan.columns
        shared = Shared(group, scope.layer)
        result = _gathered(matrix, x, settings, plan, shared) if fewer else None
        if result is None:
            result = _summed(matrix, x, settings, plan, shared)
        return result.to(grad.dtype).reshape(grad.shape).contiguous()


def _summed(
    grad: Tensor, x: Tensor, settings: CallSettings, plan: SolvePlan, shared: Shared
) -> Tensor:
    """Solve by Cholesky of the Gram of all; (groups, out, n) in float64 to the same."""
    geometry, n = settings.geometry, plan.columns
    packed = x.new_zeros((geometry.groups * packed_size(n) + 1,), dtype=torch.float64)
    if plan.rows:
        packed[:-1] = pack(gram_sum(x, geometry, plan.dtype)).flatten()
        packed[-1] = plan.rows
    work = dist.all_reduce(packed, group=shared.group, async_op=True)
    if plan.form == "row space":  # while the sums are on their way
        columns = patch_matrix(x, geometry, torch.float64) / plan.rows**0.5
        grad = without_rounding(grad, columns, settings.lambda_, plan.noise)
    waited(work, shared.layer)
    gram = unpack(packed[:-1].view(geometry.groups, -1), n) / packed[-1].clamp(min=1)
    return solve_with_gram(grad, gram, settings.lambda_)


def _gathered(
    grad: Tensor, x: Tensor, settings: CallSettings, plan: SolvePlan, shared: Shared
) -> Tensor | None:
    """Solve in the space of the rows of all, the same; None where they are n or more by now."""
    counts = row_counts(plan.rows, shared, x.device)
    if sum(counts) >= plan.columns:
        return None
    if sum(counts) == 0:
        return grad / settings.lambda_
    own = x.new_empty((0, settings.geometry.groups, plan.columns))
    if plan.rows:
        own = patch_matrix(x, settings.geometry, x.dtype).permute(2, 0, 1)
    rows = gather_rows(own, counts, shared)
    columns = rows.permute(1, 2, 0).double() / sum(counts) ** 0.5
    return row_space_solve(grad, columns, settings.lambda_, plan.noise)


def solve_with_gram(grad: Tensor, gram: Tensor, lambda_: float) -> Tensor:
    """Solve by Cholesky of a Gram.

    Args:
        grad: gW, (groups, out, n), in float64.
        gram: XᵀX/R, (groups, n, n), in float64. Changed in place.
        lambda_: λ > 0.

    Returns:
        gW P, (groups, out, n); all NaN for a group whose Gram is not finite or has no factor.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    finite = diagonal.isfinite().all(-1)
    diagonal += lambda_
    factor, info = torch.linalg.cholesky_ex(gram)
    solved = torch.cholesky_solve(grad.mT, factor).mT
    return torch.where(((info == 0) & finite)[:, None, None], solved, torch.nan)


def sum_of_all(matrices: Tensor, shared: Shared) -> Tensor:
    """Add up symmetric matrices over processes.

    Args:
        matrices: This process's, (groups, n, n), in float64.
        shared: The processes.

    Returns:
        The sums.
    """
    packed = pack(matrices)
    waited(dist.all_reduce(packed, group=shared.group, async_op=True), shared.layer)
    return unpack(packed, matrices.shape[-1])


def row_counts(rows: int, shared: Shared, device: torch.device) -> list[int]:
    """Ask all processes how many rows they have.

    Args:
        rows: This process's.
        shared: The processes.
        device: Where the layer runs.

    Returns:
        Each one's.
    """
    counts = _from_all(torch.tensor([rows], device=device), shared)
    return torch.cat(counts).tolist()


def gather_rows(rows: Tensor, counts: Sequence[int], shared: Shared) -> Tensor:
    """Get the rows of all processes.

    Args:
        rows: This process's, (R, groups, n).
        counts: Each one's R.
        shared: The processes.

    Returns:
        All rows, (sum of counts, groups, n).
    """
    # As bytes: a backend may not know the dtype.
    sent = rows.new_zeros((max(counts), *rows.shape[1:]))
    sent[: len(rows)] = rows
    parts = [part.view(rows.dtype) for part in _from_all(sent.view(torch.uint8), shared)]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _from_all(tensor: Tensor, shared: Shared) -> list[Tensor]:
    """Get every process's tensor, all of one shape."""
    size = dist.get_world_size(shared.group)
    parts = list(tensor.new_empty((size, *tensor.shape)).unbind())
    waited(dist.all_gather(parts, tensor, group=shared.group, async_op=True), shared.layer)
    return parts


def packed_size(n: int) -> int:
    """Count the numbers of a packed symmetric matrix.

    Args:
        n: Its size.

    Returns:
        n (n + 1)/2, of the next even n.
    """
    even = n + n % 2
    return even * (even + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """Write symmetric matrices as half their numbers.

    With [[A, B], [Bᵀ, C]], all blocks square: B, and the upper half of A beside the lower of C.

    Args:
        matrix: (groups, n, n).

    Returns:
        (groups, `packed_size(n)`).
    """
    n = matrix.shape[-1]
    matrix = functional.pad(matrix, (0, n % 2, 0, n % 2))
    half = matrix.shape[-1] // 2
    first, last = matrix[:, :half, :half], matrix[:, half:, half:]
    triangles = functional.pad(first.triu(), (1, 0)) + functional.pad(last.tril(), (0, 1))
    return torch.cat([matrix[:, :half, half:], triangles], dim=2).flatten(1)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Read what `pack` has written.

    Args:
        packed: (groups, `packed_size(n)`).
        n: The matrices' size.

    Returns:
        The matrices, (groups, n, n).
    """
    half = (n + 1) // 2
    blocks = packed.view(len(packed), half, 2 * half + 1)
    beside, triangles = blocks[:, :, :half], blocks[:, :, half:]
    upper, lower = triangles[:, :, 1:].triu(), triangles[:, :, :half].tril()
    first, last = upper + upper.triu(1).mT, lower + lower.tril(-1).mT
    top, bottom = torch.cat([first, beside], dim=2), torch.cat([beside.mT, last], dim=2)
    return torch.cat([top, bottom], dim=1)[:, :n, :n]
