"""A loss as a program of torch's operators, refused where it can't stand alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.export.lost_in_graphs import refuse_bounded_batch
from tract_fx.export.quiet import quiet

__all__ = ["evaluate_loss", "refuse_stopped_gradients", "trace_loss"]

_DETACH = frozenset({torch.ops.aten.detach.default, torch.ops.aten.detach_.default})
_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_RETURN_LOSS = "Let the model's forward compute and return the loss, and give loss=None"


class _Loss(nn.Module):
    """A callable as a module, so that torch.export takes it.

    Args:
        function: The loss.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            *values: Outputs, then targets.

        Returns:
            The loss.
        """
        return self.function(*values)


def evaluate_loss(function: Callable[..., Tensor], values: Sequence[Any]) -> Tensor:
    """Compute a loss on examples, and refuse what is no loss of the outputs alone.

    Args:
        function: The loss.
        values: Outputs, then targets, no tensor of which requires a gradient.

    Returns:
        The loss, a float32 scalar.

    Raises:
        UnsupportedTrainingError: If it fails on the examples, gives something else than one float32
            scalar, or has a gradient by a tensor that is not among its arguments.
    """
    tensors = [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
    shapes = ", ".join(f"{v.dtype} {tuple(v.shape)}" for v in tensors)
    try:
        with torch.enable_grad():
            loss = function(*values)
    except Exception as error:
        raise UnsupportedTrainingError(
            f"the loss fails on the example outputs and targets ({shapes}): {error}",
            "it is called as loss(*outputs, *targets)",
            "Give example targets of the shape and dtype that it takes, or another loss",
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.dtype != torch.float32:
        found = (
            f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise UnsupportedTrainingError(
            f"the loss of ({shapes}) is {found}",
            "training needs one float32 scalar",
            "Reduce it, by mean() or sum(), and give float32 targets",
        )
    if loss.requires_grad:
        raise UnsupportedTrainingError(
            "the loss has a gradient by a tensor that is neither an output nor a target",
            "exported alone, it would hold that tensor (a model's weight, or a parameter of its "
            "own) as a constant, untrained",
            _RETURN_LOSS,
        )
    return loss


def trace_loss(
    function: Callable[..., Tensor],
    values: Sequence[Tensor],
    outputs: int,
    dynamic: Sequence[Mapping[int, str]],
    trained: Iterable[Tensor] = (),
) -> ExportedProgram:
    """Trace a loss with torch.export.

    Args:
        function: The loss.
        values: Example outputs, then targets.
        outputs: How many of the values are outputs.
        dynamic: For each of them, the dimensions of no fixed size.
        trained: The model's parameters, which the loss may not hold.

    Returns:
        The program.

    Raises:
        ExportError: If it can't be traced, is random, changes a state, or stops a gradient.
        UnsupportedTrainingError: If it holds one of the trained parameters.
    """  # noqa: DOC502 - raised by _refuse_trained
    shapes = tuple(dict.fromkeys(dims, Dim.DYNAMIC) for dims in dynamic)
    try:
        program = torch.export.export(
            _Loss(function), tuple(values), dynamic_shapes=(shapes,), strict=False
        )
    except Exception as error:  # torch.export raises whatever its layers raise
        first = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"the loss can't be traced by torch.export: {type(error).__name__}: {first}",
            "a loss is exported as one graph for every batch size and all values",
            "Write it with tensor operations, without branches on values or fixed batch sizes",
        ) from error
    if any(dynamic):
        refuse_bounded_batch(program)
    for node in _calls(program.graph_module):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ExportError(
                f"the loss draws random numbers: {node.target} ({node.name})",
                "they would not be those of PyTorch, and can't be verified",
                "Pass random values in as a target",
            )
    # A program as traced changes its buffers inside its graph; decomposed, it says which.
    with quiet():
        signature = program.run_decompositions({}).graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        raise ExportError(
            f"the loss changes {', '.join(map(repr, changed.values()))} in place",
            "the exported loss keeps no state",
            "Compute the new value without an in-place operation, or in the model's forward",
        )
    _refuse_trained(program, trained)
    refuse_stopped_gradients(program, map(str, signature.user_inputs[:outputs]))
    return program


def _refuse_trained(program: ExportedProgram, trained: Iterable[Tensor]) -> None:
    """Refuse a loss that holds a trained parameter, also one that it takes no gradient of.

    Args:
        program: The loss.
        trained: The model's parameters.

    Raises:
        UnsupportedTrainingError: If it holds one of them.
    """
    memory = {p.untyped_storage().data_ptr() for p in trained if p.numel()}
    for name, value in (*program.constants.items(), *program.state_dict.items()):
        if isinstance(value, Tensor) and value.numel():
            if value.untyped_storage().data_ptr() in memory:
                raise UnsupportedTrainingError(
                    f"the loss holds a parameter of the model: {name}, {tuple(value.shape)}",
                    "exported alone, it would go on with the value of now while training goes on",
                    _RETURN_LOSS,
                )


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    """List the calls of a graph and of the graphs inside it.

    Args:
        module: The graph module.

    Returns:
        Its `call_function` nodes.
    """
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    return [n for graph in graphs for n in graph.nodes if n.op == "call_function"]


def refuse_stopped_gradients(program: ExportedProgram, inputs: Iterable[str] = ()) -> None:
    """Refuse `detach` and `no_grad` where a gradient would flow without them.

    ONNX has no such operator: the exporter drops both, and ONNX Runtime's gradient would flow.

    Args:
        program: A loss, or a model.
        inputs: Names of the program's inputs that come from something trained.

    Raises:
        ExportError: If a value that depends on those inputs or on a trained parameter through
            floating-point operators is detached, or computed under `no_grad`.
    """
    signature = program.graph_signature
    reached = set(inputs)
    reached.update(
        name
        for name, parameter in signature.inputs_to_parameters.items()
        if program.state_dict[parameter].requires_grad
    )
    stopped = _stopped(program.graph_module, reached)
    if stopped is not None:
        raise ExportError(
            f"{stopped.name} ({stopped.target}) stops a gradient",
            "the ONNX graph has no detach() and no no_grad(), so that the gradient would flow",
            "Compute that value outside and pass it in as a target, or train without it",
        )


def _stopped(module: fx.GraphModule, reached: set[str]) -> fx.Node | None:
    """Find where a gradient is stopped.

    Args:
        module: A graph module; `reached` grows with its nodes that a gradient flows through.
        reached: Names of the placeholders that a gradient may flow to.

    Returns:
        The node, None if there is none.
    """
    node: Any  # an argument of a node has no type of its own
    for node in module.graph.nodes:
        if node.op != "call_function" or not any(
            source.name in reached for source in node.all_input_nodes
        ):
            continue
        if node.target is _NO_GRAD:
            enabled, inner = node.args[0], getattr(module, node.args[1].target)
            inside = _inside(node, inner, reached)
            found = _stopped(inner, inside)
            if found is not None:
                return found
            if not enabled and _yields(inner, inside):
                return _first(inner, inside)
            reached.add(node.name)
        elif _floating(node):
            if node.target in _DETACH:
                return cast(fx.Node, node)
            reached.add(node.name)
    return None


def _inside(node: fx.Node, inner: fx.GraphModule, reached: set[str]) -> set[str]:
    """Carry what is reached into a graph that a node calls.

    Args:
        node: The call, with the inner graph's arguments after the first two.
        inner: The inner graph.
        reached: Names in the outer graph.

    Returns:
        Names of the inner placeholders.
    """
    holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    return {
        holder.name
        for holder, given in zip(holders, node.args[2:], strict=True)
        if isinstance(given, fx.Node) and given.name in reached
    }


def _yields(inner: fx.GraphModule, reached: set[str]) -> bool:
    """Tell whether a graph gives out something that a gradient flows through.

    Args:
        inner: The graph.
        reached: Names in it.

    Returns:
        Whether one of its outputs is among them.
    """
    output = next(n for n in inner.graph.nodes if n.op == "output")
    return any(source.name in reached for source in output.all_input_nodes)


def _first(inner: fx.GraphModule, reached: set[str]) -> fx.Node:
    """Name a node for the message: the first of a graph that a gradient would flow through.

    Args:
        inner: The graph.
        reached: Names in it, one at least.

    Returns:
        The node.
    """
    calls: list[fx.Node] = [n for n in inner.graph.nodes if n.name in reached]
    return next((n for n in calls if n.op == "call_function"), calls[0])


def _floating(node: fx.Node) -> bool:
    """Tell whether a node gives a floating-point tensor.

    Args:
        node: The node.

    Returns:
        Whether one of its values is one.
    """
    value: Any = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
