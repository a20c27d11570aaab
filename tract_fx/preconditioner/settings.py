"""What TrAct's op needs to know of one call of a layer, beside its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tract_fx.errors import InvalidLambdaError
from tract_fx.preconditioner.geometry import PatchGeometry

DEFAULT_LAMBDA = 0.1
LAMBDA_REMEDY = f"The paper uses 0.05, {DEFAULT_LAMBDA} (the default) and 0.2"


def check_lambda(value: object) -> float:
    """Check a regularisation strength where it enters.

    Args:
        value: What the user gave for λ.

    Returns:
        λ as a float.

    Raises:
        InvalidLambdaError: It is not a finite number above zero.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        found, reason = f"lambda_={value!r} ({type(value).__name__})", "λ has to be a real number"
    else:
        number = _as_float(value)
        if math.isfinite(number) and number > 0:
            return number
        found, reason = f"lambda_={value!r}", "λ has to be finite and above zero"
    raise InvalidLambdaError(found, reason, LAMBDA_REMEDY)


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer past float64
        return math.inf


@dataclass(frozen=True)
class CallSettings:
    """Everything about one call of the layer that is not a tensor.

    Attributes:
        lambda_: λ > 0.
        geometry: How the layer reads its input.
        input_dtype: The dtype in which the layer multiplies where that is autocast's, else None.
        scope: Whose rows the Gram is of, as `GramScope` writes it; None for this call's alone.
    """

    lambda_: float
    geometry: PatchGeometry
    input_dtype: torch.dtype | None
    scope: str | None = None

    def operator_arguments(self) -> tuple[Any, ...]:
        """Write the settings out as the custom operators take them.

        Returns:
            The arguments behind the two tensors; `read_settings` is the way back.
        """
        g = self.geometry
        flat = (list(g.stride), list(g.flat_padding), list(g.dilation), g.groups)
        scope = () if self.scope is None else (self.scope,)
        return (self.lambda_, *flat, self.input_dtype, *scope)


def read_settings(
    weight: Tensor,
    lambda_: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_dtype: torch.dtype | None,
    scope: str | None = None,
) -> CallSettings:
    """Read the settings off a custom operator's arguments.

    Args:
        weight: The weight or its gradient, for its kernel size.
        lambda_: λ.
        stride: Stride per spatial dimension.
        padding: Zeros (before, after, before, after, …), first spatial dimension first.
        dilation: Dilation per spatial dimension.
        groups: Number of groups.
        input_dtype: Autocast's dtype or None.
        scope: Whose rows the Gram is of.

    Returns:
        The settings.
    """
    pads = tuple(zip(padding[::2], padding[1::2], strict=True))
    kernel = tuple(weight.shape[2:])
    geometry = PatchGeometry(kernel, tuple(stride), pads, tuple(dilation), groups)
    return CallSettings(lambda_, geometry, input_dtype, scope)
