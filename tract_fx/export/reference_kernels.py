"""Kernels for `onnx.reference` that compute in the dtype of what they read.

The stock Erf rounds to float32, in which central differences drown; the stock LayerNormalization
knows one `stash_type`; BatchNormalization before opset 14 takes inference for training; Conv is
slow, and PyTorch's in float64 stands in for it; NonMaxSuppression takes no scalars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_non_max_suppression
from torch.nn import functional

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


class Conv(OpRun):
    """A convolution of any number of dimensions, by PyTorch."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        dims = x.ndim - 2
        strides, dilations = (list(given or [1] * dims) for given in (strides, dilations))
        before, after = np.asarray(pads or [0] * 2 * dims).reshape(2, dims)
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            extent = (np.asarray(weight.shape[2:]) - 1) * dilations + 1
            size = np.asarray(x.shape[2:])
            total = np.maximum((-(-size // strides) - 1) * strides + extent - size, 0)
            less, more = total // 2, total - total // 2
            before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
        sides = [(0, 0), (0, 0), *zip(before, after, strict=True)]
        padded, kernel = (torch.from_numpy(np.array(v)) for v in (np.pad(x, sides), weight))
        if bias is not None and bias.ndim > 1 and not bias.any():
            bias = None  # torch.onnx gives a Conv3d without a bias zeros of shape (out, 2)
        added = None if bias is None else torch.from_numpy(np.array(bias))
        convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        result = convolution(padded, kernel, added, strides, 0, dilations, group or 1)
        return (result.numpy(),)


class NonMaxSuppression(op_non_max_suppression.NonMaxSuppression):
    """The stock one, with limits that are scalars or left out."""

    op_domain = ""

    def _run(
        self,
        boxes: Array,
        scores: Array,
        most: Array | None = None,
        overlap: Array | None = None,
        least: Array | None = None,
        center_point_box: int | None = None,
    ) -> Any:
        given = (most, overlap, least)
        left_out = (np.zeros(1, np.int64), np.zeros(1), np.full(1, -np.inf))
        limits = [
            default if limit is None else limit.reshape(-1)
            for limit, default in zip(given, left_out, strict=True)
        ]
        stock: Any = super()._run
        return stock(boxes, scores, *limits, center_point_box or 0)


KERNELS: list[type[OpRun]] = [Erf, LayerNormalization, BatchNormalization, Conv, NonMaxSuppression]
"""What takes the place of the stock kernels."""
