"""Layer calls in an fx graph: the patterns that count as a linear layer or a convolution.

Accepted, with a weight that depends on parameters alone:

- `call_module` of an nn.Linear or nn.Conv1d/2d/3d (also a subclass that keeps the forward method);
- `torch.nn.functional.linear`, `conv1d`, `conv2d`, `conv3d`;
- `aten.linear.default`, `aten.conv{1,2,3}d.default` and `.padding`, `aten.convolution.default`.

The weight may pass through TrAct's own op, as function or as operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from tract_fx.preconditioner import (
    GEOMETRY,
    LAYER_CALLS,
    PRECONDITION_GRAD_OPERATOR,
    kind_of,
    precondition_grad,
)

PROVENANCE = "tract"
"""Key in `node.meta["custom"]` of every node that the pass made or changed."""


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
    """Tell TrAct's nodes, whether function or operator."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and node.target in (precondition_grad, PRECONDITION_GRAD_OPERATOR)
    )


def match_module(node: Node, module: nn.Module) -> LayerCall | None:
    """Match a `call_module` of a linear layer or convolution."""
    kind = kind_of(module)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if kind is None or not isinstance(x, Node):
        return None
    return LayerCall(node, kind.op, x, None, {})


def match_function(node: Node) -> LayerCall | None:
    """Match a `call_function` of a linear layer or convolution."""
    if node.op != "call_function" or node.target not in LAYER_CALLS:
        return None
    op, names = LAYER_CALLS[node.target]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight = arguments.get("input"), arguments.get("weight")
    if not isinstance(x, Node) or not isinstance(weight, Node) or arguments.get("transposed"):
        return None
    precondition = weight if is_precondition_grad(weight) else None
    if precondition is not None:
        weight = precondition.args[0]
        assert isinstance(weight, Node)
    geometry = {k: arguments[k] for k in GEOMETRY if k in arguments}
    return LayerCall(node, op, x, weight, geometry, precondition)


def read_lambda(op: Node) -> float:
    """Read λ off a node of TrAct's op."""
    return float(op.args[2] if op.target is PRECONDITION_GRAD_OPERATOR else op.kwargs["lambda_"])  # type: ignore[arg-type]


_SCOPE = 8  # its place among the operator's arguments


def read_scope(op: Node) -> str | None:
    """Read off a node of TrAct's op whose rows the Gram is of."""
    scope = op.kwargs.get("scope", op.args[_SCOPE] if len(op.args) > _SCOPE else None)
    return None if scope is None else str(scope)
