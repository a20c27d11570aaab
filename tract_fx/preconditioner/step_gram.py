"""One Gram for several backward passes: S = Σ XᵀX and R added up over them, and over processes.

While a step is open, the layer's backward pass leaves its gradient plain and adds its rows here.
At its end the gradient, which has been summed by then over micro-batches and averaged over
processes, is multiplied once by P = (S/R + λI)⁻¹.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tract_fx import torch_private
from tract_fx.errors import TrainerStateError, UnsupportedTransformError
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.global_gram import (
    Shared,
    gather_rows,
    row_counts,
    solve_with_gram,
    sum_of_all,
)
from tract_fx.preconditioner.gram_matrix import gram_sum
from tract_fx.preconditioner.patches import patch_matrix
from tract_fx.preconditioner.process_groups import GramScope, agree, resolve
from tract_fx.preconditioner.settings import CallSettings
from tract_fx.preconditioner.solve import plan_solve, row_space_solve

_open: dict[str, StepGram] = {}


class StepGram:
    """What the backward passes of one layer in one step have read.

    X itself is kept while it has fewer rows than columns, and no more numbers than the Gram then;
    after that the Gram's sum alone.

    Args:
        scope: Of the layer, with the step.
        geometry: How the layer reads its input.
        columns: n, of one group.

    Attributes:
        rows: How many rows have been added.
    """

    def __init__(self, scope: GramScope, geometry: PatchGeometry, columns: int) -> None:
        self.scope, self.geometry, self.columns = scope, geometry, columns
        self.rows = 0
        self._kept: list[Tensor] = []
        self._sum: Tensor | None = None
        self._noise = 0.0

    def add(self, grad: Tensor, x: Tensor, settings: CallSettings) -> None:
        """Add one call's rows.

        Args:
            grad: Its weight's gradient, for its dtype.
            x: What the layer read.
            settings: The call's.
        """
        geometry = settings.geometry
        with torch.no_grad(), torch_private.full_precision(x.device):
            plan = plan_solve(grad.dtype, x, settings.lambda_, geometry, settings.input_dtype)
            x = geometry.batched(x if settings.input_dtype is None else x.to(settings.input_dtype))
            self._noise = max(self._noise, plan.noise)
            if not plan.rows:
                return
            self.rows += plan.rows
            if self.rows < self.columns:
                self._kept.append(patch_matrix(x, geometry, x.dtype).permute(2, 0, 1))
            else:
                self._take(gram_sum(x, geometry, plan.dtype))

    def _take(self, addend: Tensor) -> None:
        for rows in self._kept:
            wide = rows.permute(1, 0, 2).double()
            addend += wide.mT @ wide
        self._kept = []
        self._sum = addend if self._sum is None else self._sum.add_(addend)

    def apply_(self, weight: Tensor, lambda_: float) -> None:
        """Multiply a weight's gradient by P, in place. All processes of the group have to.

        Args:
            weight: The weight, whole or a shard of its rows.
            lambda_: λ > 0.

        Raises:
            TrainerStateError: No row was added, and there is a gradient.
        """
        group = resolve(self.scope.group)
        alike = f"λ = {lambda_}, {self.columns} columns, {self.geometry}, for a whole step"
        with torch.no_grad(), torch_private.full_precision(weight.device):
            counts = [self.rows]
            shared = None if group is None else Shared(group, self.scope.layer)
            if shared is not None:
                agree(group, self.scope.layer, alike, self.rows)
                counts = row_counts(self.rows, shared, weight.device)
            solve = self._solver(weight, lambda_, counts, shared)
            local = torch_private.local_part(weight.grad)
            if local is None:
                return
            if not sum(counts) and bool(local.any()):
                raise TrainerStateError(
                    f"a gradient of {self.scope.layer!r} of which tract_step has counted no row",
                    "its layer ran compiled as it was before, or not inside the step",
                    "Call torch.compiler.reset(), and run forward and backward passes inside",
                )
            groups = self.geometry.groups
            if local.numel():
                matrix = local.reshape(groups, local.shape[0] // groups, self.columns)
                local.copy_(solve(matrix.double()).reshape(local.shape))

    def _solver(
        self, weight: Tensor, lambda_: float, counts: list[int], shared: Shared | None
    ) -> Callable[[Tensor], Tensor]:
        """Do what all processes do together; the rest is a function of the gradient."""
        total, n = sum(counts), self.columns
        if 0 < total < n:
            like = weight.new_empty((0, self.geometry.groups, n))
            rows = torch.cat(self._kept) if self._kept else like
            if shared is not None:
                rows = gather_rows(rows, counts, shared)
            columns = rows.permute(1, 2, 0).double() / total**0.5
            return lambda grad: row_space_solve(grad, columns, lambda_, self._noise)
        gram = torch.zeros((self.geometry.groups, n, n), dtype=torch.float64, device=weight.device)
        if self.rows:
            self._take(gram)
            assert self._sum is not None
            gram = self._sum
        if shared is not None:
            gram = sum_of_all(gram, shared)
        return lambda grad: solve_with_gram(grad, gram / max(1, total), lambda_)


def open_step(token: str, gram: StepGram) -> None:
    """Let the calls with that token add their rows.

    Args:
        token: The step's, in the layer's scope.
        gram: Where to.
    """
    _open[token] = gram


def close_step(token: str) -> None:
    """Let no more calls add their rows.

    Args:
        token: The step's.
    """
    _open.pop(token, None)


def count_in_step(grad: Tensor, x: Tensor, settings: CallSettings, scope: GramScope) -> Tensor:
    """Add a call's rows to its step's, in the backward pass.

    Args:
        grad: The weight's gradient.
        x: What the layer read.
        settings: The call's.
        scope: With a step.

    Returns:
        The gradient as it is, in memory of its own.

    Raises:
        UnsupportedTransformError: The step is over.
    """
    gram = _open.get(scope.step)
    if gram is None:
        raise UnsupportedTransformError(
            f"a backward pass of {scope.layer!r} whose forward pass ran inside tract_step",
            "the step is over, and its gradient would stay plain",
            "Run forward and backward passes of a step inside one `with tract_step(model):`",
        )
    gram.add(grad, x, settings)
    return grad.clone()
