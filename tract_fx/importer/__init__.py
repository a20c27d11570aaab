"""ONNX models as PyTorch modules."""

from tract_fx.importer.api import import_onnx, with_weights

__all__ = ["import_onnx", "with_weights"]
