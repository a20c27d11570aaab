"""What the nodes of an fx graph are called in a picture, and what their values look like."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from tract_fx.inspection.batch import value_words
from tract_fx.modules import plain_class, tract_lambda
from tract_fx.passes.fx_graph.calls import is_precondition_grad, read_lambda
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


def stage_of(node: Node) -> str:
    """Tell the part of TrAct that a node is a step of."""
    return str((node.meta.get("custom") or {}).get("stage", ""))


def value_of(node: Node) -> Any:
    """Something with the shape and dtype of a node's tensor, or several; None where not known."""
    value = node.meta.get("val")
    return node.meta.get("tensor_meta") if value is None else value


def tract_label(gm: fx.GraphModule, node: Node) -> str:
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


def operation_label(gm: fx.GraphModule, node: Node) -> str:
    """Say what a node does: its operation, with the number it takes and the module it lies in."""
    if node.op == "call_module":
        return _called(node, lookup(gm, node))
    name = operation_name(node)
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


def operation_name(node: Node) -> str:
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


def detail_of(gm: fx.GraphModule, node: Node) -> str:
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
    names = _GRADIENTS.get(operation_name(node))
    if names is None:
        return by_number[min(by_number)] if by_number else ""
    return ", ".join(f"{names[number]} {by_number[number]}" for number in sorted(by_number))


def _describe(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return ""
    return value_words(dtype, shape)
