"""Record a training step as one fx graph: forward, loss and backward, by PyTorch's own autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.modules import named_tensors
from tract_fx.passes.onnx_graph.step_names import GRADIENT, LOSS_SCALE, NEW
from tract_fx.preconditioner import to_training_graph
from tract_fx.program import held_at
from tract_fx.step import exporter
from tract_fx.step.compositions import COMPOSITIONS, SizesUnread
from tract_fx.step.dialects import STANDARD, Dialect
from tract_fx.step.names import batch_names, free_name, output_names
from tract_fx.step.operators import refuse_untested, untested
from tract_fx.step.output_gradient import ancestors, attach_output_gradients

aten = torch.ops.aten

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Update:
    """What an optimizer makes of gradients.

    Attributes:
        inputs: Examples of what it takes beside parameters and gradients, by name.
        compute: Of parameters and gradients by the parameters' names, and of the inputs; gives new
            parameters, and new values of inputs that are states, by their names.
    """

    inputs: dict[str, Tensor]
    compute: Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class StepTrace:
    """A step as a graph of aten operators, free of side effects.

    Attributes:
        graph: Takes the tensors that `inputs` names, in this order, and gives those of `outputs`.
        inputs: The state_dict's keys, of buffers that are not in it too, then the batch's names.
        outputs: Names of the loss, the gradients, the new buffers and what an update makes new; or,
            of a step without gradients, of the loss and of what the model returns beside it.
        loss: The loss's name.
        gradients: Names of the gradients by the parameters that have one.
        buffers: Names of the new values by the buffers that the step changes.
        update_inputs: Names of the update's inputs, which are the last of `inputs`.
        updates: Names of new values by the parameter, or the update's input, that they are of.
        growth: What the step adds to those buffers that are counters, which nothing else reads.
        batch: Names of the model's inputs, then of the targets.
        lambdas: λ by the name of each call with TrAct.
        idle: Names of those calls whose weight gets no gradient.
        left_out: What stands in the way of outputs that can't be written, by name.
        smallest_batch: 2 where a BatchNorm gets one number per channel of a batch of one.
        dialect: What it is to be written in.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    loss: str
    gradients: dict[str, str]
    buffers: dict[str, str]
    update_inputs: tuple[str, ...]
    updates: dict[str, str]
    growth: dict[str, int]
    batch: tuple[str, ...]
    lambdas: dict[str, float]
    idle: tuple[str, ...]
    left_out: dict[str, str]
    smallest_batch: int
    dialect: Dialect


def trace_step(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Loss,
    targets: Sequence[Tensor],
    *,
    gradients: bool = True,
    open_axes: Sequence[Sequence[int]] | None = None,
    names: Sequence[str] = (),
    update: Callable[[dict[str, Tensor]], Update] | None = None,
    scaled: bool = False,
    dialect: Dialect = STANDARD,
) -> StepTrace:
    """Record a step."""
    state = _State.of(model)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    batch = [*(leaves[i] for i in places), *targets]
    opened = exporter.open_sizes(batch, True) if open_axes is None else [*open_axes]
    opened += exporter.open_sizes([*batch], any(map(len, opened)))[len(opened) :]
    arguments = exporter.fake_arguments(state.tensors, batch, opened)
    names = tuple(names) or batch_names(model, args, kwargs, len(targets), {*state.tensors})
    found: list[_Results] = []

    def step(
        tensors: Sequence[Tensor], given: Sequence[Tensor], scale: Sequence[Tensor]
    ) -> list[Tensor]:
        own, wanted = state.copies(tensors)
        call = list(leaves)
        for place, tensor in zip(places, given, strict=False):
            call[place] = tensor
        args, kwargs = pytree.tree_unflatten(call, spec)
        with torch.set_grad_enabled(gradients):
            with SizesUnread():
                output = functional_call(model, own, args, kwargs)
                value = loss(output, *given[len(places) :])
            _refuse_many_numbers(value, gradients)
            results = _Results.of(
                state, own, output, value, {*names}, wanted if gradients else None, scale
            )
        found.append(results)
        return [result.detach() for result in results.all]

    # First whole derivatives, among whose arguments are outputs' gradients; then formulas of them.
    mode: Any = arguments[1][0].fake_mode  # type: ignore[attr-defined]
    scales = [mode.from_tensor(torch.tensor(1.0), static_shapes=True)] if scaled else []
    graph = _record(step, (*arguments, scales), {})
    _write_conditions(graph)
    smallest = _smallest_batch(graph)
    placeholders = dict(zip(state.tensors, graph.graph.find_nodes(op="placeholder"), strict=False))
    lambdas, idle = attach_output_gradients(graph, found[0].gradients_in(graph), placeholders)
    table = exporter.decompositions()
    table = {key: formula for key, formula in table.items() if key not in dialect.translations}
    table |= dialect.formulas
    functional = functionalize(graph, remove="mutations")
    trained = {name: state.tensors[name] for name in found[0].gradients}
    made = Update({}, lambda *_: {}) if update is None else update(trained)
    extra = [mode.from_tensor(tensor, static_shapes=True) for tensor in made.inputs.values()]
    whole, updates = _updating(functional, made, state, found[0])
    graph = _record(whole, (*arguments, extra), table)
    _refuse_held(graph, model)
    if any(map(len, opened)):
        exporter.refuse_bounded_batch(arguments[1])
    inputs = (*state.tensors, *names, *made.inputs)
    results, left_out = _kept(graph, inputs, found[0], updates, dialect)
    refuse_untested(graph, dialect.translations)
    return StepTrace(
        graph,
        inputs,
        (
            *(results.loss, *results.outputs, *results.gradients.values()),
            *(*results.buffers.values(), *updates.values()),
        ),
        results.loss,
        results.gradients,
        results.buffers,
        tuple(made.inputs),
        updates,
        _growth(graph, inputs, results),
        names,
        lambdas,
        idle,
        left_out,
        smallest,
        dialect,
    )


