"""The pass as users call it: find, apply, remove."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

from torch import fx, nn
from torch.export import ExportedProgram

from tract_fx.errors import UnsupportedLayerError, UnsupportedModelError
from tract_fx.modules import copy_tree, still_reaches, to_plain, tract_lambda, tract_scope
from tract_fx.passes.choose import (
    LayerChoice,
    choose,
    named_calls,
    read_choice,
    warn_of_frozen,
    warn_of_passed,
)
from tract_fx.passes.fx_graph.find import Located, locate
from tract_fx.passes.fx_graph.models import as_graph_module, refuse_wrapped
from tract_fx.passes.fx_graph.owners import module_paths
from tract_fx.passes.fx_graph.regions import graphs
from tract_fx.passes.fx_graph.rewrite import remove_from_graph, rewrite_graph
from tract_fx.passes.records import Findings
from tract_fx.preconditioner import (
    DEFAULT_LAMBDA,
    GramScope,
    GroupChoice,
    group_name,
    group_of,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def find_input_layers(gm: fx.GraphModule | ExportedProgram) -> Findings:
    """Say which layers the pass would take, and for everything else on the input why not.

    Args:
        gm: A GraphModule from `torch.fx.symbolic_trace` or from `torch.export(…).module()`, or an
            ExportedProgram. Not changed.

    Returns:
        The calls that consume the input, and refusals.

    Raises:
        UnsupportedModelError: `gm` is something else.
    """
    return locate(as_graph_module(gm)).findings


def tract_pass(
    gm: fx.GraphModule | ExportedProgram,
    *,
    lambda_: float = DEFAULT_LAMBDA,
    layers: LayerChoice = None,
    gram: Literal["local", "global"] = "local",
    process_group: GroupChoice = None,
) -> fx.GraphModule:
    """Rewrite a model so that its input layer trains with TrAct's gradient.

    The weight gradient of each call of that layer becomes gW (XᵀX/R + λI)⁻¹ (arXiv 2410.23970,
    section 3), X being the rows that this call multiplies its weight with. Forward pass, all other
    gradients, parameters and state_dict stay as they are.

    Applied again it changes λ, or adds the layers that are named; `remove_tract` takes it out.

    Args:
        gm: A GraphModule from `torch.fx.symbolic_trace` or from `torch.export(…).module()`, or an
            ExportedProgram. Not changed.
        lambda_: λ > 0. The paper uses 0.05, 0.1 and 0.2.
        layers: Which layers to treat, where the choice is yours: module paths, weights' names or
            nodes' names; or a mapping of such names to λ. By default the one layer that consumes
            the model's input.
        gram: `"local"`: X holds the rows of this process's call. `"global"`: it holds those of all
            processes of a group, which add up XᵀX and R in the backward pass that all have to run.
        process_group: For `"global"`: a group or a one-dimensional DeviceMesh that serves nothing
            else (not DDP's). By default one of all processes, which the first backward pass makes.

    Returns:
        A new GraphModule that shares parameters and buffers with `gm`.

    Raises:
        UnsupportedModelError: `gm` is something else.
        InvalidLambdaError: A λ is not a finite number above zero.
        InvalidGramError: `gram` and `process_group` do not say whose rows the Gram is of.
        NoInputLayerError: No layer consumes the input.
        AmbiguousInputLayerError: Several do.
        UnsupportedLayerError: What consumes the input can't be treated exactly.
        UnknownLayerError: A name in `layers` matches nothing that can be treated.
    """
    choice, group = read_choice(lambda_, layers), group_name(gram, process_group)
    gm = as_graph_module(gm)
    located = locate(gm)
    records = [record for record, _ in located.eligible]
    nodes = _naming_nodes(gm, located)
    chosen, renewed = choose(located.findings, records, choice, nodes), {r.node for r in records}
    if choice.by_name is not None:
        renewed = {*named_calls(choice.by_name, located.findings, records, nodes)}
    groups = {r.node: (group if r.node in renewed else r.group, r.name) for r in records}
    scopes = {n: str(GramScope(g, layer)) for n, (g, layer) in groups.items() if g is not None}
    result = rewrite_graph(gm, chosen, scopes)
    taken = [r for r in records if r.node in chosen]
    warn_of_frozen(r.name for r in taken if r.frozen)
    if choice.by_name is None and not any(r.lambda_ is not None for r in taken):
        warn_of_passed(located.passed, taken)
    return result


def _naming_nodes(gm: fx.GraphModule, located: Located) -> set[str]:
    """Give the nodes whose names mean them, and no part of the model that they do not lie in.

    Exporting calls nodes by their functions (`linear`), and so do people the parts of a model.
    """
    parts = {name for _, graph in graphs(gm) for name, _ in graph.named_modules()}
    parts |= {
        path for _, graph in graphs(gm) for n in graph.graph.nodes for path in module_paths(n)
    }
    return {
        record.node
        for record, call in located.eligible
        if record.node not in parts or record.node in module_paths(call.node)
    }


def is_tract(model: nn.Module | ExportedProgram) -> dict[str, float]:
    """Tell which layers train with TrAct's gradient.

    A checkpoint holds parameters alone: a model that is built anew and loaded from one is plain
    until the pass is applied again. `assert is_tract(model)` in a training script makes sure.

    Args:
        model: Any module, also one inside DDP or torch.compile; or an exported program.

    Returns:
        λ by the layer's name, empty for a plain model.

    Raises:
        UnsupportedModelError: `model` is something else.
    """
    return {name: lambda_ for name, lambda_, _ in treated_layers(model)}


def layers_over_processes(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """Name the layers whose Gram is of the rows of several processes."""
    names = (name for name, _, group in treated_layers(model) if group is not None)
    return tuple(dict.fromkeys(names))


def treated_layers(
    model: nn.Module | ExportedProgram,
) -> Iterator[tuple[str, float, str | None]]:
    """Give name, λ and process group of each layer with TrAct; once more where a graph has it."""
    if isinstance(model, ExportedProgram):
        model = as_graph_module(model)
    _check_module(model)
    parts: set[nn.Module] = set()
    for path, module in model.named_modules():
        lambda_ = tract_lambda(module)
        if lambda_ is not None:
            yield path, lambda_, group_of(tract_scope(module))
        elif isinstance(module, fx.GraphModule) and module not in parts:
            parts |= {part for _, part in graphs(module)}
            prefix = f"{path}." if path else ""
            for record, _ in locate(module).eligible:
                if record.lambda_ is not None:
                    yield prefix + record.name, record.lambda_, record.group


def _refuse_kept_forwards(model: nn.Module, copied: nn.Module) -> None:
    """Refuse to take TrAct out where the copy would run the layer with TrAct all the same."""
    for name, layer in model.named_modules():
        if tract_lambda(layer) is not None and "forward" in vars(layer):
            if still_reaches(copied.get_submodule(name), layer, layer):
                raise UnsupportedLayerError(
                    f"the forward method of {name or 'the model'}, which was set on the instance",
                    "the function that it is now holds on to the layer with TrAct and calls it",
                    "Take that function away first (del layer.forward), or build the model anew",
                )


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a {type(model).__name__}", "TrAct lives in modules", "Give an nn.Module"
        )


def remove_tract(model: ModuleT) -> ModuleT:
    """Give the plain model back.

    Args:
        model: What `tract_pass` or `tract_module` returned, or any module that holds it. Not
            changed.

    Returns:
        A new module tree without TrAct that shares parameters and buffers with `model`.

    Raises:
        UnsupportedModelError: `model` is no module, or one that is compiled or wrapped.
        UnsupportedLayerError: A function that was put in the place of a layer's forward method goes
            on calling that.
    """
    _check_module(model)
    refuse_wrapped(model)
    result = copy_tree(model)
    _refuse_kept_forwards(model, result)
    for module in result.modules():
        if isinstance(module, fx.GraphModule):
            remove_from_graph(module)
    for module in result.modules():
        to_plain(module)
    return result
