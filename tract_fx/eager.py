"""TrAct on models that fx can't trace: located through torch.export, applied to the eager model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal, TypeVar

from torch import fx, nn
from torch.export import ExportedProgram

from tract_fx.errors import (
    TractError,
    UnknownLayerError,
    UnsupportedLayerError,
    UnsupportedModelError,
    did_you_mean,
)
from tract_fx.example_inputs import own_example_inputs
from tract_fx.modules import copy_tree, is_standard, still_reaches, to_tract, tract_lambda, why_not
from tract_fx.passes.choose import (
    Choice,
    LayerChoice,
    choose,
    read_choice,
    warn_of_frozen,
    warn_of_passed,
)
from tract_fx.passes.fx_graph import locate, refuse_wrapped, tract_pass, weight_parameters
from tract_fx.passes.records import InputLayer
from tract_fx.preconditioner import DEFAULT_LAMBDA, GramScope, GroupChoice, group_name
from tract_fx.program import TrainedTensors, arguments, captured, held_at

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NAME_IT = "name the layer: tract_module(model, layers=['path.of.the.layer'])"
# Where the classes are whose forward method only says that there is none.
_WITHOUT_FORWARD = (
    "torch.nn.modules.module",
    "lightning.pytorch.core.module",
    "pytorch_lightning.core.module",
)
_USE_A_GRAPH = (
    "Use tract_pass on torch.export.export(model, inputs), where each call is a node of its own"
)


def tract_module(
    model: ModuleT,
    example_inputs: Any = None,
    *,
    lambda_: float = DEFAULT_LAMBDA,
    layers: LayerChoice = None,
    gram: Literal["local", "global"] = "local",
    process_group: GroupChoice = None,
) -> ModuleT:
    """Make a model's input layer train with TrAct's gradient, without tracing the model for use.

    The layer is located in the graph that `torch.export` makes; what comes back is the eager model
    itself with that layer in a TrAct class. See `tract_pass` for what changes in training.

    Args:
        model: An eager model. Not changed.
        example_inputs: A batch as the model takes it: a tuple of positional arguments, a mapping of
            keyword arguments, or one tensor. Where `layers` names the layers it may be left out;
            given, it is used to make sure that the model calls them. A Hugging Face vision model's
            is made by its config, and a LightningModule's may be its `example_input_array`.
        lambda_: λ > 0. The paper uses 0.05, 0.1 and 0.2.
        layers: Paths of the modules to treat, in all their calls; or a mapping of paths to λ.
        gram: Whose rows the Gram is of, `"local"` or `"global"`, as for `tract_pass`.
        process_group: For `"global"`, as for `tract_pass`.

    Returns:
        A new module tree of the same classes that shares parameters and buffers with `model`.

    Raises:
        UnsupportedModelError: `model` is no eager module, or `example_inputs` is missing.
        UntraceableModelError: `torch.export` fails on the model.
        InvalidLambdaError: A λ is not a finite number above zero.
        InvalidGramError: `gram` and `process_group` do not say whose rows the Gram is of.
        NoInputLayerError: No layer consumes the input.
        AmbiguousInputLayerError: Several do.
        UnsupportedLayerError: What consumes the input can't be treated exactly, or not in an eager
            model.
        UnknownLayerError: A name in `layers` names no module.
    """
    choice, group = read_choice(lambda_, layers), group_name(gram, process_group)
    if isinstance(model, fx.GraphModule):
        return tract_pass(  # type: ignore[return-value]
            model, lambda_=lambda_, layers=choice.by_name, gram=gram, process_group=process_group
        )
    _check_model(model)
    by_name = _by_name(model, example_inputs, choice)
    result = copy_tree(model)
    given = _treat(result, by_name, group)
    located = layers is None and all(map(is_standard, given))
    _check_calls(model, result, by_name, example_inputs, trusted=located)
    return result


def put_on(
    model: nn.Module,
    example_inputs: Any,
    lambda_: float,
    layers: LayerChoice,
    gram: Literal["local", "global"],
) -> dict[str, float]:
    """Do what `tract_module` does to the model itself, and give λ by the layers' paths."""
    _check_model(model)
    by_name = _by_name(model, example_inputs, read_choice(lambda_, layers))
    _treat(model, by_name, group_name(gram, None))
    return by_name


def _by_name(model: nn.Module, example_inputs: Any, choice: Choice) -> dict[str, float]:
    """The paths of the modules to treat, with λ: the named ones, those with TrAct, the located."""
    if choice.by_name is not None:
        return dict(choice.by_name)
    present = [name for name, m in model.named_modules() if tract_lambda(m) is not None]
    if present:
        return dict.fromkeys(present, choice.lambda_)
    return _locate(model, example_inputs, choice)


def _treat(model: nn.Module, by_name: Mapping[str, float], group: str | None) -> list[nn.Module]:
    """Put TrAct on modules; on none where one can't have it."""
    given: dict[nn.Module, float] = {}
    for name, value in by_name.items():
        module = _treatable(model, name)
        if given.setdefault(module, value) != value:
            raise UnsupportedLayerError(
                f"layers gives {name!r} λ = {value}, and λ = {given[module]} by another name",
                "both names are of one module, which has one λ",
                "Give it one λ",
            )
    for name, value in by_name.items():
        scope = None if group is None else str(GramScope(group, name))
        to_tract(model.get_submodule(name), value, scope)
    warn_of_frozen(name for name in by_name if _is_frozen(model.get_submodule(name)))
    return list(given)


def _check_model(model: object) -> None:
    """Refuse what is no eager module, or one that is wrapped already."""
    if isinstance(model, nn.Module):
        refuse_wrapped(model)
        return
    exported = isinstance(model, ExportedProgram)
    raise UnsupportedModelError(
        f"a model of class {type(model).__name__}",
        "tract_module treats eager modules",
        "Give it to tract_pass, which takes graphs" if exported else "Give an nn.Module",
    )


