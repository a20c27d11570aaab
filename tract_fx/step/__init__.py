"""The graph of one training step: traced in PyTorch, with its own derivatives, written as ONNX.

`trace` records forward, loss and backward as one fx graph; `write` makes ONNX of it, in which
`expand` writes TrAct's subgraph; `ort_training` lays it out as ONNX Runtime Training reads one.
"""
