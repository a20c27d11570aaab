"""What the value of an fx node is made of: the model's input, parameters, features."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from tract_fx import torch_private


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
            counts while it is by itself, but not once it has joined features), or has passed a
            frozen layer.
        minor: Whether it is of an input that does not compete for being the image.
        past_frozen: Whether a layer with weights that are not trained lies on the path.
    """

    path: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    trainable: bool = False
    from_layers: bool = False
    stale: bool = False
    optional: bool = False
    minor: bool = False
    past_frozen: bool = False

    @staticmethod
    def join(values: Iterable[Value]) -> Value:
        """Combine the operands of an operation that has no parameters of its own."""
        values = list(values)
        features = any(v.from_layers for v in values)
        inputs = [v for v in values if v.path and not (v.optional and features)]
        inputs.sort(key=lambda v: (v.minor, v.past_frozen, v.optional))  # stable
        first = inputs[0] if inputs else Value()
        return Value(
            path=first.path,
            optional=first.optional,
            minor=first.minor,
            past_frozen=first.past_frozen,
            parameters=tuple(dict.fromkeys(p for v in values for p in v.parameters)),
            trainable=any(v.trainable for v in values),
            from_layers=features,
            stale=any(v.stale for v in values),
        )

    def with_parameters(self, prefix: str, module: nn.Module) -> Value:
        """Add a module's parameters."""
        own = dict(module.named_parameters(prefix))
        return replace(
            self,
            parameters=(*self.parameters, *own),
            trainable=self.trainable or any(p.requires_grad for p in own.values()),
        )


class Values:
    """What nodes' values are made of, at the point that a walk through the graph has reached.

    What is written into memory shows in every node that lies in it, whichever of them it was
    written through, and whether that was made before or after.
    """

    def __init__(self) -> None:
        self._made: dict[Node, Value] = {}
        self._memory: dict[Node, tuple[Hashable, ...]] = {}
        self._written: dict[Hashable, Value] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._made

    def __getitem__(self, node: Node) -> Value:
        written = [self._written[m] for m in self._memory[node] if m in self._written]
        return Value.join((self._made[node], *written)) if written else self._made[node]

    def add(
        self,
        node: Node,
        value: Value,
        shares: Iterable[Node] = (),
        memory: Hashable | None = None,
    ) -> None:
        """Note a node."""
        own = node if memory is None else memory
        others = (m for n in shares for m in self._memory[n])
        self._made[node] = value
        self._memory[node] = tuple(dict.fromkeys((own, *others)))

    def write(self, node: Node, value: Value, over: bool = False) -> None:
        """Note what is written into the memory that a node may lie in."""
        for memory in self._memory[node]:
            if over and isinstance(memory, Node):
                self._made[memory] = value
            before = None if over else self._written.get(memory)
            self._written[memory] = value if before is None else Value.join((before, value))


def lookup(gm: fx.GraphModule, node: Node) -> Any:
    """Resolve the target of a `get_attr` or `call_module` node."""
    return resolve(gm, str(node.target))


def resolve(root: nn.Module, path: str) -> Any:
    """Follow a dotted path from a module."""
    value: Any = root
    for atom in filter(None, path.split(".")):
        value = getattr(value, atom, None)
    return value


def attribute_value(gm: fx.GraphModule, node: Node, prefix: str) -> tuple[Value, Hashable]:
    """Tell what a `get_attr` node holds: a parameter, a parametrized weight, a constant."""
    target = str(node.target)
    owner_path, _, name = target.rpartition(".")
    owner = gm.get_submodule(owner_path) if owner_path else gm
    if is_parametrized(owner, name):
        own: Any = owner.parametrizations[name]  # type: ignore[index]
        path = ".".join(filter(None, (owner_path, "parametrizations", name)))
        return Value().with_parameters(prefix + path, own), prefix + target
    value = lookup(gm, node)
    if isinstance(value, nn.Module):
        return Value().with_parameters(prefix + target, value), prefix + target
    if not isinstance(value, torch.Tensor):
        return Value(), prefix + target
    memory: Hashable = torch_private.storage_of(value) or prefix + target
    if isinstance(value, nn.Parameter) or value.requires_grad:
        stale = value.grad_fn is not None
        return Value(
            parameters=(prefix + target,), trainable=value.requires_grad, stale=stale
        ), memory
    return Value(), memory


def node_shape(gm: fx.GraphModule, node: Node) -> tuple[int, ...] | None:
    """Give the static shape of a node's tensor, where the graph tells it."""
    if node.op != "get_attr":
        return static_shape(node.meta.get("val", node.meta.get("example_value")))
    owner, _, name = str(node.target).rpartition(".")
    if is_parametrized(resolve(gm, owner), name):
        return None  # reading it would compute it, which may change buffers (spectral norm)
    return static_shape(lookup(gm, node))


def static_shape(value: object) -> tuple[int, ...] | None:
    """Give a tensor's shape."""
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        return None
    return tuple(value.shape)
