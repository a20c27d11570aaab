"""Translations of aten operators to ONNX beside PyTorch's own, and TrAct's marker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset18
from onnxscript.values import Opset

from tract_fx.preconditioner import PRECONDITION_GRAD_OPERATOR
from tract_fx.step.formulas import each
from tract_fx.step.output_gradient import PRECONDITION_STEP, TREATED_WEIGHT
from tract_fx.step.random_masks import KEEP_MASK
from tract_fx.step.schemas import MARKER, MARKER_DOMAIN, WEIGHT_MARKER
from tract_fx.step.weight_gradient import WEIGHT_GRADIENT, write_weight_gradient

aten = torch.ops.aten

op: Any = opset18


def _max_pool(dims: int) -> Callable[..., Any]:
    def translate(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Any:
        """Its indices count through the whole tensor: the derivative alone may read them."""
        kernel, padding, dilation = (each(v, dims) for v in (kernel_size, padding, dilation))
        return op.MaxPool(
            x,
            ceil_mode=int(ceil_mode),
            dilations=dilation,
            kernel_shape=kernel,
            pads=padding * 2,
            strides=each(stride, dims) or kernel,
        )

    return translate


def _max_pool_backward(dz: Any, x: Any, *arguments: Any) -> Any:
    *_, indices = arguments
    flat = op.Constant(value_ints=[-1])
    size = op.Reshape(op.Size(x), op.Constant(value_ints=[1]))
    zeros = op.ConstantOfShape(size)
    added = op.ScatterElements(
        zeros, op.Reshape(indices, flat), op.Reshape(dz, flat), axis=0, reduction="add"
    )
    return op.Reshape(added, op.Shape(x))


def _extreme(largest: bool) -> Callable[..., Any]:
    def translate(x: Any, dim: int, keepdim: bool = False) -> Any:
        """By TopK, which has kernels on GPUs; of equal values the first, as in PyTorch."""
        one = op.Constant(value_ints=[1])
        values, indices = op.TopK(x, one, axis=dim, largest=int(largest))
        if keepdim:
            return values, indices
        axis = op.Constant(value_ints=[dim])
        return op.Squeeze(values, axis), op.Squeeze(indices, axis)

    return translate


def _precondition(
    gradient: Any,
    x: Any,
    output_gradient: Any,
    lambda_: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    call: str,
) -> Any:
    geometry = {"strides": list(stride), "pads": list(padding), "dilations": list(dilation)}
    given = {name: sizes for name, sizes in geometry.items() if sizes}
    inputs = [gradient, x] if output_gradient is None else [gradient, x, output_gradient]
    marker = getattr(Opset(MARKER_DOMAIN, 1), MARKER)
    return marker(*inputs, lambda_=float(lambda_), group=int(groups), call=call, **given)


def _treated_weight(weight: Any, call: str) -> Any:
    return getattr(Opset(MARKER_DOMAIN, 1), WEIGHT_MARKER)(weight, call=call)


def _keep_mask(like: Any, probability: float) -> Any:
    """Dropout's mask.

    ONNX Runtime 1.32 takes a Dropout of known numbers for none where its mask is not read.
    """
    if probability in (0, 1):
        every = op.Constant(value_float=float(probability))
        return op.CastLike(op.Expand(every, op.Shape(like)), like)
    ones = op.ConstantOfShape(op.Shape(like), value=_ONE)
    ratio, training = op.Constant(value_float=1 - probability), op.Constant(value=_TRUE)
    _, mask = op.Dropout(ones, ratio, training)
    return op.CastLike(mask, like)


_ONE = onnx.numpy_helper.from_array(np.ones(1, np.float32))
_TRUE = onnx.numpy_helper.from_array(np.asarray(True))

TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    PRECONDITION_GRAD_OPERATOR: lambda weight, *_: op.Identity(weight),
    TREATED_WEIGHT: _treated_weight,
    PRECONDITION_STEP: _precondition,
    aten.max_pool2d_with_indices.default: _max_pool(2),
    aten.max_pool3d_with_indices.default: _max_pool(3),
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward,
    KEEP_MASK: _keep_mask,
    WEIGHT_GRADIENT: write_weight_gradient,
    aten.max.dim: _extreme(True),
    aten.min.dim: _extreme(False),
    aten.squeeze.dims: lambda x, dim: op.Squeeze(x, op.Constant(value_ints=list(dim))),
    aten.sym_numel.default: lambda x: op.Size(x),
}