def _refuse_many_numbers(loss: object, gradients: bool) -> None:
    if not isinstance(loss, Tensor):
        found = f"a loss of class {type(loss).__name__}"
    elif loss.numel() != 1:
        found = f"a loss of shape {tuple(loss.shape)}"
    elif gradients and not loss.requires_grad:
        found = "a loss that depends on nothing that is trained"
    else:
        return
    raise UnsupportedTrainingError(
        found,
        "a step minimises one number that depends on what is trained",
        "Reduce the loss, by its mean for one, and leave something to train",
    )


@dataclass(frozen=True)
class _Results:
    """What a run of a step gives, in order, and the names of it.

    Attributes:
        all: The tensors.
        loss: The loss's name.
        outputs: Names of what the model returns beside the loss.
        gradients: Names of gradients by parameter.
        buffers: Names of new values by buffer, of those that did not change too.
    """

    all: list[Tensor]
    loss: str
    outputs: list[str]
    gradients: dict[str, str]
    buffers: dict[str, str]

    @classmethod
    def of(
        cls,
        state: _State,
        own: Mapping[str, Tensor],
        output: Any,
        loss: Tensor,
        batch: set[str],
        wanted: Sequence[Tensor] | None,
        scale: Sequence[Tensor],
    ) -> _Results:
        taken: set[str | None] = {*state.tensors, *batch}
        if wanted is None:
            named = output_names(output, {*state.tensors, *batch})
            others = {name: value for name, value in named.items() if value is not loss}
            name = free_name("loss", {*taken, *others})
            return cls([loss, *others.values()], name, list(others), {}, {})
        name = free_name("loss", taken)
        seed = [one.to(loss.dtype).expand(loss.shape) for one in scale] or None
        every = torch.autograd.grad([loss], wanted, seed, allow_unused=True)
        found = {n: g for n, g in zip(state.trained, every, strict=True) if g is not None}
        found = {n: g / scale[0] for n, g in found.items()} if scale else found
        gradients = {n: free_name(f"{n}{GRADIENT}", taken) for n in found}
        buffers = {n: free_name(f"{n}{NEW}", taken) for n in state.buffers}
        results = [loss, *found.values(), *(own[n] for n in state.buffers)]
        return cls(results, name, [], gradients, buffers)

    def gradients_in(self, graph: fx.GraphModule) -> dict[str, fx.Node]:
        """The gradients among a graph's results, by parameter."""
        results: Any = graph.graph.output_node().args[0]
        return dict(zip(self.gradients, results[1:], strict=False))


def _updating(
    step: Callable[..., Any], update: Update, state: _State, results: _Results
) -> tuple[Callable[..., list[Tensor]], dict[str, str]]:
    """The step, then the update; and names of what that makes new, once it was run."""
    names: dict[str, str] = {}

    def whole(
        tensors: Sequence[Tensor], given: Sequence[Tensor], extra: Sequence[Tensor]
    ) -> list[Tensor]:
        named = dict(zip(update.inputs, extra, strict=True))
        found = step(tensors, given, [named[LOSS_SCALE]] if LOSS_SCALE in named else [])
        gradients = dict(zip(results.gradients, found[1 + len(results.outputs) :], strict=False))
        own = dict(zip(state.tensors, tensors, strict=True))
        new = update.compute({name: own[name] for name in gradients}, gradients, named)
        names.update({name: f"{name}{NEW}" for name in new})
        return [*found, *new.values()]

    return whole, names


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
        trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        return cls(tensors, trained, tuple(dict(model.named_buffers())))

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
_SAME = (
    *(aten.detach.default, aten.detach_.default, aten.alias.default),
    *(aten.lift_fresh_copy.default, aten.lift_fresh.default),
)


