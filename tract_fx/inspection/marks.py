"""Traces that the pass has left on calls which do not have TrAct any more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from tract_fx.modules import TractLayer, tract_lambda, why_not
from tract_fx.passes.fx_graph import PROVENANCE
from tract_fx.passes.fx_graph.calls import is_precondition_grad, match_function
from tract_fx.passes.fx_graph.regions import graphs
from tract_fx.passes.records import InputLayer


def lost_marks(model: nn.Module, records: Sequence[InputLayer]) -> tuple[str, ...]:
    """Find traces of TrAct on calls that do not have it any more."""
    if isinstance(model, fx.GraphModule):
        return tuple(_lost_in_graph(model, {record.node for record in records}))
    found = {model.get_submodule(r.module) for r in records if r.module is not None}
    layers = [(n, m) for n, m in model.named_modules() if _was_given_tract(m)]
    lost = [name for name, module in layers if module not in found]
    for path, graph in model.named_modules():
        if isinstance(graph, fx.GraphModule):
            # The records name nodes of another graph, that of the whole model.
            treated = {node.name for node in graph.graph.nodes if _has_tract(graph, node)}
            lost += [f"{path}.{name}" for name in _lost_in_graph(graph, treated)]
    return tuple(dict.fromkeys(lost))


def _was_given_tract(module: nn.Module) -> bool:
    """Tell a TrAct layer, also one whose forward method has been replaced since."""
    return isinstance(module, TractLayer) and "tract_lambda" in vars(module)


def _lost_in_graph(gm: fx.GraphModule, treated: set[str]) -> list[str]:
    called = [
        prefix + call
        for prefix, graph in graphs(gm)
        for node in graph.graph.nodes
        for call in _marked_calls(graph, node)
    ]
    return [name for name in dict.fromkeys(called) if name not in treated]


def _has_tract(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell the calls that have TrAct, by the node alone."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        is_treated = tract_lambda(module) is not None and node.kwargs.get("tract", True)
        return bool(is_treated and why_not(module) is None)
    call = match_function(node)
    return call is not None and call.precondition is not None


def _marked_calls(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """Tell the calls that a node marks: itself, or those whose weight it is."""
    # Exporting a rewritten graph spreads a module's mark over all that its call is traced to.
    marked = PROVENANCE in (node.meta.get("custom") or {})
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        tract_layer = _was_given_tract(module) and node.kwargs.get("tract", True)
        return [node.name] if marked or tract_layer else []
    if not marked or match_function(node) is not None:
        return [node.name] if marked else []
    calls = [call for call in map(match_function, node.users) if call is not None]
    names = [call.node.name for call in calls if node in (call.weight, call.precondition)]
    return names or ([node.name] if is_precondition_grad(node) else [])
