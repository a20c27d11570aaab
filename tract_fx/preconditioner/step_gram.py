"""One Gram for several backward passes: S = Σ XᵀX and R added up over them, and over processes.

While a step is open, the layer's backward pass leaves its gradient plain and adds its rows here.
At its end the gradient, which has been summed by then over micro-batches and averaged over
processes, is multiplied once by P = (S/R + λI)⁻¹.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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


class Counting(Protocol):
    """What takes part in a layer's backward passes while it is open."""

    def count(self, grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        """Count one call's rows, and give what its backward pass returns as the gradient.

        Args:
            grad: Its weight's gradient.
            x: What the layer read.
            settings: The call's.
        """


_open: dict[str, Counting] = {}


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
        self._passes: set[int] = set()

    def count(self, grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        """Add one call's rows, and leave its gradient plain, in memory of its own."""
        self.add(grad, x, settings)
        self._passes.add(torch_private.backward_pass())
        return grad.clone()

    def require_counted(self, weight: Tensor, _: Tensor) -> None:
        """Refuse what a backward pass adds to a weight's gradient if no call was counted in it."""
        counted = torch_private.backward_pass() in self._passes
        if not counted and torch_private.adds_to_gradient(weight):
            raise _uncounted(self.scope.layer)

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
        with torch.no_grad(), torch_private.full_precision(weight.device):
            total, solve = self.solver(weight, lambda_)
            local = torch_private.local_part(weight.grad)
            if local is None:
                return
            if not total and bool(local.any()):
                raise _uncounted(self.scope.layer)
            groups = self.geometry.groups
            if local.numel():
                matrix = local.reshape(groups, local.shape[0] // groups, self.columns)
                local.copy_(solve(matrix.double()).reshape(local.shape))

    def solver(
        self, like: Tensor, lambda_: float, span: str = "for a whole step"
    ) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Do what all processes of the group have to do together; the rest is of the gradient.

        Args:
            like: A tensor of the layer's device and, where no row was added, of X's dtype.
            lambda_: λ > 0.
            span: Of which backward passes, for people to read; the same in all processes.

        Returns:
            The rows of all, and gW → gW P of (groups, out, n) in float64.
        """
        group = resolve(self.scope.group)
        counts, shared = [self.rows], None
        if group is not None:
            shared = Shared(group, self.scope.layer)
            alike = f"λ = {lambda_}, {self.columns} columns, {self.geometry}, {span}"
            agree(group, self.scope.layer, alike, self.rows)
            counts = row_counts(self.rows, shared, like.device)
        return sum(counts), self._solver(like, lambda_, counts, shared)

    def _solver(
        self, like: Tensor, lambda_: float, counts: list[int], shared: Shared | None
    ) -> Callable[[Tensor], Tensor]:
        total, n = sum(counts), self.columns
        if 0 < total < n:
            none = like.new_empty((0, self.geometry.groups, n))
            rows = torch.cat(self._kept) if self._kept else none
            if shared is not None:
                rows = gather_rows(rows, counts, shared)
            columns = rows.permute(1, 2, 0).double() / total**0.5
            return lambda grad: row_space_solve(grad, columns, lambda_, self._noise)
        gram = torch.zeros((self.geometry.groups, n, n), dtype=torch.float64, device=like.device)
        if self.rows:
            self._take(gram)
            assert self._sum is not None
            gram = self._sum
        if shared is not None:
            gram = sum_of_all(gram, shared)
        return lambda grad: solve_with_gram(grad, gram / max(1, total), lambda_)


def _uncounted(layer: str) -> TrainerStateError:
    return TrainerStateError(
        f"a gradient of {layer!r} of which tract_step has counted no row",
        "its forward pass ran before the step, with a Gram of its own, or compiled as it was then, "
        "or the backward pass was of the weight alone",
        "Run forward and backward passes inside (after torch.compiler.reset(), if compiled), a "
        "penalty on the weight in one backward pass with them",
    )


def open_step(token: str, gram: Counting) -> None:
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


def counting_of(scope: GramScope) -> Counting | None:
    """Find what counts a layer's rows.

    Args:
        scope: The layer's, with a step.

    Returns:
        It, None once the step is over.
    """
    return _open.get(scope.step)


def count_in_step(grad: Tensor, x: Tensor, settings: CallSettings, scope: GramScope) -> Tensor:
    """Let a call take part in its step, in the backward pass.

    Args:
        grad: The weight's gradient.
        x: What the layer read.
        settings: The call's.
        scope: With a step.

    Returns:
        What the backward pass returns.

    Raises:
        UnsupportedTransformError: The step is over.
    """
    counting = counting_of(scope)
    if counting is None:
        raise UnsupportedTransformError(
            f"a backward pass of {scope.layer!r} whose forward pass ran inside tract_step",
            "the step is over, and its gradient would stay plain",
            "Run forward and backward passes of a step inside one `with tract_step(model):`, or "
            "before tract_steps is removed",
        )
    return counting.count(grad, x, settings)
