"""Copies of module trees that share every tensor with the original."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from typing import Any, TypeVar

from torch import fx, nn

from tract_fx import torch_private

__all__ = ["copy_tree"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_tree(root: ModuleT) -> ModuleT:
    """Copy a module and its children; share parameters, buffers and all other tensors.

    The dicts that hold children, parameters, buffers and hooks are copied too, so that `.eval()`,
    a hook or a replaced child on one tree does not reach the other. References from a module to
    modules of the tree (as an attribute, in a container, bound in a method or a partial) lead to
    the copies; those inside closures and other objects still lead to the originals. Graphs of
    `fx.GraphModule`s are copied as well.

    Args:
        root: The module to copy. Not changed.

    Returns:
        The copy, of the same class.
    """
    memo: dict[int, Any] = {}
    originals = list(root.modules())
    for module in originals:
        memo[id(module)] = _empty(module)
    for module in originals:
        copied = memo[id(module)]
        copied.__dict__ = {k: _follow(v, memo) for k, v in module.__dict__.items()}
    for module in originals:
        if isinstance(module, fx.GraphModule):
            memo[id(module)].graph = torch_private.copy_graph(module.graph)
    return memo[id(root)]  # type: ignore[no-any-return]


def _empty(module: nn.Module) -> nn.Module:
    """Make an instance without a state: of a class of its own for a GraphModule, as fx wants it."""
    cls = type(module)
    if isinstance(module, fx.GraphModule):
        return fx.GraphModule.__new__(cls)  # type: ignore[type-var]
    return object.__new__(cls)  # FSDP's classes override __new__


def _follow(value: Any, memo: dict[int, Any]) -> Any:
    """Copy containers, replace modules of the tree by their copies, share all else."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _follow(value.__self__, memo))
    if type(value) is functools.partial:
        arguments = [_follow(a, memo) for a in value.args]
        keywords = {k: _follow(v, memo) for k, v in value.keywords.items()}
        return functools.partial(_follow(value.func, memo), *arguments, **keywords)
    if type(value) in (dict, OrderedDict):
        copied = memo[id(value)] = type(value)()
        copied.update((k, _follow(v, memo)) for k, v in value.items())
        return copied
    if type(value) is list:
        items = memo[id(value)] = []
        items.extend(_follow(v, memo) for v in value)
        return items
    if type(value) in (tuple, set):
        return type(value)(_follow(v, memo) for v in value)
    return value
