"""The opset and IR versions that the importer reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.importer.conversion import convert_opset
from tract_fx.importer.inferred_shapes import infer_shapes
from tract_fx.importer.normalizations import normalizations_as_primitives
from tract_fx.passes.onnx_graph.calls import is_standard

_SLOPES_BROADCAST = 7
OLDEST_OPSET = 18  # since it, all reductions but ReduceSum take their axes as an input too
NEWEST_OPSET = 20  # 21 changes GroupNormalization
OLDEST_IR = (
    4  # before it, each initializer had to be an input too, on which onnx's converter insists
)
NEWEST_IR = 10


def supported_versions(model: ir.Model) -> None:
    """Bring a model to an opset and an IR version that the importer takes."""
    # First, since the converter asks for it.
    model.ir_version = min(max(model.ir_version, OLDEST_IR), NEWEST_IR)
    for domain in ("", "ai.onnx"):
        opset = model.opset_imports.get(domain)
        if opset is not None and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
            if opset < _SLOPES_BROADCAST:
                _slopes_per_channel(model)
            target = OLDEST_OPSET if opset < OLDEST_OPSET else NEWEST_OPSET
            _convert(model, opset, target)


def _slopes_per_channel(model: ir.Model) -> None:
    """Shape PRelu's slopes as later versions read them, which onnx's converter does not do."""
    infer_shapes(model)
    for node in model.graph:
        slope, x = (node.inputs[1], node.inputs[0]) if is_standard(node, "PRelu") else (None, None)
        tensor = None if slope is None else slope.const_value
        if slope is None or x is None or x.shape is None or tensor is None or tensor.size == 1:
            continue
        array = tensor.numpy()
        if array.ndim == 1 and len(x.shape) > 2:
            shaped = array.reshape(-1, *[1] * (len(x.shape) - 2))
            slope.const_value = ir.tensor(np.array(shaped), name=slope.name)
            slope.shape = ir.Shape(shaped.shape)


def _convert(model: ir.Model, opset: int, target: int) -> None:
    """Convert a model's graph to another opset."""
    if opset > target:  # onnx can't bring GroupNormalization back to its older form
        infer_shapes(model)
        normalizations_as_primitives(model)
    new = convert_opset(model, opset, target)
    model.graph = new.graph
    model.functions.clear()
    model.functions.update(new.functions)
