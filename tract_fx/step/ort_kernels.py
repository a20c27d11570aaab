"""Operators of ONNX Runtime Training's own, in the place of what others are written of.

Each is checked against the standard form: tests train the same models in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18
from onnxscript.values import Opset
from torch import Tensor

from tract_fx.passes.onnx_graph.calls import MICROSOFT
from tract_fx.step.formulas import FORMULAS, each

aten = torch.ops.aten
op: Any = opset18


def _microsoft() -> Any:
    return Opset(MICROSOFT, 1)


def _transposed_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    *others: Any,
) -> Any:
    """Leave all but transposed convolutions to ConvGrad."""
    if not transposed:
        return NotImplemented
    formula = FORMULAS[aten.convolution_backward.default]
    return formula(dz, x, weight, bias_sizes, stride, padding, dilation, transposed, *others)


def _convolution_backward(
    dz: Any,
    x: Any,
    weight: Any,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    dims = len(weight.shape) - 2
    return _microsoft().ConvGrad(
        dz,
        x,
        weight,
        strides=each(stride, dims),
        pads=each(padding, dims) * 2,
        dilations=each(dilation, dims),
        kernel_shape=[int(size) for size in weight.shape[2:]],
        group=int(groups),
        _outputs=3,
    )


def _relu_backward(dz: Any, result: Any, threshold: float) -> Any:
    """Of ReLU's output, which is positive where its input is."""
    assert threshold == 0, threshold
    return _microsoft().ReluGrad(dz, result)


def _batch_norm(x: Tensor, weight: Tensor | None, *others: Any) -> Any:
    """Leave what trains a scale and a bias to BatchNormInternal."""
    bias, mean, _, training, *_ = others
    if training and weight is not None and bias is not None and mean is not None:
        return NotImplemented
    return FORMULAS[aten._native_batch_norm_legit_functional.default](x, weight, *others)


def _batch_norm_kernel(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *settings: float
) -> Any:
    """With momentum zero its running statistics are the batch's; PyTorch's variance is unbiased.

    The kernel writes over the statistics that it is given, which are therefore made for it.
    """
    momentum, eps = settings
    zero = op.Constant(value_float=0.0)
    given = op.Mul(mean, zero), op.Mul(variance, zero)
    result, _, batch_variance, saved_mean, saved_inverse = _microsoft().BatchNormInternal(
        x, weight, bias, *given, epsilon=eps, momentum=0.0, training_mode=1, _outputs=5
    )
    count = op.Cast(op.Div(op.Size(x), op.Size(mean)), to=1)
    one = op.Constant(value_float=1.0)
    unbiased = op.Mul(batch_variance, op.Div(count, op.Sub(count, one)))

    def moved(old: Any, new: Any) -> Any:
        if momentum == 1:  # old · 0 is what the kernel was given, and has written over
            return new
        share = op.Constant(value_float=momentum)
        return op.Add(op.Mul(old, op.Sub(one, share)), op.Mul(new, share))

    return (
        *(result, saved_mean, saved_inverse),
        *(moved(mean, saved_mean), moved(variance, unbiased)),
    )


def _batch_norm_backward(dz: Tensor, x: Tensor, weight: Tensor | None, *others: Any) -> Any:
    mean, _, _, _, training, *_ = others
    if training and weight is not None and mean is not None:
        return NotImplemented
    return torch._decomp.core_aten_decompositions()[aten.native_batch_norm_backward.default](
        dz, x, weight, *others
    )


def _batch_norm_backward_kernel(
    dz: Any,
    x: Any,
    weight: Any,
    mean: Any,
    variance: Any,
    saved_mean: Any,
    saved_inverse: Any,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    return _microsoft().BatchNormalizationGrad(
        dz, x, weight, saved_mean, saved_inverse, epsilon=eps, _outputs=3
    )


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    if weight is not None and bias is not None:
        return NotImplemented
    return torch._decomp.core_aten_decompositions()[aten.native_layer_norm.default](
        x, shape, weight, bias, eps
    )


def _layer_norm_kernel(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    return op.LayerNormalization(x, weight, bias, axis=-len(shape), epsilon=eps)


def _layer_norm_backward(
    dz: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, inverse: Tensor, *others: Any
) -> Any:
    weight, bias, _ = others
    if weight is not None and bias is not None:
        return NotImplemented
    return torch._decomp.core_aten_decompositions()[aten.native_layer_norm_backward.default](
        dz, x, shape, mean, inverse, *others
    )


def _layer_norm_backward_kernel(
    dz: Any, x: Any, shape: Sequence[int], mean: Any, inverse: Any, weight: Any, *_: Any
) -> Any:
    return _microsoft().LayerNormalizationGrad(
        dz, x, weight, mean, inverse, axis=-len(shape), _outputs=3
    )


def _softmax_backward(name: str) -> Callable[..., Any]:
    def translate(dz: Any, result: Any, dim: int, dtype: Any) -> Any:
        return getattr(_microsoft(), name)(dz, result, axis=dim)

    return translate


KERNEL_FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _transposed_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}
"""Formulas that leave what has a kernel."""

KERNELS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.threshold_backward.default: _relu_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm_kernel,
    aten.native_batch_norm_backward.default: _batch_norm_backward_kernel,
    aten.native_layer_norm.default: _layer_norm_kernel,
    aten.native_layer_norm_backward.default: _layer_norm_backward_kernel,
    aten._softmax_backward_data.default: _softmax_backward("SoftmaxGrad_13"),
    aten._log_softmax_backward_data.default: _softmax_backward("LogSoftmaxGrad_13"),
}
"""ONNX operators of those that are left."""
