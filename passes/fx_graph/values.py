"""What the value of an fx node is made of: the model's input, parameters, features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["Value", "attribute_value", "lookup", "node_shape", "resolve", "static_shape"]


@dataclass(frozen=True)
class Value:
    """What a node's value is made of.

    Attributes:
        path: Names of nodes from a placeholder to here, while no trainable parameter has met it;
            empty where the value has nothing of the raw input.
        parameters: Names of the parameters in it.
        trainable: Whether one of these requires a gradient.
        from_layers: Whether it holds features: outputs of operations that have parameters.
        stale: Whether it is a tensor that a tracer kept from a computation on parameters.
        optional: Whether the path starts at a placeholder that may be left out (a mask, say, which
            counts while it is by itself, but not once it has joined features).
    """

    path: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    trainable: bool = False
    from_layers: bool = False
    stale: bool = False
    optional: bool = False

    @staticmethod
    def join(values: Iterable[Value]) -> Value:
        """Combine the operands of an operation that has no parameters of its own.

        Args:
            values: The operands' values.

        Returns:
            The value of the result, with the first operand's path.
        """
        values = list(values)
        features = any(v.from_layers for v in values)
        inputs = [v for v in values if v.path and not (v.optional and features)]
        inputs.sort(key=lambda v: v.optional)  # stable: the first that is not, if there is one
        return Value(
            path=inputs[0].path if inputs else (),
            optional=bool(inputs) and inputs[0].optional,
            parameters=tuple(dict.fromkeys(p for v in values for p in v.parameters)),
            trainable=any(v.trainable for v in values),
            from_layers=features,
            stale=any(v.stale for v in values),
        )

    def with_parameters(self, prefix: str, module: nn.Module) -> Value:
        """Add a module's parameters.

        Args:
            prefix: The module's path.
            module: The module.

        Returns:
            The value with them.
        """
        own = dict(module.named_parameters(prefix))
        return replace(
            self,
            parameters=(*self.parameters, *own),
            trainable=self.trainable or any(p.requires_grad for p in own.values()),
        )


def lookup(gm: fx.GraphModule, node: Node) -> Any:
    """Resolve the target of a `get_attr` or `call_module` node.

    Args:
        gm: The module that the graph belongs to.
        node: The node.

    Returns:
        What the target names, None where nothing is there.
    """
    return resolve(gm, str(node.target))


def resolve(root: nn.Module, path: str) -> Any:
    """Follow a dotted path from a module.

    Args:
        root: The module.
        path: The path, `""` for the module itself.

    Returns:
        What the path leads to, None where nothing is there.
    """
    value: Any = root
    for atom in filter(None, path.split(".")):
        value = getattr(value, atom, None)
    return value


def attribute_value(gm: fx.GraphModule, node: Node) -> Value:
    """Tell what a `get_attr` node holds: a parameter, a parametrized weight, a constant.

    Args:
        gm: The module that the graph belongs to.
        node: The node.

    Returns:
        Its value.
    """
    target = str(node.target)
    owner_path, _, name = target.rpartition(".")
    owner = gm.get_submodule(owner_path) if owner_path else gm
    if is_parametrized(owner, name):
        own: Any = owner.parametrizations[name]  # type: ignore[index]
        prefix = ".".join(filter(None, (owner_path, "parametrizations", name)))
        return Value().with_parameters(prefix, own)
    value = lookup(gm, node)
    if isinstance(value, nn.Module):
        return Value().with_parameters(target, value)
    if isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor) and value.requires_grad):
        stale = value.grad_fn is not None
        return Value(parameters=(target,), trainable=value.requires_grad, stale=stale)
    return Value()


def node_shape(gm: fx.GraphModule, node: Node) -> tuple[int, ...] | None:
    """Give the static shape of a node's tensor, where the graph tells it.

    Args:
        gm: The module that the graph belongs to.
        node: The node.

    Returns:
        The shape, None where it is not known before running.
    """
    if node.op != "get_attr":
        return static_shape(node.meta.get("val"))
    owner, _, name = str(node.target).rpartition(".")
    if is_parametrized(resolve(gm, owner), name):
        return None  # reading it would compute it, which may change buffers (spectral norm)
    return static_shape(lookup(gm, node))


def static_shape(value: object) -> tuple[int, ...] | None:
    """Give a tensor's shape.

    Args:
        value: Anything.

    Returns:
        The shape, None for anything but a tensor of static shape.
    """
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        return None
    return tuple(value.shape)
