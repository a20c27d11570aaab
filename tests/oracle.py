"""TrAct's definition in plain numpy and float64, sharing no code with what it checks.

For one call of a layer with weight gradient ``gW`` (out, columns) and rows ``X`` (rows, columns)::

    gW  <-  gW (X^T X / R + lambda I)^-1            one system per group

Everything here is written from the textbook meaning of the layers: ``numpy.pad``, one loop over the
kernel's taps, dense products and ``numpy.linalg.solve``. Nothing is fast, nothing is clever.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array: TypeAlias = NDArray[np.float64]
ArrayLike: TypeAlias = Tensor | Array

NUMPY_PAD_MODES: dict[str, Literal["constant", "reflect", "edge", "wrap"]] = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}


@dataclass(frozen=True)
class Spec:
    """What of a layer decides which rows it multiplies its weight with.

    Attributes:
        kind: ``"linear"`` or ``"conv"``.
        kernel: Taps per spatial dimension, as many entries as there are; empty for a linear layer.
        stride: Per spatial dimension.
        padding: One number for all dimensions, one per dimension (both sides alike), ``"same"`` or
            ``"valid"``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        dilation: Per spatial dimension.
        groups: Number of channel groups.
    """

    kind: Literal["linear", "conv"]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: int | tuple[int, ...] | str = 0
    padding_mode: str = "zeros"
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> Spec:
        """Reads the record off an ``nn.Linear`` or ``nn.Conv{1,2,3}d`` (or a subclass of one)."""
        if isinstance(layer, nn.Linear):
            return cls("linear")
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return cls(
                "conv",
                tuple(layer.kernel_size),
                tuple(layer.stride),
                layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
                layer.padding_mode,
                tuple(layer.dilation),
                layer.groups,
            )
        raise TypeError(f"expected nn.Linear or nn.Conv1d/2d/3d, got {type(layer).__name__}")

    def margins(self) -> list[tuple[int, int]]:
        """Padding before and after, per spatial dimension."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel)
        if self.padding == "same":  # the odd one, where there is one, goes behind
            totals = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        if isinstance(self.padding, int):
            return [(self.padding, self.padding)] * len(self.kernel)
        assert not isinstance(self.padding, str), self.padding
        if len(self.padding) == 1:
            return [(self.padding[0], self.padding[0])] * len(self.kernel)
        return [(p, p) for p in self.padding]


Layer: TypeAlias = nn.Module | Spec


def rows(layer: Layer, x: ArrayLike) -> Array:
    """The rows that the layer multiplies its weight with.

    Args:
        layer: A linear or conv module, or its ``Spec``.
        x: The layer's input: (..., in_features), or (batch, in_channels, *size), batch optional.

    Returns:
        (groups, rows, columns). A convolution's columns lie in the order of ``weight.flatten(1)``.

    Raises:
        ValueError: The input has not the layer's number of dimensions.
    """
    spec = _spec(layer)
    values = _float64(x)
    if spec.kind == "linear":
        return values.reshape(1, -1, values.shape[-1])
    dims = len(spec.kernel)
    if values.ndim == dims + 1:
        values = values[None]
    if values.ndim != dims + 2:
        raise ValueError(f"{dims}d convolution, but {values.shape=}")

    padded = np.pad(
        values, [(0, 0), (0, 0), *spec.margins()], mode=NUMPY_PAD_MODES[spec.padding_mode]
    )
    reach = [d * (k - 1) for k, d in zip(spec.kernel, spec.dilation, strict=True)]
    counts = [
        (p - r - 1) // s + 1 for p, r, s in zip(padded.shape[2:], reach, spec.stride, strict=True)
    ]
    taps: list[Array] = []
    for tap in itertools.product(*(range(k) for k in spec.kernel)):
        window = tuple(
            slice(t * d, t * d + s * (count - 1) + 1, s)
            for t, d, s, count in zip(tap, spec.dilation, spec.stride, counts, strict=True)
        )
        taps.append(padded[(slice(None), slice(None), *window)])
    patches = np.stack(taps, axis=2)  # (batch, channels, taps, *positions)
    batch, channels = values.shape[:2]
    per_group = channels // spec.groups * len(taps)
    patches = patches.reshape(batch, spec.groups, per_group, int(np.prod(counts)))
    by_group: Array = np.ascontiguousarray(patches.transpose(1, 0, 3, 2))
    merged: Array = by_group.reshape(spec.groups, -1, per_group)
    return merged


