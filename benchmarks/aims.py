"""What the benchmarks' figures are to reach, and whether they do. Times are meant on two cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def as_ratio(value: float) -> str:
    """Write a ratio; a small one as 1/n."""
    if 0 < value < 0.6:
        return f"1/{1 / value:.2g}"
    return f"{value:.3g}"


def as_error(value: float) -> str:
    """Write an error with its exponent, if it is a number."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


@dataclass(frozen=True)
class Aim:
    """A bound on a figure.

    Attributes:
        bound: The bound, itself included.
        at_least: Whether the figure is to lie above it; else below.
        write: How bound and figure are printed.
    """

    bound: float
    at_least: bool = False
    write: Callable[[float], str] = as_ratio

    def reached(self, value: float) -> bool:
        """Compare; a figure that is not a number reaches nothing."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.write(self.bound)}"


@dataclass(frozen=True)
class LayerAims:
    """Aims for one first layer.

    Attributes:
        gram: Time of the Gram, torch-tract ÷ ours.
        layer: Time of forward and backward, ours ÷ plain.
        memory: Peak memory of the Gram, ours ÷ torch-tract.
    """

    gram: Aim
    layer: Aim
    memory: Aim


def layer_aims(gram: float, layer: float, memory: float) -> LayerAims:
    return LayerAims(Aim(gram, at_least=True), Aim(layer), Aim(memory))


OPERATOR_ERROR = Aim(2e-5, write=as_error)
"""Of the preconditioned gradient in float32, for standardised photographs."""

OPERATOR_ERROR_255 = Aim(1e-2, write=as_error)
"""The same for photographs in [0, 255]."""

COMPILED = Aim(1.03)
"""Time of a compiled step ÷ an eager one: not slower, within what repeats differ by."""
