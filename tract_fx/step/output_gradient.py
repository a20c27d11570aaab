"""Give TrAct's operator the output's gradient, which it needs with fewer rows than columns."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tract_fx.errors import ExportError

__all__ = ["PRECONDITION_STEP", "attach_output_gradients"]

aten = torch.ops.aten


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


def attach_output_gradients(graph: fx.GraphModule, gradients: Mapping[str, fx.Node]) -> None:
    """Put `PRECONDITION_STEP` in the place of TrAct's operators, in place.

    Args:
        graph: A traced step, in which convolutions' derivatives are whole.
        gradients: The parameters' gradients in it by their names, after which calls are named.

    Raises:
        ExportError: A call is under autocast.
    """
    target = torch.ops.tract_fx.precondition.default
    for node in list(graph.graph.find_nodes(op="call_function", target=target)):
        arguments: Any = node.args
        gradient, x, *settings, input_dtype = arguments
        if input_dtype is not None:
            raise ExportError(
                f"TrAct on a layer under autocast to {input_dtype}",
                "the graph has no rounding of its input, which TrAct's rows have there",
                "Leave autocast out of what is exported",
            )
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(
                PRECONDITION_STEP,
                (gradient, x, _output_gradient(gradient, x), *settings, _name(node, gradients)),
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _name(node: fx.Node, gradients: Mapping[str, fx.Node]) -> str:
    """Name a call after the module of the first parameter whose gradient it is part of."""
    reached, pending = {node}, [node]
    while pending:
        new = [user for user in pending.pop().users if user not in reached]
        reached.update(new)
        pending += new
    found = next((name for name, gradient in gradients.items() if gradient in reached), "")
    return found.partition(".parametrizations")[0].removesuffix(".weight") or "call"


def _output_gradient(gradient: Any, x: Any) -> Any:
    """Find the other operand of the product that a weight's gradient is; None where it is none.

    Of a linear layer it is (R, out), whatever the output's shape is.
    """  # noqa: DOC201
    *_, product = _origins(gradient)
    inputs = set(_origins(x))
    if product.target is operator.getitem:
        call, index = product.args
        if call.target is aten.convolution_backward.default and index == 1:
            dz, image = call.args[:2]
            return dz if set(_origins(image)) & inputs else None
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