def gram(layer: Layer, x: ArrayLike) -> Array:
    """X^T X / R, one per group: (groups, columns, columns); zero where there are no rows."""
    matrix = rows(layer, x)
    mean: Array = matrix.transpose(0, 2, 1) @ matrix / max(matrix.shape[1], 1)
    return mean


def weight_gradient(layer: Layer, x: ArrayLike, dz: ArrayLike) -> Array:
    """The plain weight gradient dz^T X, in the weight's shape.

    Args:
        layer: A linear or conv module, or its ``Spec``.
        x: The layer's input.
        dz: The gradient of the layer's output, in the output's shape.

    Returns:
        (out, in) for a linear layer, (out, in / groups, *kernel) for a convolution.

    Raises:
        ValueError: Input and output gradient don't have the same number of rows.
    """
    spec = _spec(layer)
    matrix = rows(spec, x)
    gradients = _float64(dz)
    if spec.kind == "linear":
        per_group = gradients.reshape(1, -1, gradients.shape[-1])
    else:
        if gradients.ndim == len(spec.kernel) + 1:
            gradients = gradients[None]
        batch, out, *positions = gradients.shape
        split = gradients.reshape(batch, spec.groups, out // spec.groups, int(np.prod(positions)))
        per_group = split.transpose(1, 0, 3, 2).reshape(spec.groups, -1, out // spec.groups)
    if per_group.shape[1] != matrix.shape[1]:
        raise ValueError(f"{matrix.shape[1]} rows in x, {per_group.shape[1]} in dz")
    product = per_group.transpose(0, 2, 1) @ matrix  # (groups, out / groups, columns)
    return product.reshape(-1, *_column_shape(spec, matrix.shape[2]))


def precondition(layer: Layer, gw: ArrayLike, x: ArrayLike, lambda_: float = 0.1) -> Array:
    """Turns a given weight gradient gW into gW (X^T X / R + lambda I)^-1, in gW's shape."""
    spec = _spec(layer)
    gradient = _float64(gw)
    grams = gram(spec, x)
    damped = grams + lambda_ * np.eye(grams.shape[1])
    per_group = gradient.reshape(spec.groups, -1, grams.shape[1])
    solved = np.linalg.solve(damped, per_group.transpose(0, 2, 1))  # damped is symmetric
    return np.ascontiguousarray(solved.transpose(0, 2, 1)).reshape(gradient.shape)


def tract_gradient(layer: Layer, x: ArrayLike, dz: ArrayLike, lambda_: float = 0.1) -> Array:
    """TrAct's weight gradient of one call, from its input and the gradient of its output."""
    return precondition(layer, weight_gradient(layer, x, dz), x, lambda_)


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """Distance relative to what was expected.

    Returns:
        ||actual - expected|| / ||expected|| in float64; where ``expected`` is zero, ||actual||.

    Raises:
        ValueError: The shapes differ: an error of the comparison, not a large distance.
    """
    left, right = _float64(actual), _float64(expected)
    if left.shape != right.shape:
        raise ValueError(f"{left.shape=} {right.shape=}")
    scale = float(np.linalg.norm(right)) or 1.0
    return float(np.linalg.norm(left - right)) / scale


def _spec(layer: Layer) -> Spec:
    return layer if isinstance(layer, Spec) else Spec.of(layer)


def _column_shape(spec: Spec, columns: int) -> tuple[int, ...]:
    if spec.kind == "linear":
        return (columns,)
    return (columns // int(np.prod(spec.kernel)), *spec.kernel)


def _float64(values: ArrayLike) -> Array:
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