def _locate(model: nn.Module, example_inputs: Any, choice: Choice) -> dict[str, float]:
    """Find the module that consumes the input; its path with λ."""
    graph = _export(model, example_inputs)
    located = locate(graph)
    records = [record for record, _ in located.eligible]
    chosen = choose(located.findings, records, choice)
    warn_of_passed(located.passed, [r for r in records if r.node in chosen])
    treated: dict[nn.Module, str] = {}
    for record in records:
        if record.node in chosen:
            if record.module is None:
                raise _no_module(model, graph, record)
            treated[model.get_submodule(record.module)] = record.module
    for record in records:
        if record.node in chosen or record.module is None:
            continue
        path = treated.get(model.get_submodule(record.module))
        if path is not None:
            raise UnsupportedLayerError(
                f"{path} is called on the input and again on features (node {record.node!r})",
                "in an eager model TrAct would apply to both calls",
                f"{_USE_A_GRAPH}; or take both with layers=[{path!r}]",
            )
    return dict.fromkeys(treated.values(), choice.lambda_)


def _no_module(model: nn.Module, graph: fx.GraphModule, record: InputLayer) -> TractError:
    """Say why a call has no module that could be treated, and what to do."""
    registered = dict(model.named_parameters(remove_duplicate=False))
    others = [attrgetter(name)(graph) for name in record.weight if name not in registered]
    if not others:
        return UnsupportedLayerError(
            str(record),
            "it is a function call, and an eager model has no module to treat in its place",
            _USE_A_GRAPH,
        )
    places = [held_at(model, tensor) or "a tensor that it holds elsewhere" for tensor in others]
    return UnsupportedLayerError(
        f"{record.op} (node {record.node!r}) by {' and '.join(places)}",
        "that is trained, for it requires a gradient, and the model has not registered it as a "
        "parameter, so that parameters(), exports and, but for a buffer, state_dict() pass it over",
        "Put the layer into an nn.ModuleList or nn.ModuleDict, or the tensor into an nn.Parameter",
    )


def _is_frozen(module: nn.Module) -> bool:
    return not any(weight_parameters(module).values())


def _export(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    given = example_inputs is not None
    example_inputs = example_inputs if given else own_example_inputs(model)
    if example_inputs is None:
        raise UnsupportedModelError(
            f"a model of class {type(model).__name__}, with example_inputs=None",
            "it is run on a batch to find the layer that consumes the input",
            "Give a tuple of positional arguments, a mapping of keyword arguments or a tensor; or "
            "name the layer with layers=[…]",
        )
    args, kwargs = arguments(example_inputs)
    batch = "Make sure that the model runs on the batch" if given else "Give example_inputs"
    with _callable(model), TrainedTensors() as trained:
        graph = captured(model, args, kwargs, f"{batch}, or {_NAME_IT}")
    trained.put_back(graph)
    return graph


@contextmanager
def _callable(model: nn.Module) -> Iterator[None]:
    """Let a LightningModule without a forward method call the net inside it, for a time."""
    owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    if "forward" in vars(model) or owner.__module__ not in _WITHOUT_FORWARD:
        yield
        return
    nets = {n: net for n, net in model.named_children() if any(True for _ in net.parameters())}
    if len(nets) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}, which has no forward method, and inside "
            f"{', '.join(nets) or 'no net'}",
            "its layers are located in a graph of what it does with the input",
            "Apply tract_module to the net inside it, or give it a forward method",
        )
    (net,) = nets.values()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return net(*args, **kwargs)

    vars(model)["forward"] = functools.update_wrapper(forward, net.forward)
    try:
        yield
    finally:
        del vars(model)["forward"]


def _check_calls(
    model: nn.Module,
    result: nn.Module,
    names: Iterable[str],
    example_inputs: Any,
    trusted: bool,
) -> None:
    """Make sure that the treated copies are what the new model calls.

    It may not be: where the model reaches a layer through a closure it goes on calling the
    original, and a layer that is named may be one whose forward never runs.

    Raises:
        UnsupportedLayerError: It would not call one of them.
    """
    escaped = [
        name
        for name in names
        if still_reaches(result, model.get_submodule(name), result.get_submodule(name))
    ]
    if trusted and not escaped:
        return
    if example_inputs is None:
        called = set(names) - set(escaped)
    else:
        located = locate(_export(result, example_inputs))
        called = {r.module or "" for r, _ in located.eligible if r.lambda_ is not None}
    for name in names:
        if name not in called:
            raise UnsupportedLayerError(
                f"{name} ({type(model.get_submodule(name)).__name__})",
                "the new model would not call its copy with TrAct: the model reaches the layer "
                "through a closure or another object, or takes its weight without calling it",
                _USE_A_GRAPH
                if example_inputs is not None
                else f"Give example_inputs, with which that can be made sure. {_USE_A_GRAPH}",
            )


def _treatable(model: nn.Module, name: str) -> nn.Module:
    """Get the module of that name, or the error that says why it can't be treated."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        names = [n for n, m in model.named_modules() if why_not(m) is None]
        listed = ", ".join(map(repr, names)) or "none"
        raise UnknownLayerError(
            f"the layer is named {name!r}",
            "the model has no module of that name, and an eager model has nothing else to treat",
            f"{did_you_mean(name, names)}Modules that can be treated: {listed}. A layer that is a "
            "function call can be treated in a graph: "
            "tract_pass(torch.export.export(model, inputs))",
        ) from None
    why = why_not(module)
    if why is not None:
        found = f"{name} ({type(module).__name__})"
        raise UnsupportedLayerError(found, why.reason, why.remedy)
    return module
