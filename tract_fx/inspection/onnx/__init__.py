"""Inspections of ONNX training graphs."""
