"""Record a training step as one fx graph: forward, loss and backward, by PyTorch's own autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.export.value_names import free_name
from tract_fx.preconditioner import to_training_graph
from tract_fx.step import exporter
from tract_fx.step.dialects import STANDARD, Dialect
from tract_fx.step.operators import refuse_untested
from tract_fx.step.output_gradient import attach_output_gradients

__all__ = ["StepTrace", "trace_step"]

aten = torch.ops.aten

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class StepTrace:
    """A training step as a graph of aten operators, free of side effects.

    Attributes:
        graph: Takes the tensors that `inputs` names, in this order, and gives those of `outputs`.
        inputs: The state_dict's keys, of buffers that are not in it too, then the batch's names.
        outputs: Names of the loss, the model's outputs, the gradients and the new buffers.
        loss: The loss's name.
        gradients: Names of the gradients by the parameters that have one.
        buffers: Names of the new values by the buffers that the step changes.
        batch: Names of the model's inputs, then of the targets.
        structure: Names of the model's outputs, nested as it returns them.
        dialect: What it is to be written in.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    loss: str
    gradients: dict[str, str]
    buffers: dict[str, str]
    batch: tuple[str, ...]
    structure: Any
    dialect: Dialect


def trace_step(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Loss | None,
    targets: Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
    dialect: Dialect = STANDARD,
) -> StepTrace:
    """Record a step.

    Args:
        model: The model, in the mode that it trains in. Not changed.
        args: Positional arguments of a call; a tensor whose first size is the first tensor's is
            taken for a batch.
        kwargs: Keyword arguments of a call.
        loss: Of the model's output and the targets; None where the model returns its loss.
        targets: What the loss takes beside the output.
        dynamic_batch: Whether the batch's size is left open.
        dialect: What it is to be written in.

    Returns:
        The step.

    Raises:
        ExportError: PyTorch can't trace the step, or an operator in it has no tested translation.
        UnsupportedTrainingError: The loss is not one number.
    """  # noqa: DOC502 (raised by what it calls)
    state = _State.of(model)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    batch = [*(leaves[i] for i in places), *targets]
    arguments = exporter.fake_arguments(state.tensors, batch, dynamic_batch)
    found = _Found()

    def step(tensors: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        own, wanted = state.copies(tensors)
        call = list(leaves)
        for place, tensor in zip(places, given, strict=False):
            call[place] = tensor
        args, kwargs = pytree.tree_unflatten(call, spec)
        with torch.enable_grad():
            output = functional_call(model, own, args, kwargs)
            value = output if loss is None else loss(output, *given[len(places) :])
            _refuse_many_numbers(value)
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        found.output, found.has_gradient = output, [g is not None for g in gradients]
        results = [value, *(r for r in pytree.tree_leaves(output) if isinstance(r, Tensor))]
        changed = [own[name] for name in state.buffers]
        return [r.detach() for r in results] + [g for g in gradients if g is not None] + changed

    # First whole derivatives, among whose arguments are outputs' gradients; then formulas of them.
    graph = _record(step, arguments, {})
    attach_output_gradients(graph, _gradients(graph, state, found))
    table = exporter.decompositions()
    table = {key: formula for key, formula in table.items() if key not in dialect.translations}
    table |= dialect.formulas
    graph = _record(functionalize(graph, remove="mutations"), arguments, table)
    if dynamic_batch:
        exporter.refuse_bounded_batch(arguments[1])
    refuse_untested(graph, dialect.translations)
    names = _batch_names(model, args, kwargs, len(targets), {*state.tensors})
    return _named(graph, state, found, names, dialect)


def _refuse_many_numbers(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UnsupportedTrainingError(
            f"a loss of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a loss of class {type(loss).__name__}",
            "a step minimises one number that depends on what is trained",
            "Reduce the loss, by its mean for one, and leave something to train",
        )


@dataclass
class _Found:
    """What a run of the step has shown: the model's output, and which parameters have gradients."""

    output: Any = None
    has_gradient: Sequence[bool] = ()


@dataclass(frozen=True)
class _State:
    """A model's tensors.

    Attributes:
        tensors: Parameters and buffers under their first names.
        trained: Names of those that gradients are taken by.
        buffers: Names of those that a forward pass may change.
    """

    tensors: dict[str, Tensor]
    trained: tuple[str, ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> _State:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        trained = tuple(name for name, p in parameters.items() if p.requires_grad)
        tensors = {name: t.detach() for name, t in {**parameters, **buffers}.items()}
        return cls(tensors, trained, tuple(buffers))

    def copies(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Tensors by name that a forward pass may change, and those to differentiate by."""
        own = dict(zip(self.tensors, tensors, strict=True))
        own |= {name: own[name].clone() for name in self.buffers}
        own |= {name: own[name].detach().requires_grad_() for name in self.trained}
        return own, [own[name] for name in self.trained]


@contextmanager
def _one_kernel() -> Iterator[None]:
    """Let PyTorch not choose convolutions' kernels by the batch's size, and so fix it to some."""
    before: Any = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = before


# Which are their arguments, once gradients are taken.
_SAME = (aten.detach.default, aten.detach_.default, aten.alias.default)


def _record(
    step: Callable[..., Any], arguments: Any, table: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """Record the operators that a function runs, some of them by their formulas."""
    token = to_training_graph.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), _one_kernel():
            traced = make_fx(step, dict(table), "symbolic")(*arguments)
    except (ExportError, UnsupportedTrainingError):
        raise
    except Exception as error:  # whatever a model raises under a tracer
        raise ExportError(
            f"tracing the training step failed ({type(error).__name__}: {error})",
            "without a graph there is nothing to train elsewhere",
            "Make the model traceable: no branches on values, or on the batch's size",
        ) from error
    finally:
        to_training_graph.reset(token)
    for node in list(traced.graph.nodes):
        if node.target in _SAME:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a formula may lay its argument out otherwise
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _batch_names(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    targets: int,
    taken: set[str],
) -> tuple[str, ...]:
    """Name the batch's tensors after the forward method's arguments."""
    known = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional = known + [f"input_{i}" for i in range(len(known), len(args))]
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    places, _ = pytree.tree_flatten_with_path(given)
    names = [_path_name(path) for path, leaf in places if isinstance(leaf, Tensor)]
    names += ["target"] if targets == 1 else [f"target_{i}" for i in range(targets)]
    used: set[str | None] = {*taken}
    return tuple(free_name(name, used) for name in names)


def _path_name(path: Sequence[Any]) -> str:
    """Name a place in nested containers by the way to it."""
    steps = (
        next((getattr(s, a) for a in ("key", "idx", "name") if hasattr(s, a)), s) for s in path
    )
    return "_".join(map(str, steps))


def _output_names(output: Any, taken: set[str | None]) -> tuple[list[str], Any]:
    """Names of the tensors that a model returns, and all of them as it returns them."""
    places, spec = pytree.tree_flatten_with_path(output)
    paths = [_path_name(path) or "output" for path, _ in places]
    names = [free_name(f"output_{n}" if n.isdigit() else n, taken) for n in paths]
    tensors = [n for n, (_, leaf) in zip(names, places, strict=True) if isinstance(leaf, Tensor)]
    return tensors, pytree.tree_unflatten(names, spec)


def _gradients(graph: fx.GraphModule, state: _State, found: _Found) -> dict[str, fx.Node]:
    """The parameters' gradients among a graph's results."""
    results: Any = graph.graph.output_node().args[0]
    names = [n for n, has in zip(state.trained, found.has_gradient, strict=True) if has]
    end = len(results) - len(state.buffers)
    return dict(zip(names, results[end - len(names) : end], strict=True))


def _named(
    graph: fx.GraphModule,
    state: _State,
    found: _Found,
    batch: tuple[str, ...],
    dialect: Dialect,
) -> StepTrace:
    """Name what goes in and comes out, without the buffers that come out as they went in."""
    results: Any = graph.graph.output_node().args[0]
    inputs = (*state.tensors, *batch)
    placeholders = dict(zip(inputs, graph.graph.find_nodes(op="placeholder"), strict=True))
    taken: set[str | None] = {*inputs}
    loss = free_name("loss", taken)
    outputs, structure = _output_names(found.output, taken)
    gradients = {n: free_name(f"{n}_grad", taken) for n in _gradients(graph, state, found)}
    end = len(results) - len(state.buffers)
    changed = {
        name: node
        for name, node in zip(state.buffers, results[end:], strict=True)
        if _uncopied(node) is not placeholders[name]
    }
    buffers = {name: free_name(f"{name}_new", taken) for name in changed}
    graph.graph.output_node().args = ([*results[:end], *changed.values()],)
    graph.graph.set_codegen(fx.graph.CodeGen())  # not that of nested arguments
    graph.graph.eliminate_dead_code()
    graph.recompile()
    names = (loss, *outputs, *gradients.values(), *buffers.values())
    return StepTrace(graph, inputs, names, loss, gradients, buffers, batch, structure, dialect)


def _uncopied(node: fx.Node) -> Any:
    while node.target is aten.clone.default:
        (node,) = node.args  # type: ignore[assignment]
    return node
