"""Gradients held against central differences of a float64 loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

__all__ = [
    "BOUND",
    "Loss",
    "Slope",
    "Tensors",
    "along",
    "central_difference",
    "directions",
    "size_of",
    "wide",
]

Tensors: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Loss: TypeAlias = Callable[[Tensors], float]

BOUND = 1e-5
"""Largest difference between a gradient along a direction and the loss's slope, relative to the
root of the squares of what each parameter gives to it. Float32 stays below 2e-6 on smooth nets."""

# Steps relative to the parameters. The second one is for losses with kinks near: fewer lie within,
# and float64 still leaves 1e-7 of the slope.
_STEPS = (1e-6, 1e-8)
_COARSER = 10.0

_DOUBT = 10.0
"""How often what two steps disagree in may be what the slope is off by."""


@dataclass(frozen=True)
class Slope:
    """A gradient beside the loss's own slope along one direction.

    Attributes:
        error: Their difference.
        scale: What it is relative to.
        doubt: How well the slope itself is known: what two steps, and both sides, disagree in.
    """

    error: float
    scale: float
    doubt: float

    @property
    def relative(self) -> float:
        """The error, relative; NaN where the gradient or the loss is not finite."""
        return self.error / self.scale if self.scale else math.inf if self.error else 0.0

    def is_right(self, slack: float = 0.0) -> bool:
        """Whether the gradient is that of the loss.

        Args:
            slack: What may be added to the error.

        Returns:
            False also where it can't be told.
        """
        return self.error <= BOUND * self.scale + slack < math.inf

    def is_unclear(self) -> bool:
        """Whether a kink is so near that a right gradient might be as far off."""
        known = BOUND * self.scale + _DOUBT * self.doubt
        return not self.is_right() and self.error <= known < math.inf


def directions(parameters: Tensors, count: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Draw random directions, in each parameter of its own size.

    Args:
        parameters: Where they start.
        count: Their number.
        seed: What they are drawn from.

    Yields:
        A direction by parameter.
    """
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            name: np.asarray(generator.standard_normal(value.shape) * size_of(value))
            for name, value in parameters.items()
        }


def size_of(parameter: np.ndarray) -> float:
    """Measure a step for a parameter, of which biases at zero need one too.

    Args:
        parameter: Its value.

    Returns:
        The root of its mean square, and a thousandth.
    """
    wide = np.asarray(parameter, np.float64)
    return float(np.linalg.norm(wide)) / math.sqrt(max(wide.size, 1)) + 1e-3


def along(loss: Loss, at: Tensors, gradients: Tensors, direction: Tensors) -> Slope:
    """Compare gradients with central differences along a direction.

    Args:
        loss: The loss as a function of the parameters.
        at: The parameters, float64.
        gradients: The gradients there.
        direction: The direction, by parameter.

    Returns:
        The comparison: by two evaluations of the loss where that shows the gradients right, by up
        to nine where they are not, or a kink is near.
    """
    terms = [float(np.vdot(wide(gradients[n]), v)) for n, v in direction.items()]
    found, scale = sum(terms), math.hypot(*terms)

    @functools.cache
    def at_step(step: float) -> float:
        return loss({n: at[n] + step * v for n, v in direction.items()})

    for step in _STEPS:
        slope = _slope(at_step, found, scale, step)
        if not slope.is_unclear():
            break
    return slope


def central_difference(loss: Loss, at: Tensors, direction: Tensors) -> float:
    """Compute a loss's slope.

    Args:
        loss: The loss as a function of the parameters.
        at: The parameters, float64.
        direction: The direction, by parameter.

    Returns:
        The slope.
    """
    step = _STEPS[0]
    above, below = (
        loss({n: at[n] + signed * v for n, v in direction.items()}) for signed in (step, -step)
    )
    return (above - below) / (2 * step)


def _slope(at_step: Callable[[float], float], found: float, scale: float, step: float) -> Slope:
    centred = (at_step(step) - at_step(-step)) / (2 * step)
    slope = Slope(abs(found - centred), max(scale, abs(centred)), 0.0)
    if slope.is_right():
        return slope
    wider = _COARSER * step
    other = (at_step(wider) - at_step(-wider)) / (2 * wider)

    def bend(width: float) -> float:
        return ((at_step(width) - at_step(0.0)) + (at_step(-width) - at_step(0.0))) / width

    # A smooth loss bends in proportion to the step, one with a kink right here by a constant more.
    kink = abs(_COARSER * bend(step) - bend(wider)) / (_COARSER - 1)
    return replace(slope, doubt=abs(centred - other) + kink)


def wide(array: np.ndarray) -> np.ndarray:
    """Bring an array to float64.

    Args:
        array: The array.

    Returns:
        The same numbers.
    """
    return np.asarray(array, np.float64)
