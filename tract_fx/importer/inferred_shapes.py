"""Shapes and dtypes of values, which exporters leave out here and there."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


def infer_shapes(model: ir.Model) -> None:
    """Note the shape and dtype of every value where onnx can infer them, in place."""
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
