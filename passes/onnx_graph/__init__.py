"""The pass on ONNX graphs: locate → choose → rewrite."""

from tract_fx.passes.onnx_graph.api import remove_tract_onnx, tract_onnx_pass
from tract_fx.passes.onnx_graph.find import find_onnx_input_layers

__all__ = ["find_onnx_input_layers", "remove_tract_onnx", "tract_onnx_pass"]