def _record(
    step: Callable[..., Any], arguments: Any, table: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """Record the operators that a function runs, some of them by their formulas."""
    token = to_training_graph.set(True)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            _one_kernel(),
            torch_private.autograd_kernels(COMPOSITIONS),
            torch_private.without_checkpoints(),
        ):
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
        argument: Any = node.args[0] if node.args else None
        twice = node.target is aten.t.default and argument.target is aten.t.default
        if node.target in _SAME or twice:
            node.replace_all_uses_with(argument.args[0] if twice else argument)
            traced.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a formula may lay its argument out otherwise
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _write_conditions(graph: fx.GraphModule) -> None:
    """Make the loss NaN where a condition is not met at which PyTorch would raise."""
    results: Any = graph.graph.output_node().args[0]
    for node in list(graph.graph.nodes):
        if node.target is aten._assert_async.msg:
            with graph.graph.inserting_before(graph.graph.output_node()):
                results = [
                    graph.graph.call_function(
                        aten.where.ScalarOther, (node.args[0], results[0], math.nan)
                    ),
                    *results[1:],
                ]
            graph.graph.erase_node(node)
    graph.graph.output_node().args = (results,)
    graph.recompile()


def _refuse_held(graph: fx.GraphModule, model: nn.Module) -> None:
    """Refuse a parameter that the trace has taken for a constant."""
    registered = {
        torch_private.storage_of(tensor): name for name, tensor in named_tensors(model).items()
    }
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, str(node.target))
        if any(user.target is aten.copy_.default for user in node.users):
            where = held_at(model, value) or f"a tensor of shape {tuple(value.shape)}"
            raise ExportError(
                f"{where}, which the model or the loss changes in place",
                "it is a state that no state_dict of the model holds, so that the graph has none",
                "Register it as a buffer of the model",
            )
        name = registered.get(torch_private.storage_of(value)) if value.numel() else None
        if value.requires_grad or name is not None:
            where = held_at(model, value) or f"a tensor of shape {tuple(value.shape)}"
            raise UnsupportedTrainingError(
                f"{name or where}, which the model or the loss reads as an object of its own",
                "the graph would go on with its value of now while training goes on",
                "Register it in the model, and let that compute and return the loss (loss=None)",
            )


_BATCH_NORMS = ("aten.native_batch_norm.", "aten._native_batch_norm_legit.")


def _smallest_batch(graph: fx.GraphModule) -> int:
    """What a trained BatchNorm has a variance from."""
    for node in graph.graph.nodes:
        if str(node.target).startswith(_BATCH_NORMS):
            x, *_ = node.args
            trains = node.args[5] is True or len(node.args) < 8
            if trains and all(size == 1 for size in x.meta["val"].shape[2:]):
                return 2
    return 1


def _kept(
    graph: fx.GraphModule,
    inputs: Sequence[str],
    results: _Results,
    updates: Mapping[str, str],
    dialect: Dialect,
) -> tuple[_Results, dict[str, str]]:
    """Leave out buffers that come out as they went in, and outputs that can't be written.

    Returns the names that are left, and why outputs are left out.
    """
    nodes: Any = graph.graph.output_node().args[0]
    placeholders = dict(zip(inputs, graph.graph.find_nodes(op="placeholder"), strict=True))
    names = ["", *results.outputs, *results.gradients, *results.buffers, *updates]
    buffers, outputs, kept = {}, [], []
    left_out: dict[str, str] = {}
    for name, node in zip(names, nodes, strict=True):
        if name in results.buffers:
            if _uncopied(node) is placeholders[name]:
                continue
            buffers[name] = results.buffers[name]
        elif name in results.outputs:
            found = untested(ancestors(node), dialect.translations)
            if found is not None:
                left_out[name] = found
                continue
            outputs.append(name)
        kept.append(node)
    graph.graph.output_node().args = (kept,)
    graph.graph.set_codegen(fx.graph.CodeGen())  # not that of nested arguments
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return replace(results, outputs=outputs, buffers=buffers), left_out


def _growth(graph: fx.GraphModule, inputs: Sequence[str], results: _Results) -> dict[str, int]:
    """What is added to integer buffers that are added to, and not read otherwise."""
    nodes: Any = graph.graph.output_node().args[0]
    placeholders = dict(zip(inputs, graph.graph.find_nodes(op="placeholder"), strict=True))
    first = 1 + len(results.outputs) + len(results.gradients)
    changed = dict(zip(results.buffers, nodes[first:], strict=False))
    found = {}
    for name, node in changed.items():
        total, start = 0, _read_once(node)
        while start is not None and start.target is aten.add.Tensor and type(start.args[1]) is int:
            total, start = total + start.args[1], _read_once(start.args[0])
        if total and start is placeholders[name]:
            found[name] = total
    return found


def _read_once(node: fx.Node) -> Any:
    """What a node is a copy of, None where something else reads it too."""
    while len(node.users) == 1 and node.target is aten.clone.default:
        (node,) = node.args  # type: ignore[assignment]
    return node if len(node.users) == 1 else None


def _uncopied(node: fx.Node) -> Any:
    while node.target is aten.clone.default:
        (node,) = node.args  # type: ignore[assignment]
    return node
