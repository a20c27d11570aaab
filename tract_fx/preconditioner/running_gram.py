"""One Gram for all backward passes between two `zero_grad`, with no end that somebody tells of.

After each of them what has been returned as gradients adds up to (Σ gW) P: the plain gradients of
all calls so far, times P = (S/R + λI)⁻¹ of all their rows. A call returns the difference to what
the calls before it have returned. Whatever adds up and averages gradients does so with differences,
too, and after the last call before the optimizer's step, whichever that is, the gradient is that of
the one large batch.

A step begins where the gradient is no longer the tensor that the last backward pass has left.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from tract_fx import torch_private
from tract_fx.errors import TrainerStateError, UnsupportedTransformError
from tract_fx.preconditioner.global_gram import precondition_over_group
from tract_fx.preconditioner.process_groups import GramScope
from tract_fx.preconditioner.settings import CallSettings
from tract_fx.preconditioner.solve import by_groups
from tract_fx.preconditioner.step_gram import StepGram, counting_of


class RunningGram:
    """What the backward passes of one layer have read and returned since its gradient was cleared.

    Args:
        scope: Of the layer, with the step.
        layer: The layer, which has a parameter `weight`.
    """

    def __init__(self, scope: GramScope, layer: nn.Module) -> None:
        self._scope, self._layer = scope, ref(layer)
        self._pass: int | None = None
        # FSDP2 has one of the part and one of the whole, each with gradients at times.
        self._weights: list[Tensor] = []
        self._left: list[tuple[Tensor, int, Tensor]] = []
        self._step: StepGram | None = None
        self._plain = self._returned = torch.zeros(())

    def count(self, grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        """Count one call's rows and gradient.

        Args:
            grad: Its weight's gradient.
            x: What the layer read.
            settings: The call's.

        Returns:
            What makes the sum of all that was returned the sum of all gradients times the P of all
            rows; for a gradient that is not added to the parameter's, that of the call by itself.

        Raises:
            TrainerStateError: The gradient was changed since the last backward pass, or is gone at
                the end of this one.
            UnsupportedTransformError: There is no backward pass.
        """
        number, weight = torch_private.backward_pass(), self._weight()
        if number < 0:
            raise UnsupportedTransformError(
                f"a gradient of {self._scope.layer!r} outside of a backward pass",
                "tract_steps adds up what backward passes add to the weight's gradient",
                "Use loss.backward(), or leave tract_steps out",
            )
        if not torch_private.adds_to_gradient(weight):
            return precondition_over_group(grad, x, settings, self._scope)
        if number != self._pass:
            if not self._goes_on():
                self._step = None
            self._pass = number
            torch_private.after_backward_pass(self.see)
        with torch.no_grad(), torch_private.full_precision(x.device):
            return self._difference(grad, x, settings)

    def _difference(self, grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        matrix = by_groups(grad, settings.geometry.batched(x), settings.geometry).double()
        if self._step is None:
            self._step = StepGram(self._scope, settings.geometry, matrix.shape[-1])
            self._plain, self._returned = torch.zeros_like(matrix), torch.zeros_like(matrix)
        self._step.add(grad, x, settings)
        self._plain += matrix
        like = x if settings.input_dtype is None else x.to(settings.input_dtype)
        _, solve = self._step.solver(like, settings.lambda_, "since the gradient was cleared")
        rounded = (solve(self._plain) - self._returned).to(grad.dtype)
        self._returned += rounded
        return rounded.reshape(grad.shape)

    def _weight(self) -> Tensor:
        layer: Any = self._layer()
        weight: Tensor = layer._parameters["weight"]
        if not any(known is weight for known in self._weights):
            self._weights.append(weight)
        return weight

    def _gradients(self) -> list[Tensor]:
        with torch.no_grad():
            found = (torch_private.local_part(weight.grad) for weight in self._weights)
            return [gradient for gradient in found if gradient is not None]

    def see(self) -> None:
        """Remember the gradient at the end of a backward pass."""
        self._weight()
        self._left = [(g, torch_private.version(g), g.clone()) for g in self._gradients()]
        if not self._left:
            raise TrainerStateError(
                f"no gradient of {self._scope.layer!r} at the end of a backward pass",
                "it lies elsewhere, so that tract_steps can't tell when it is cleared",
                "Leave tract_steps out, or use tract_step in a loop of your own",
            )

    def _goes_on(self) -> bool:
        """Tell whether the gradient is there that the last backward pass has left."""
        found = self._gradients()
        if not found or len(found) != len(self._left):
            return False
        return all(self._is_left(g, *left) for g, left in zip(found, self._left, strict=True))

    def _is_left(self, gradient: Tensor, left: Tensor, version: int, values: Tensor) -> bool:
        moved = gradient is not left
        # DDP moves its buckets once, and all of a bucket's gradients have one version. What is
        # written through `.data` or NumPy has no version.
        alike = moved or torch_private.is_view(gradient)
        alike = alike or torch_private.version(gradient) == version
        if alike and torch.allclose(gradient, values, rtol=0, atol=0, equal_nan=True):
            return True
        if not moved and bool(gradient.any()):
            raise TrainerStateError(
                f"a gradient of {self._scope.layer!r}, changed since the last backward pass",
                "what is to be added to it is the difference to what it was",
                "Clip and unscale gradients in a step's last micro-batch alone (for Accelerate: if "
                "accelerator.sync_gradients), and call zero_grad() after the step; what else has a "
                "gradient for the weight goes into the same backward pass",
            )
        return False


def after_recomputation(scope: str) -> None:
    """Let a step see the gradient at the end of the backward pass that runs a forward pass again.

    Checkpointing of the kind that is reentrant has backward passes inside, which end before it.

    Args:
        scope: The layer's.
    """
    counting = counting_of(GramScope.read(scope))
    if isinstance(counting, RunningGram):
        torch_private.after_backward_pass(counting.see)
