"""Pictures of fx graphs: which nodes they show, and what these read.

Nodes that only pass a value on (`getitem`, `detach`, in the backward pass also reshapes) are left
out, and what reads them reads what they pass on. Nodes that carry no tensor are left out too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from tract_fx.inspection.joint_graph import Role, is_backward, output_roles
from tract_fx.inspection.labels import (
    detail_of,
    operation_label,
    operation_name,
    stage_of,
    tract_label,
)
from tract_fx.inspection.neighbourhood import view_of
from tract_fx.inspection.records import GraphView, ViewNode
from tract_fx.inspection.sources import source_of
from tract_fx.passes.fx_graph.reasons import carries_no_values
from tract_fx.passes.fx_graph.values import resolve

_PASSED_ON = {"getitem", "detach", "alias", "t", "lift_fresh_copy"}
_RESHAPED = {
    *("view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "clone", "squeeze"),
    *("unsqueeze", "slice", "select", "split", "diagonal"),
}
_FILLED = {"new_zeros", "scalar_tensor"}


def graph_view(
    gm: fx.GraphModule,
    title: str,
    *,
    inputs: Sequence[Role] = (),
    outputs: Sequence[Role | None] = (),
    radius: int = 3,
    whole: bool = False,
    note: str = "",
) -> GraphView:
    """Make a picture of a graph."""
    nodes = _Reader(gm, inputs, outputs).read()
    return view_of(nodes, title, radius, whole=whole, note=note)


class _Reader:
    """Turns the nodes of one graph into those of a picture."""

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Role], outputs: Sequence[Role | None]
    ) -> None:
        self.gm = gm
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.roles = dict(zip(placeholders, inputs, strict=True)) if inputs else {}
        self.outputs = outputs
        self.names: dict[Node, str] = {}  # of what stands for a node's value in the picture
        self.nodes: list[ViewNode] = []
        self.taken: set[str] = set()

    def read(self) -> list[ViewNode]:
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._read_input(node)
            elif node.op == "output":
                self._read_outputs(node)
            elif _carries_tensors(node, self.names):
                self._read_operation(node)
        return self.nodes

    def _add(self, name: str, of: Node, **fields: Any) -> str:
        name = name.replace(" ", "_")
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.nodes.append(ViewNode(name, detail=detail_of(self.gm, of), **fields))
        return name

    def _read_input(self, node: Node) -> None:
        role = self.roles.get(node) or _role(self.gm, node)
        if node.users or role.kind == "input":
            self.names[node] = self._add(role.label, node, inputs=(), **vars(role))

    def _read_operation(self, node: Node) -> None:
        read = [self.names[n] for n in node.all_input_nodes if n in self.names]
        operands = tuple(dict.fromkeys(read))
        backward = is_backward(node)
        name = operation_name(node)
        if len(operands) == 1 and (name in _PASSED_ON or (backward and name in _RESHAPED)):
            self.names[node] = operands[0]
            return
        if name in _FILLED and backward:
            return
        label, stage = tract_label(self.gm, node), stage_of(node)
        self.names[node] = self._add(
            _short_name(node, name),
            node,
            label=label or operation_label(self.gm, node),
            kind="tract" if label or stage else "operation",
            part="backward" if backward else "forward",
            inputs=operands,
            stage=stage,
            source=source_of(node),
        )

    def _read_outputs(self, node: Node) -> None:
        values: list[Any] = pytree.tree_leaves(node.args)
        roles = self.outputs
        if not roles:
            values = [value for value in values if isinstance(value, Node)]
            roles = output_roles(len(values))
        for value, role in zip(values, roles, strict=True):
            if role is not None and isinstance(value, Node) and value in self.names:
                self._add(role.label, value, inputs=(self.names[value],), **vars(role))


def _role(gm: fx.GraphModule, node: Node) -> Role:
    """Tell an input from a parameter and from a constant, in a forward graph."""
    target = str(node.target)
    if node.op == "placeholder":
        return Role(target, "input")
    if target.startswith("_tensor_constant"):
        return Role("constant", "constant")
    owner, _, name = target.rpartition(".")
    module = resolve(gm, owner)
    trainable = is_parametrized(module, name) or isinstance(resolve(gm, target), nn.Parameter)
    return Role(target, "parameter" if trainable else "constant")


def _short_name(node: Node, operation: str) -> str:
    """Name a node by what it does, with the number that its own name ends in."""
    number = re.search(r"_\d+$", node.name)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.name
    return operation + (number[0] if number else "")


def _carries_tensors(node: Node, names: Mapping[Node, str]) -> bool:
    """Tell operations on tensors from those on shapes, numbers and flags."""
    if "val" in node.meta:
        leaves = pytree.tree_leaves(node.meta["val"])
        return any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    inputs = node.all_input_nodes
    return not carries_no_values(node) and (not inputs or any(n in names for n in inputs))
