"""What the rewrite changed in the forward pass, as text to compare and as a picture."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional

from tract_fx.inspection.records import ForwardDiff
from tract_fx.inspection.views import graph_view
from tract_fx.passes.fx_graph.values import lookup

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def forward_diff(
    plain: nn.Module, rewritten: nn.Module, graph: fx.GraphModule, *, whole: bool = False
) -> ForwardDiff:
    """Compare two graphs node by node, or two eager models, of which one's graph is drawn."""
    if isinstance(plain, fx.GraphModule) and isinstance(rewritten, fx.GraphModule):
        before, after = _listing(plain), _listing(rewritten)
    else:
        before, after = repr(plain), repr(rewritten)
    return ForwardDiff(before, after, graph_view(graph, "Forward pass with TrAct", whole=whole))


def _listing(gm: fx.GraphModule) -> str:
    """Write a graph as assignments, a line per node; that of a module says what the module is."""
    return "\n".join(_line(gm, node) for node in gm.graph.nodes)


def _line(gm: fx.GraphModule, node: Node) -> str:
    arguments = [_write(a) for a in node.args]
    arguments += [f"{key}={_write(value)}" for key, value in node.kwargs.items()]
    if node.op == "placeholder":
        return f"{node.target} = input({', '.join(arguments)})"
    if node.op == "output":
        return f"return {arguments[0]}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    if node.op == "call_method":
        owner, *arguments = arguments
        return f"{node.name} = {owner}.{node.target}({', '.join(arguments)})"
    call = ", ".join(arguments)
    if node.op == "call_function":
        return f"{node.name} = {_function(node.target)}({call})"
    return f"{node.name} = self.{node.target}({call})  # {_module(lookup(gm, node))}"


def _write(value: Any) -> str:
    """Write an argument, its nodes by their names."""
    named = map_arg(value, lambda node: _Name(node.name))
    return _ADDRESS.sub("", repr(named))


class _Name(str):
    """A node's name, written without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = str(getattr(target, "__name__", target))
    for prefix, module in (("torch", torch), ("F", functional), ("operator", operator)):
        if getattr(module, name, None) is target:
            return f"{prefix}.{name}"
    return name


def _module(module: object) -> str:
    """Write a module on one line: all of a layer, the class alone of one that holds others."""
    if not isinstance(module, nn.Module) or next(module.children(), None) is not None:
        return type(module).__name__
    return " ".join(_ADDRESS.sub("", repr(module)).split())
