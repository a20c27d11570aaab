"""The pass on ONNX graphs: locate → choose → rewrite, and the repairs that training needs."""
