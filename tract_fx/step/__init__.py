"""The graph of one training step: traced in PyTorch, with its own derivatives, written as ONNX.

`trace` records forward, loss and backward as one fx graph; `translate` makes ONNX of it, in which
`expand` writes TrAct's subgraph. Nothing of a runtime is needed, and none differentiates anything.
"""
