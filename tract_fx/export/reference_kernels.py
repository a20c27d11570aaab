"""Kernels for `onnx.reference` that compute in the dtype of what they read.

The stock Erf rounds to float32, in which central differences drown; the stock LayerNormalization
knows one `stash_type`; BatchNormalization before opset 14 takes inference for training.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["KERNELS"]

Array = np.ndarray[Any, Any]

_erf = np.vectorize(math.erf, otypes=[np.float64])


class Erf(OpRun):
    """The error function."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (_erf(x).astype(x.dtype) if x.size else x,)


class LayerNormalization(OpRun):
    """As the standard has it, whatever the dtype between."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array | None = None,
        axis: int | None = None,
        epsilon: float | None = None,
        stash_type: int | None = None,
    ) -> tuple[Array, ...]:
        axes = tuple(range((-1 if axis is None else axis) % x.ndim, x.ndim))
        mean = x.mean(axis=axes, keepdims=True)
        variance = x.var(axis=axes, keepdims=True)
        inverse = 1 / np.sqrt(variance + (1e-5 if epsilon is None else epsilon))
        result = (x - mean) * inverse * scale
        result = result if bias is None else result + bias
        return (result, mean, inverse)[: len(self.onnx_node.output)]


class BatchNormalization(OpRun):
    """Every version: training is what `training_mode` says, or before it more than one output."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        variance: Array,
        epsilon: float | None = None,
        momentum: float | None = None,
        training_mode: int | None = None,
        is_test: int | None = None,
        spatial: int | None = None,
    ) -> tuple[Array, ...]:
        outputs = len(self.onnx_node.output)
        trains = outputs > 1 if training_mode is None else bool(training_mode)
        results = []
        if trains:
            axes = (0, *range(2, x.ndim))
            share = 0.9 if momentum is None else momentum
            own = x.mean(axis=axes), x.var(axis=axes)
            results = [
                running * share + batch * (1 - share)
                for running, batch in zip((mean, variance), own, strict=True)
            ]
            mean, variance = own
        shape = (-1, *(1,) * (x.ndim - 2))
        inverse = 1 / np.sqrt(variance.reshape(shape) + (1e-5 if epsilon is None else epsilon))
        normal = (x - mean.reshape(shape)) * inverse
        results.insert(0, normal * scale.reshape(shape) + bias.reshape(shape))
        return tuple(results[:outputs])


KERNELS: list[type[OpRun]] = [Erf, LayerNormalization, BatchNormalization]
"""What takes the place of the stock kernels."""
