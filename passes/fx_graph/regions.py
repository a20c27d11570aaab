"""Regions: parts of an exported graph that run in a graph of their own, under autocast or no_grad.

torch.export writes `with torch.autocast(…)` as one node that calls a graph, with all that it reads
as operands, and likewise for `no_grad` and activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx import Node

from tract_fx.passes.fx_graph.values import lookup

_GRAD_MODE = "wrap_with_set_grad_enabled"
# Higher-order operators that run their graph once, on the operands as they are.
_ONCE = {_GRAD_MODE, "wrap_with_autocast", "tag_activation_checkpoint", "wrap"}


@dataclass(frozen=True)
class Region:
    """A graph that a node calls.

    Attributes:
        target: The attribute that holds the graph.
        module: The graph.
        operands: What its placeholders stand for, in order: nodes of the graph around it, or
            values.
        trains: Whether gradients are recorded in it.
    """

    target: str
    module: fx.GraphModule
    operands: tuple[Any, ...]
    trains: bool


def region_of(gm: fx.GraphModule, node: Node) -> Region | None:
    """Read a node that calls one graph, once."""
    if getattr(node.target, "__name__", "") not in _ONCE:
        return None
    called = [i for i, a in enumerate(node.args) if _holds_graph(gm, a)]
    if len(called) != 1:
        return None
    holder = node.args[called[0]]
    assert isinstance(holder, Node)
    module = lookup(gm, holder)
    operands = node.args[called[0] + 1 :]
    if len(module.graph.find_nodes(op="placeholder")) != len(operands):
        return None
    disabled = node.target.__name__ == _GRAD_MODE and node.args[0] is False  # type: ignore[union-attr]
    return Region(str(holder.target), module, operands, trains=not disabled)


def _holds_graph(gm: fx.GraphModule, argument: object) -> bool:
    is_attribute = isinstance(argument, Node) and argument.op == "get_attr"
    return is_attribute and isinstance(lookup(gm, argument), fx.GraphModule)  # type: ignore[arg-type]


def graphs(gm: fx.GraphModule, prefix: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """Go through a graph and its regions."""
    yield prefix, gm
    for node in gm.graph.nodes:
        region = region_of(gm, node)
        if region is not None:
            yield from graphs(region.module, f"{prefix}{region.target}.")
