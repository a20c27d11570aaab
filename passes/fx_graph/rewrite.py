"""Rewrite: put TrAct's op into a copy of an fx graph, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn
from torch.fx import Node

from tract_fx.errors import UnsupportedLayerError
from tract_fx.modules import TractLayer, copy_tree, to_tract
from tract_fx.passes.fx_graph.calls import (
    PROVENANCE,
    is_precondition_grad,
    match_function,
)
from tract_fx.passes.fx_graph.regions import graphs
from tract_fx.preconditioner import precondition_grad


def rewrite_graph(
    gm: fx.GraphModule, lambdas: Mapping[str, float], scopes: Mapping[str, str]
) -> fx.GraphModule:
    """Put TrAct on calls of layers.

    A `call_module` stays one, on a copy of its module in a TrAct class; other calls of the same
    module are marked `tract=False`. Before a `call_function` goes a node of its own on the weight.
    """
    settings = {name: (value, scopes.get(name)) for name, value in lambdas.items()}
    result = copy_tree(gm)
    calls_of: dict[nn.Module, list[Node]] = {}
    for prefix, part in list(graphs(result)):
        for node in list(part.graph.nodes):
            if node.op == "call_module":
                calls_of.setdefault(part.get_submodule(str(node.target)), []).append(node)
            elif prefix + node.name in settings:
                _rewrite_function_call(part.graph, node, *settings[prefix + node.name])
    for module, calls in calls_of.items():
        _rewrite_module_calls(module, calls, settings)
    for _, part in list(graphs(result)):
        part.recompile()
    return result


def _rewrite_module_calls(
    module: nn.Module, calls: list[Node], settings: Mapping[str, tuple[float, str | None]]
) -> None:
    """Make a called module a TrAct layer, and mark those of its calls that stay plain."""
    own = {node.name: settings[node.name] for node in calls if node.name in settings}
    if not own:
        return
    values = {name: value for name, (value, _) in own.items()}
    if len({scope for _, scope in own.values()}) > 1:
        raise UnsupportedLayerError(
            f"one call of {calls[0].target} is given gram='local' and another gram='global'",
            "they call one module, which has one Gram's scope",
            "Name the layer, by which all of its calls are meant",
        )
    if len(set(values.values())) > 1:
        raise UnsupportedLayerError(
            f"calls of {calls[0].target} are given different λs: {values}",
            "they call one module, which has one λ",
            "Give all of them one λ, or apply the pass to torch.export.export(model, inputs), "
            "where each call has its own",
        )
    to_tract(module, *next(iter(own.values())))
    for node in calls:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "tract"}
        if node.name in values:
            _mark(node, values[node.name])
        else:
            node.kwargs = {**node.kwargs, "tract": False}


def _rewrite_function_call(graph: fx.Graph, node: Node, lambda_: float, scope: str | None) -> None:
    """Put TrAct's op on the weight of a call; in the place of one that is there already."""
    call = match_function(node)
    assert call is not None and call.weight is not None
    op = call.precondition
    if op is None or len(op.users) > 1:
        with graph.inserting_before(node):
            op = graph.create_node("call_function", precondition_grad, name=f"tract_{node.name}")
    node.prepend(op)  # the call's input may have been made since
    op.target, op.args = precondition_grad, (call.weight, call.input)
    op.kwargs = {"lambda_": lambda_, **call.geometry}
    if scope is not None:
        op.update_kwarg("scope", scope)
    op.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    for key in ("val", "example_value"):
        if key in call.weight.meta:
            op.meta[key] = call.weight.meta[key]
    _mark(op, lambda_)
    if "weight" in node.kwargs:
        node.update_kwarg("weight", op)
    else:
        node.update_arg(1, op)


def _mark(node: Node, lambda_: float) -> None:
    """Say on a node that the pass made or changed it."""
    custom = dict(node.meta.get("custom") or {})
    custom[PROVENANCE] = {"lambda": lambda_}
    node.meta["custom"] = custom


def remove_from_graph(gm: fx.GraphModule) -> None:
    """Take TrAct's nodes, arguments and marks out of a graph, in place."""
    for node in list(gm.graph.nodes):
        custom = dict(node.meta.get("custom") or {})
        if custom.pop(PROVENANCE, None) is not None:
            node.meta["custom"] = custom
        if is_precondition_grad(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.op == "call_module" and isinstance(
            gm.get_submodule(str(node.target)), TractLayer
        ):
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "tract"}
    gm.recompile()
