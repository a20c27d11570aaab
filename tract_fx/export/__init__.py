"""Export: from a rewritten model, or an ONNX model of any framework, to training artifacts."""
