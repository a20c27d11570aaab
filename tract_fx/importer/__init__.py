"""ONNX models as PyTorch modules."""
