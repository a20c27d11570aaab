"""Tell TrAct's calls apart in a step: each one's weight, its gradient, its output's gradient."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tract_fx.errors import ExportError
from tract_fx.preconditioner import PRECONDITION_GRAD_OPERATOR
from tract_fx.step.names import free_name

aten = torch.ops.aten


@torch.library.custom_op("tract_fx::treated_weight", mutates_args=())
def _treated_weight(weight: Tensor, call: str) -> Tensor:
    return weight.clone()


@_treated_weight.register_fake
def _(weight: Tensor, call: str) -> Tensor:
    return torch.empty_like(weight)


TREATED_WEIGHT = torch.ops.tract_fx.treated_weight.default
"""A weight as one of TrAct's calls reads it."""


@torch.library.custom_op("tract_fx::precondition_step", mutates_args=())
def _precondition_step(
    grad: Tensor,
    input: Tensor,  # noqa: A002
    output_gradient: Tensor | None,
    lambda_: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    call: str,
) -> Tensor:
    found: Tensor = torch.ops.tract_fx.precondition(
        grad, input, lambda_, stride, padding, dilation, groups, None
    )
    return found


@_precondition_step.register_fake
def _(grad: Tensor, *_: object) -> Tensor:
    return torch.empty_like(grad)


PRECONDITION_STEP = torch.ops.tract_fx.precondition_step.default
"""`tract_fx::precondition` of one call, beside whose weight gradient stands its output's."""

# What leaves a matrix's numbers as they are, in another order or shape.
_SAME_NUMBERS = {
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten.reshape.default),
    *(aten.clone.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
}


def attach_output_gradients(
    graph: fx.GraphModule, gradients: Mapping[str, fx.Node], parameters: Mapping[str, fx.Node]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Put `PRECONDITION_STEP` and `TREATED_WEIGHT` in the place of TrAct's operators, in place."""
    forward = _calls(graph, PRECONDITION_GRAD_OPERATOR)
    taken: set[str | None] = set()
    lambdas: dict[str, float] = {}
    # The last call's gradient comes first.
    for node in _calls(graph, torch.ops.tract_fx.precondition.default):
        arguments: Any = node.args
        gradient, x, *settings, input_dtype = arguments
        if input_dtype is not None:
            raise ExportError(
                f"TrAct on a layer under autocast to {input_dtype}",
                "the graph has no rounding of its input, which TrAct's rows have there",
                "Leave autocast out of what is exported",
            )
        trained = _part_of(node, gradients)
        name = free_name(_name(trained), taken)
        lambdas[name] = settings[0]
        new = (gradient, x, _output_gradient(gradient, x), *settings, name)
        _replace(graph, node, PRECONDITION_STEP, new)
        weights = {parameters[name] for name in trained}
        own = [n for n in forward if n.args[1:] == arguments[1:] and weights & ancestors(n.args[0])]
        if own:
            forward.remove(own[-1])
            _replace(graph, own[-1], TREATED_WEIGHT, (own[-1].args[0], name))
    idle = []
    for node in forward:
        reached = ancestors(node.args[0])
        weight = [name for name, parameter in parameters.items() if parameter in reached]
        idle.append(free_name(_name(weight), taken))
        lambdas[idle[-1]] = node.args[2]  # type: ignore[assignment]
        _replace(graph, node, TREATED_WEIGHT, (node.args[0], idle[-1]))
    graph.recompile()
    return lambdas, tuple(idle)


def ancestors(node: Any) -> set[fx.Node]:
    """Give a node and all that it is computed from."""
    return _reached(node, lambda n: n.all_input_nodes)


def _reached(node: fx.Node, next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached, pending = {node}, [node]
    while pending:
        new = [n for n in next_to(pending.pop()) if n not in reached]
        reached.update(new)
        pending += new
    return reached


def _calls(graph: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=target))


def _replace(graph: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _part_of(node: fx.Node, gradients: Mapping[str, fx.Node]) -> list[str]:
    """Names of the parameters whose gradients a node is part of."""
    reached = _reached(node, lambda n: n.users)
    return [name for name, gradient in gradients.items() if gradient in reached]


def _name(parameters: Sequence[str]) -> str:
    """Name a call after the module of the first parameter."""
    first = parameters[0] if parameters else ""
    return first.partition(".parametrizations")[0].removesuffix(".weight") or "call"


def _output_gradient(gradient: Any, x: Any) -> Any:
    """Find the other operand of the product that a weight's gradient is; None where it is none.

    Of a linear layer it is (R, out), whatever the output's shape is.
    """
    *_, product = _origins(gradient)
    inputs = set(_origins(x))
    if product.target is operator.getitem:
        call, index = product.args
        if call.target is aten.convolution_backward.default and index == 1:
            dz, image = call.args[:2]
            reached = set(_origins(image))
            if image.target is aten.constant_pad_nd.default:  # more on one side: padding="same"
                reached |= set(_origins(image.args[0]))
            return dz if reached & inputs else None
    if product.target is not aten.mm.default:
        return None
    left, right = product.args
    of_left, of_right = (bool(set(_origins(operand)) & inputs) for operand in product.args)
    if of_left == of_right:
        return None
    if of_left:  # Xᵀ dz
        return right
    if left.target is aten.t.default:
        return left.args[0]
    with left.graph.inserting_after(left):
        transposed = left.graph.call_function(aten.t.default, (left,))
    transposed.meta["val"] = left.meta["val"].mT
    return transposed


def _origins(node: Any) -> Iterator[Any]:
    """A node, and what its numbers are another shape of."""
    yield node
    while node.op == "call_function" and node.target in _SAME_NUMBERS:
        node = node.args[0]
        yield node
