"""Shapes and dtypes of values, which exporters leave out here and there."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from tract_fx.errors import ExportError


def inferred_shapes(model: ir.Model) -> int:
    """Note the shape and dtype of every value where onnx can infer them."""
    before = _unknown(model)
    result = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    if result.model is not model:
        raise ExportError(
            "onnx's shape inference gave another model back",
            "a model is read in place",
            "Use the version of onnx-ir that this package was tested with",
        )
    return before - _unknown(model)


def _unknown(model: ir.Model) -> int:
    """Count shapes and dtypes that are not known."""
    return sum(
        (value.shape is None) + (value.dtype is None)
        for node in model.graph
        for value in node.outputs
        if value.name
    )
