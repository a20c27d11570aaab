"""Memory: what an operation's result may lie in, and what the operation writes into.

Operators say both in their schemas. What has no schema (a module, a function written in Python) and
composite operators, which may hand an operand back, count as lying in all of their operands: to
believe too much changes nothing unless something is written.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from tract_fx import torch_private

_WRITING_OPERATORS = {
    operator.setitem,
    *(operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv),
    *(operator.ifloordiv, operator.imod, operator.ipow, operator.iconcat),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
}
# It makes its first operand lie in its second, which its schema has no word for.
_MOVES_MEMORY = "aten::set_"


@dataclass(frozen=True)
class Effects:
    """What an operation does to memory.

    Attributes:
        shares: Operands whose memory its result may lie in.
        writes: Operands that it writes into.
        understood: Whether that is known to be all that it writes into.
    """

    shares: tuple[Node, ...] = ()
    writes: tuple[Node, ...] = ()
    understood: bool = True


def effects(node: Node, module: nn.Module | None) -> Effects:
    """Tell what an operation does to memory."""
    operands = tuple(node.all_input_nodes)
    if node.op == "call_module":
        return Effects(operands, operands[:1] if getattr(module, "inplace", False) else ())
    if node.target in _WRITING_OPERATORS:
        return Effects(operands[:1], operands[:1])
    schemas = _schemas(node)
    if schemas:
        return _of_schemas(node, schemas)
    name = str(getattr(node.target, "__name__", node.target))
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        writes = "mutation" in name
        return Effects(operands, operands if writes else (), understood=not writes)
    if name.endswith("_") and not name.endswith("__"):
        return Effects(operands, operands, understood=len(operands) < 2)
    return Effects(operands, tuple(_written_on_request(node)))


def _written_on_request(node: Node) -> Iterator[Node]:
    """Give what a function written in Python writes into because its arguments say so."""
    given = dict(node.kwargs)
    if isinstance(node.target, types.FunctionType):
        try:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):  # a signature that is not the function's own
            pass
    yield from _nodes(given.get("out"))
    if given.get("inplace"):
        yield from node.all_input_nodes[:1]


def _schemas(node: Node) -> list[Any]:
    """Give the operators that a call may end in; of an exported graph's there is one."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return [target]
    written_in_python = isinstance(target, types.FunctionType) or target is getattr
    if written_in_python or target is operator.getitem:
        return []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    packet = target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, o) for o in packet.overloads()]
    overloads = [o for o in overloads if torch_private.is_composite(o) is not None]
    fitting = [o for o in overloads if _fits(node, o._schema.arguments)]
    return fitting or [o for o in overloads if "out" not in o._overloadname]


def _fits(node: Node, arguments: list[Any]) -> bool:
    """Tell whether an overload takes as many arguments, and of such names."""
    by_position = [a for a in arguments if not a.kwarg_only]
    names = {a.name for a in arguments} | {"input"}
    required = [a for a in arguments if a.kwarg_only and a.alias_info is not None]
    return (
        len(node.args) <= len(by_position)
        and set(node.kwargs) <= names
        and all(a.name in node.kwargs for a in required)
    )


def _of_schemas(node: Node, overloads: list[Any]) -> Effects:
    shares: dict[Node, None] = {}
    writes: dict[Node, None] = {}
    for overload in overloads:
        schema = overload._schema
        result = {name for r in schema.returns if r.alias_info for name in _sets(r.alias_info)}
        may_be_operand = not result and torch_private.is_composite(overload)
        for argument, nodes in _arguments(node, schema.arguments):
            info = argument.alias_info
            # Its memory is the result's, or an entry's of a list that is the result.
            becomes = info is not None and not _sets(info).isdisjoint({*result, "*"})
            if may_be_operand or becomes:
                shares.update(dict.fromkeys(nodes))
            if info is not None and info.is_write:
                writes.update(dict.fromkeys(nodes))
    if any(o._schema.name == _MOVES_MEMORY for o in overloads):
        return Effects(tuple(node.all_input_nodes), tuple(node.all_input_nodes), understood=False)
    return Effects(tuple(shares), tuple(writes))


def _sets(info: Any) -> set[str]:
    """Name the sets of memory that a value may lie in."""
    return {*info.before_set, *info.after_set}


def _arguments(node: Node, declared: list[Any]) -> Iterator[tuple[Any, list[Node]]]:
    """Pair what a schema declares with the nodes that are given for it."""
    for position, argument in enumerate(declared):
        if argument.name in node.kwargs:
            yield argument, _nodes(node.kwargs[argument.name])
        elif position == 0 and "input" in node.kwargs:
            yield argument, _nodes(node.kwargs["input"])
        elif position < len(node.args) and not argument.kwarg_only:
            yield argument, _nodes(node.args[position])


def _nodes(argument: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(argument, found.append)
    return found
