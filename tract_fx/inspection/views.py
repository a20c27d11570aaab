"""Pictures of fx graphs: which nodes they show, what these read and are called.

Nodes that only pass a value on (`getitem`, `detach`, in the backward pass also reshapes) are left
out, and what reads them reads what they pass on. Nodes that carry no tensor are left out too.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from tract_fx.inspection.batch import value_words
from tract_fx.inspection.joint_graph import Role, is_backward, output_roles
from tract_fx.inspection.neighbourhood import view_of
from tract_fx.inspection.records import GraphView, ViewNode
from tract_fx.inspection.sources import source_of
from tract_fx.modules import plain_class, tract_lambda
from tract_fx.passes.fx_graph.calls import is_precondition_grad, read_lambda
from tract_fx.passes.fx_graph.reasons import carries_no_values
from tract_fx.passes.fx_graph.values import lookup, resolve

PRECONDITION = torch.ops.tract_fx.precondition.default
_NAMES = {
    "_native_batch_norm_legit_functional": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "threshold_backward": "relu_backward",
    "_to_copy": "cast",
    "bitwise_and": "and",
    "bitwise_not": "not",
}
_ARITHMETIC = {"add", "sub", "mul", "div", "truediv", "pow", "eq", "ne"}
_GRADIENTS = {"convolution_backward": ("gx", "gW", "gb")}
_LONGEST_PATH = 24
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
        self.nodes.append(ViewNode(name, detail=_detail_of(self.gm, of), **fields))
        return name

    def _read_input(self, node: Node) -> None:
        role = self.roles.get(node) or _role(self.gm, node)
        if node.users or role.kind == "input":
            self.names[node] = self._add(role.label, node, inputs=(), **vars(role))

    def _read_operation(self, node: Node) -> None:
        read = [self.names[n] for n in node.all_input_nodes if n in self.names]
        operands = tuple(dict.fromkeys(read))
        backward = is_backward(node)
        name = _operation_name(node)
        if len(operands) == 1 and (name in _PASSED_ON or (backward and name in _RESHAPED)):
            self.names[node] = operands[0]
            return
        if name in _FILLED and backward:
            return
        label, stage = _tract_label(self.gm, node), stage_of(node)
        self.names[node] = self._add(
            _short_name(node, name),
            node,
            label=label or _operation_label(self.gm, node),
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


def stage_of(node: Node) -> str:
    """Tell the part of TrAct that a node is a step of."""
    return str((node.meta.get("custom") or {}).get("stage", ""))


def value_of(node: Node) -> Any:
    """Something with the shape and dtype of a node's tensor, or several; None where not known."""
    value = node.meta.get("val")
    return node.meta.get("tensor_meta") if value is None else value


def _tract_label(gm: fx.GraphModule, node: Node) -> str:
    """Say what TrAct does at a node."""
    if is_precondition_grad(node):
        return f"TrAct (identity on the weight), λ = {read_lambda(node):g}"
    if node.target is PRECONDITION:
        return f"TrAct: gW (XᵀX/R + λI)⁻¹, λ = {node.args[2]:g}"
    if node.op == "call_module" and node.kwargs.get("tract", True):
        module = lookup(gm, node)
        lambda_ = None if module is None else tract_lambda(module)
        if lambda_ is not None:
            return f"{_called(node, module)} with TrAct, λ = {lambda_:g}"
    return ""


def _operation_label(gm: fx.GraphModule, node: Node) -> str:
    """Say what a node does: its operation, with the number it takes and the module it lies in."""
    if node.op == "call_module":
        return _called(node, lookup(gm, node))
    name = _operation_name(node)
    number = node.args[1] if len(node.args) == 2 else None
    if name in _ARITHMETIC and isinstance(number, (int, float)):
        name = f"{name} {number:g}"
    if stage_of(node):
        return name
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    while len(path) > _LONGEST_PATH and "." in path:
        path = path.partition(".")[2]
    return f"{name} ({path})" if path else name


def _operation_name(node: Node) -> str:
    """Name a node's operation without a namespace or an overload."""
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    name = str(getattr(target, "__name__", target))
    if name.startswith("_scaled_dot_product") and "attention" in name:
        return "attention_backward" if name.endswith("backward") else "attention"
    return _NAMES.get(name, name.removeprefix("native_").removeprefix("linalg_"))


def _called(node: Node, module: object) -> str:
    cls = plain_class(type(module)) if isinstance(module, nn.Module) else type(module)
    return f"{node.target} ({cls.__name__})"


def _detail_of(gm: fx.GraphModule, node: Node) -> str:
    """Describe a node's value, of several tensors those that are read; empty if not known."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        if is_parametrized(resolve(gm, owner), name):
            return ""  # reading it would compute it, which may change buffers
        return _describe(lookup(gm, node))
    value = value_of(node)
    if not isinstance(value, (tuple, list)):
        return _describe(value)
    read = [user for user in node.users if user.target is operator.getitem and user.users]
    by_number: dict[Any, str] = {part.args[1]: _describe(value_of(part)) for part in read}
    names = _GRADIENTS.get(_operation_name(node))
    if names is None:
        return by_number[min(by_number)] if by_number else ""
    return ", ".join(f"{names[number]} {by_number[number]}" for number in sorted(by_number))


def _describe(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return ""
    return value_words(dtype, shape)
