"""Layer calls in an fx graph: the patterns that count as a linear layer or a convolution.

Accepted, with a weight that depends on parameters alone:

- `call_module` of an nn.Linear or nn.Conv1d/2d/3d (also a subclass that keeps the forward method);
- `torch.nn.functional.linear`, `conv1d`, `conv2d`, `conv3d`;
- `aten.linear.default`, `aten.conv{1,2,3}d.default` and `.padding`, `aten.convolution.default`.

The weight may pass through TrAct's own op, as function or as operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional

from tract_fx.preconditioner import PRECONDITION_GRAD_OPERATOR, precondition_grad

__all__ = ["LayerCall", "is_precondition_grad", "match_function", "match_module", "op_name"]

_aten = torch.ops.aten
_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = (*_CONV[:6], "transposed", "output_padding", "groups")

# Target of a call_function node -> (spatial dimensions, None for those of the weight; names of
# its arguments).
_FUNCTIONS: dict[Callable[..., Any], tuple[int | None, tuple[str, ...]]] = {
    functional.linear: (0, _LINEAR),
    _aten.linear.default: (0, _LINEAR),
    functional.conv1d: (1, _CONV),
    functional.conv2d: (2, _CONV),
    functional.conv3d: (3, _CONV),
    _aten.conv1d.default: (1, _CONV),
    _aten.conv2d.default: (2, _CONV),
    _aten.conv3d.default: (3, _CONV),
    _aten.conv1d.padding: (1, _CONV),
    _aten.conv2d.padding: (2, _CONV),
    _aten.conv3d.padding: (3, _CONV),
    _aten.convolution.default: (None, _CONVOLUTION),
}


@dataclass(frozen=True)
class LayerCall:
    """A node that calls a linear layer or a convolution.

    Attributes:
        node: The node.
        op: `"linear"`, `"conv1d"`, `"conv2d"`, `"conv3d"`, or `"convolution"` where the number of
            dimensions is the weight's.
        input: The node that the layer reads.
        weight: The node of the effective weight, beneath any TrAct op; None for a `call_module`.
        geometry: stride, padding, dilation and groups as far as the node states them.
        precondition: TrAct's node on the weight, if there is one.
    """

    node: Node
    op: str
    input: Node
    weight: Node | None
    geometry: dict[str, Any]
    precondition: Node | None = None


def is_precondition_grad(node: object) -> bool:
    """Tell TrAct's nodes, whether function or operator.

    Args:
        node: A node, or an argument of one.

    Returns:
        True for a call of `precondition_grad`.
    """
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and node.target in (precondition_grad, PRECONDITION_GRAD_OPERATOR)
    )


def match_module(node: Node, module: nn.Module) -> LayerCall | None:
    """Match a `call_module` of a linear layer or convolution.

    Args:
        node: A `call_module` node.
        module: The module that it calls.

    Returns:
        The call, None where the module is of another kind or its input is not a node.
    """
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, Node):
        return None
    dims = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
    return LayerCall(node, op_name(dims), x, None, {})


def match_function(node: Node) -> LayerCall | None:
    """Match a `call_function` of a linear layer or convolution.

    Args:
        node: Any node.

    Returns:
        The call, None where the target is another or an operand is not a node.
    """
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    dims, names = _FUNCTIONS[node.target]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight = arguments.get("input"), arguments.get("weight")
    if not isinstance(x, Node) or not isinstance(weight, Node) or arguments.get("transposed"):
        return None
    precondition = weight if is_precondition_grad(weight) else None
    if precondition is not None:
        weight = precondition.args[0]
        assert isinstance(weight, Node)
    geometry = {k: arguments[k] for k in _CONV[3:] if k in arguments}
    return LayerCall(node, op_name(dims), x, weight, geometry, precondition)


def op_name(dims: int | None) -> str:
    """Name a layer's operation.

    Args:
        dims: Spatial dimensions, 0 for a linear layer, None for a convolution of any number.

    Returns:
        `"linear"`, `"conv1d"`, `"conv2d"`, `"conv3d"` or `"convolution"`.
    """
    return {0: "linear", None: "convolution"}.get(dims, f"conv{dims}d")
