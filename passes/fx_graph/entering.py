"""What enters a model, and which of it competes for being the image.

An input layer is looked for on every tensor that enters. Some never are what TrAct is meant for:
token ids, masks, edge lists and other integers (but those of 8 and 16 bits, which are pixels and
sound), flags, and one number per example, such as a diffusion model's time. Where something else
enters beside them, layers on them do not compete with layers on that, and they count no more once
they have met features. Integers and flags of four dimensions may be a volume or a map of classes,
and may be a mask: layers on them do compete. Shapes and dtypes are known of exported graphs; in a
symbolic trace everything competes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from tract_fx.passes.fx_graph.values import Value

_SAMPLES = (torch.uint8, torch.int8, torch.int16, torch.uint16)


def entering_values(graph: fx.Graph) -> dict[Node, Value]:
    """Tell what the placeholders of a graph bring."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    values = {node: _value(node) for node in placeholders}
    inputs = [node for node in placeholders if values[node].path]
    aside = {node for node in inputs if not _is_image(_example(node))}
    if len(aside) < len(inputs):
        for node in aside:
            minor = _example(node).dim() < 4
            values[node] = Value(path=(node.name,), optional=True, minor=minor)
    return values


def _value(node: Node) -> Value:
    # What has a default other than None is a flag or a number.
    if node.args and node.args[0] is not None:
        return Value()
    # A parameter that Dynamo has made an input of the graph for its backend.
    if node.type is nn.Parameter and isinstance(_example(node), torch.Tensor):
        return Value(parameters=(node.name,), trainable=_example(node).requires_grad)
    if "grapharg" in node.meta and "_buffers_" in str(node.target):
        return Value()
    return Value(path=(node.name,), optional=bool(node.args))


def _example(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _is_image(example: Any) -> bool:
    if not isinstance(example, torch.Tensor):
        return True
    return (example.is_floating_point() or example.dtype in _SAMPLES) and example.dim() >= 2
