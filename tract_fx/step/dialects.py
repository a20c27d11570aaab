"""What a step is written in: standard operators, or a runtime's own where it has faster ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnxscript.values import Opset
from torch import Tensor

from tract_fx.step.formulas import FORMULAS, each
from tract_fx.step.random_masks import MASKS
from tract_fx.step.translations import TRANSLATIONS

__all__ = ["ORT_TRAINING", "STANDARD", "Dialect"]

aten = torch.ops.aten
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Dialect:
    """How aten operators become ONNX's.

    Attributes:
        formulas: Operators in terms of others; one that gives `NotImplemented` leaves the call.
        translations: ONNX operators of those that are left, beside PyTorch's own translations.
    """

    formulas: Mapping[Any, Callable[..., Any]]
    translations: Mapping[Any, Callable[..., Any]]


STANDARD = Dialect({**FORMULAS, **MASKS}, TRANSLATIONS)
"""For any runtime."""


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
    _register()
    dims = len(weight.shape) - 2
    return Opset(_MICROSOFT, 1).ConvGrad(
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
    _register()
    assert threshold == 0, threshold
    return Opset(_MICROSOFT, 1).ReluGrad(dz, result)


ORT_TRAINING = Dialect(
    {**STANDARD.formulas, aten.convolution_backward.default: _transposed_backward},
    {
        **TRANSLATIONS,
        aten.convolution_backward.default: _convolution_backward,
        aten.threshold_backward.default: _relu_backward,
    },
)
"""For ONNX Runtime Training, with the gradient operators that it has kernels of."""


@functools.cache
def _register() -> None:
    """Make the runtime's operators known to onnx, without which a translation writes none."""
    schema, formal = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    optional = schema.FormalParameterOption.Optional
    constraint = [("T", ["tensor(float)", "tensor(double)", "tensor(float16)"], "Any float.")]
    lists = ("strides", "pads", "dilations", "kernel_shape")
    onnx.defs.register_schema(
        schema(
            "ConvGrad",
            _MICROSOFT,
            1,
            inputs=[formal(name, "T") for name in ("dY", "X", "W")],
            outputs=[formal(name, "T", param_option=optional) for name in ("dX", "dW", "dB")],
            type_constraints=constraint,
            attributes=[
                *(schema.Attribute(n, schema.AttrType.INTS, "", required=False) for n in lists),
                schema.Attribute("group", schema.AttrType.INT, "", required=False),
                schema.Attribute("auto_pad", schema.AttrType.STRING, "", required=False),
            ],
        )
    )
    onnx.defs.register_schema(
        schema(
            "ReluGrad",
            _MICROSOFT,
            1,
            inputs=[formal(name, "T") for name in ("dY", "X")],
            outputs=[formal("dX", "T")],
            type_constraints=constraint,
        )
    )
