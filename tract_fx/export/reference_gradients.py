"""Make sure that a training graph's gradients are those of the model as it was given.

ONNX Runtime's optimizer, its gradient builder and the repairs before it are what is checked, so
none of them takes part on the other side: that is the slope of the loss of the forward graph before
the repairs, in numpy.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from tract_fx.errors import ExportError, TractWarning
from tract_fx.export.central_differences import (
    Loss,
    Slope,
    Tensors,
    along,
    central_difference,
    directions,
    size_of,
    wide,
)
from tract_fx.export.reference_comparison import (
    MOST_ROUNDING,
    REMEDY,
    REPORT,
    ROUNDING_UNITS,
    compare_values,
    rounded,
)
from tract_fx.export.reference_model import ReferenceModel
from tract_fx.export.training_session import TrainingSession

__all__ = ["Step", "verify_gradients"]

_DIRECTIONS = 3
_PLACES = 3
"""How often other parameters are tried where a kink is near, or float32 fell on its other side."""

_PATIENCE = 10.0
"""Seconds for one place; where they would not do, one direction has to."""


@dataclass(frozen=True)
class Step:
    """A model's loss in training mode, and where it is looked at.

    Attributes:
        reference: The loss by `onnx.reference`.
        loss: The loss's name there.
        held: What no gradient goes through, and is held where it is while a slope is taken; None
            where there is nothing of the kind.
        session: The plain training graph in ONNX Runtime.
        feeds: The model's inputs and targets.
        parameters: All tensors of the checkpoint.
        trained: Names of those that get gradients.
    """

    reference: ReferenceModel
    loss: str
    held: ReferenceModel | None
    session: TrainingSession
    feeds: Tensors
    parameters: Tensors
    trained: Sequence[str]

    @property
    def start(self) -> dict[str, np.ndarray]:
        """What is trained, in float64."""
        return {name: wide(self.parameters[name]) for name in self.trained}

    def loss_around(self, place: Tensors, feeds: Tensors | None = None) -> Loss:
        """Give the loss in float64 as a function of what is trained.

        Args:
            place: Parameters at which what is held is computed.
            feeds: The inputs, the step's own where None.

        Returns:
            The function, of some of the parameters; the others are as at the place.
        """
        given = self.values_at(place, feeds)
        return lambda moved: float(self.reference.run({**given, **moved})[self.loss])

    def values_at(self, place: Tensors, feeds: Tensors | None = None) -> dict[str, np.ndarray]:
        """Give all that the loss is computed from.

        Args:
            place: Parameters in place of the checkpoint's.
            feeds: The inputs, the step's own where None.

        Returns:
            Inputs, parameters and what is held, by name.
        """
        given = {**self.parameters, **(self.feeds if feeds is None else feeds), **place}
        return given if self.held is None else {**given, **self.held.run(given)}


def verify_gradients(step: Step) -> None:
    """Compare a plain training graph's loss and gradients with the forward graph's loss.

    Args:
        step: The step.

    Raises:
        ExportError: They differ by more than rounding.
    """  # noqa: DOC502 (raised by what it calls)
    loss, at_start, _ = step.session.run(step.feeds, step.parameters)
    count = _affordable(step)
    found = {step.loss: np.asarray(loss)}
    compare_values(step.reference, step.values_at({}), found, "training")
    unclear = False
    first: list[Slope] = []
    for place in range(_PLACES if count == _DIRECTIONS else 1):
        moved = _moved(step, place)
        gradients = step.session.run(step.feeds, moved)[1] if place else at_start
        slopes = _slopes(step, moved, gradients, count, place)
        if all(slope.is_right() for slope in slopes):
            return
        first = first or slopes
        unclear = unclear or any(slope.is_unclear() for slope in slopes)
    if all(slope.is_right(_slack(step, i, slope)) for i, slope in enumerate(first)):
        return
    if not unclear:
        _refuse(step, at_start, max(first, key=_badness))
    warnings.warn(
        TractWarning(
            "the gradients could not be checked to 1e-5 against the model's own loss in float64, "
            "which has kinks too near (max-pooling or ReLU at a tie); nothing else checks them"
        ),
        stacklevel=2,
    )


def _affordable(step: Step) -> int:
    """The number of directions, by what one takes; it is said where they are fewer."""
    start = time.perf_counter()
    step.loss_around({})({})
    seconds = time.perf_counter() - start
    if 2 * _DIRECTIONS * seconds < _PATIENCE:
        return _DIRECTIONS
    warnings.warn(
        TractWarning(
            f"onnx.reference takes {seconds:.0f} s for one forward pass of this model: its "
            "gradients are checked along one random direction instead of three"
        ),
        stacklevel=2,
    )
    return 1


def _slopes(
    step: Step, parameters: Tensors, gradients: Tensors, count: int, seed: int
) -> list[Slope]:
    at = {name: wide(parameters[name]) for name in step.trained}
    loss = step.loss_around(at)
    return [along(loss, at, gradients, direction) for direction in directions(at, count, seed)]


def _moved(step: Step, place: int) -> dict[str, np.ndarray]:
    """The parameters a hundredth away, in float32; at first those of the checkpoint."""
    moved = dict(step.parameters)
    if place:
        generator = np.random.default_rng(100 + place)
        for name in step.trained:
            value = moved[name]
            noise = 0.01 * size_of(value) * generator.standard_normal(value.shape)
            moved[name] = np.asarray(value + noise, value.dtype)
    return moved


def _slack(step: Step, index: int, slope: Slope) -> float:
    """What rounding the inputs and parameters to float32 moves a slope by, a few times."""
    at = step.start
    direction = list(directions(at, index + 1, 0))[index]
    exact = central_difference(step.loss_around(at), at, direction)
    moved = []
    for seed in range(2):
        near = rounded(at, seed)
        loss = step.loss_around(near, rounded(step.feeds, seed))
        moved.append(abs(central_difference(loss, near, direction) - exact))
    return min(ROUNDING_UNITS * max(moved), MOST_ROUNDING * slope.scale)


def _badness(slope: Slope) -> float:
    return slope.relative if slope.relative == slope.relative else np.inf


def _refuse(step: Step, gradients: Tensors, worst: Slope) -> NoReturn:
    """Name the parameter whose gradient is off the most."""
    at = step.start
    loss = step.loss_around(at)
    (direction,) = directions(at, 1, 0)
    slopes = {name: along(loss, at, gradients, {name: v}) for name, v in direction.items()}
    name = max(slopes, key=lambda n: (np.isnan(slopes[n].error), slopes[n].error))
    raise ExportError(
        f"the gradient of {name}, off by {slopes[name].relative:.1e} along a random direction "
        f"(all parameters' together by {worst.relative:.1e})",
        REPORT,
        REMEDY,
    )
