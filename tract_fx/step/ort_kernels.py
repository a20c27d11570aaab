"""Operators of ONNX Runtime Training's own, in the place of what others are written of.

Each is checked against the standard form: tests train the same models in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18
from onnxscript.values import Opset

from tract_fx.passes.onnx_graph.calls import MICROSOFT
from tract_fx.step.formulas import FORMULAS, each

aten = torch.ops.aten
op: Any = opset18


def _microsoft() -> Any:
    return Opset(MICROSOFT, 1)


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


def _layer_norm_kernel(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    return op.LayerNormalization(x, weight, bias, axis=-len(shape), epsilon=eps)


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


def _transposed_backward(*arguments: Any) -> Any:
    """Leave all but transposed convolutions to ConvGrad."""
    operator = aten.convolution_backward.default
    given = _by_name(operator, arguments)
    return FORMULAS[operator](*arguments) if given["transposed"] else NotImplemented


def _without_kernel(operator: Any, needed: Sequence[str]) -> Callable[..., Any]:
    """Leave to its kernel what has all arguments that the kernel needs."""

    def write(*arguments: Any) -> Any:
        given = _by_name(operator, arguments)
        if all(given[name] is not None and given[name] is not False for name in needed):
            return NotImplemented
        formula = FORMULAS.get(operator) or torch._decomp.core_aten_decompositions()[operator]
        return formula(*arguments)

    return write


def _by_name(operator: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    names = [argument.name for argument in operator._schema.arguments]
    return dict(zip(names, arguments, strict=False))


_BATCH_NORM = aten._native_batch_norm_legit_functional.default
_BATCH_NORM_BACKWARD = aten.native_batch_norm_backward.default
_LAYER_NORM = aten.native_layer_norm.default
_LAYER_NORM_BACKWARD = aten.native_layer_norm_backward.default

KERNEL_FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _transposed_backward,
    **{
        operator: _without_kernel(operator, needed)
        for operator, needed in (
            (_BATCH_NORM, ("weight", "bias", "running_mean", "training")),
            (_BATCH_NORM_BACKWARD, ("weight", "running_mean", "train")),
            (_LAYER_NORM, ("weight", "bias")),
            (_LAYER_NORM_BACKWARD, ("weight", "bias")),
        )
    },
}
"""Formulas that leave what has a kernel."""

KERNELS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.threshold_backward.default: _relu_backward,
    _BATCH_NORM: _batch_norm_kernel,
    _BATCH_NORM_BACKWARD: _batch_norm_backward_kernel,
    _LAYER_NORM: _layer_norm_kernel,
    _LAYER_NORM_BACKWARD: _layer_norm_backward_kernel,
    aten._softmax_backward_data.default: _softmax_backward("SoftmaxGrad_13"),
    aten._log_softmax_backward_data.default: _softmax_backward("LogSoftmaxGrad_13"),
}
"""ONNX operators of those that are left."""
