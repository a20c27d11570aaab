"""Locate: which nodes of an fx graph are the input layers, and why nothing else is.

The input spreads from the placeholders through everything that has no trainable parameter. The
first operation that has one ends it: a linear layer or convolution is a candidate, anything else is
refused. Nothing is rewritten here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx, nn
from torch.fx import Node

from tract_fx.modules import TractLayer, why_not
from tract_fx.passes.fx_graph.calls import (
    LayerCall,
    is_precondition_grad,
    match_function,
    match_module,
)
from tract_fx.passes.fx_graph.reasons import (
    TORCH_TRACT,
    carries_no_values,
    refuse_operation,
    via_torch_tract,
)
from tract_fx.passes.fx_graph.rewrite import read_lambda
from tract_fx.passes.fx_graph.values import (
    Value,
    attribute_value,
    lookup,
    node_shape,
    static_shape,
)
from tract_fx.passes.records import Findings, InputLayer, Refusal
from tract_fx.preconditioner import PatchGeometry

__all__ = ["Located", "locate"]


@dataclass(frozen=True)
class Located:
    """What locating found, with the nodes beside the records.

    Attributes:
        findings: The public records.
        calls: The call of each of `findings.layers`, in the same order.
        eligible: Every call that could be treated if the user names it, by record.
    """

    findings: Findings
    calls: tuple[LayerCall, ...]
    eligible: tuple[tuple[InputLayer, LayerCall], ...]


def locate(gm: fx.GraphModule) -> Located:
    """Find the calls that consume the model's input.

    Args:
        gm: A traced or exported model. Not changed.

    Returns:
        Candidates, refusals and all other calls that a user could name.
    """
    return _Locator(gm).run()


class _Locator:
    """One walk over the graph, in order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.values: dict[Node, Value] = {}
        self.layers: list[tuple[InputLayer, LayerCall]] = []
        self.eligible: list[tuple[InputLayer, LayerCall]] = []
        self.refusals: list[Refusal] = []

    def run(self) -> Located:
        for node in self.gm.graph.nodes:
            if node.op != "output":
                self.values[node] = self._visit(node)
        findings = Findings(tuple(r for r, _ in self.layers), tuple(self.refusals))
        return Located(findings, tuple(c for _, c in self.layers), tuple(self.eligible))

    def _visit(self, node: Node) -> Value:
        """Tell what a node's value is made of, and record it if it is a layer or a refusal."""
        if node.op == "placeholder":
            optional = bool(node.args) and (node.args[0] is None or node.args[0] is False)
            return Value() if optional else Value(path=(node.name,))
        if node.op == "get_attr":
            return attribute_value(self.gm, node)
        if carries_no_values(node):
            return Value()
        if is_precondition_grad(node):
            return self.values[node.all_input_nodes[0]]
        value = Value.join(self.values[n] for n in node.all_input_nodes)
        module = lookup(self.gm, node) if node.op == "call_module" else None
        if isinstance(module, nn.Module):
            value = value.with_parameters(str(node.target), module)
        call = match_module(node, module) if module is not None else match_function(node)
        if call is not None and self._has_parameters(call, module):
            return self._visit_layer(call, module, value)
        if value.path and value.trainable:
            self._refuse(node, value.path, module)
            return self._consumed(node)
        if value.path:
            # A frozen parameter in the way is a constant.
            return dataclasses.replace(value, parameters=(), path=(*value.path, node.name))
        return value

    def _has_parameters(self, call: LayerCall, module: nn.Module | None) -> bool:
        """Tell a layer from a filter: one whose weight is a buffer is part of the input's path."""
        if module is not None:
            return next(module.parameters(), None) is not None
        assert call.weight is not None
        weight = self.values[call.weight]
        return bool(weight.parameters) or weight.from_layers or bool(weight.path)

    def _visit_layer(self, call: LayerCall, module: nn.Module | None, value: Value) -> Value:
        node = call.node
        path = self.values[call.input].path
        why = self._why_not(call, module)
        record = None
        if why is None:
            record = self._record(call, module, (*path, node.name))
            self.eligible.append((record, call))
        if path and record is not None:
            self.layers.append((record, call))
        elif value.path:
            self._refuse(node, value.path, module, why or "the input is its weight or bias")
        return self._consumed(node)

    def _why_not(self, call: LayerCall, module: nn.Module | None) -> str | None:
        """Say why a call of a linear layer or convolution can't be treated."""
        if via_torch_tract(call.node):
            return TORCH_TRACT
        if module is not None:
            return why_not(module)
        assert call.weight is not None
        weight = self.values[call.weight]
        if weight.stale:
            return (
                "its weight was computed while tracing and kept, so that its parameters would get "
                "no gradient (trace with the layer as a leaf)"
            )
        if weight.path or weight.from_layers:
            return "its weight is computed from the input, not from parameters alone"
        return None

    def _consumed(self, node: Node) -> Value:
        """Value of a node that is the first to put parameters on the input."""
        if _is_in_place(node) and node.args and isinstance(node.args[0], Node):
            self.values[node.args[0]] = Value(from_layers=True)
        return Value(from_layers=True)

    def _refuse(
        self, node: Node, path: tuple[str, ...], module: nn.Module | None, why: str | None = None
    ) -> None:
        self.refusals.append(refuse_operation(node, (*path, node.name), module, why))

    def _record(
        self, call: LayerCall, module: nn.Module | None, path: tuple[str, ...]
    ) -> InputLayer:
        node = call.node
        if module is not None:
            treated = isinstance(module, TractLayer) and node.kwargs.get("tract", True)
            prefix = f"{node.target}."
            return InputLayer(
                name=str(node.target),
                node=node.name,
                op=call.op,
                weight=tuple(prefix + name for name in _weight_parameters(module)),
                weight_shape=static_shape(module.weight),
                geometry=PatchGeometry.of_module(module),
                path=path,
                frozen=not any(_weight_parameters(module).values()),
                lambda_=vars(module)["tract_lambda"] if treated else None,
            )
        assert call.weight is not None
        weight = self.values[call.weight]
        shape = node_shape(self.gm, call.weight)
        geometry = None
        if shape is not None:
            geometry = PatchGeometry.of_convolution(shape[2:], **call.geometry)
        lambda_ = None if call.precondition is None else read_lambda(call.precondition)
        return InputLayer(
            name=_function_name(node, weight.parameters),
            node=node.name,
            op=call.op,
            weight=weight.parameters,
            weight_shape=shape,
            geometry=geometry,
            path=path,
            frozen=not weight.trainable,
            lambda_=lambda_,
        )


def _weight_parameters(module: nn.Module) -> dict[str, bool]:
    """Names of the parameters that a layer's weight is computed from, and who is trainable."""
    own = {name: p.requires_grad for name, p in module.named_parameters()}
    return {
        name: trainable
        for name, trainable in own.items()
        if name.startswith(("weight", "parametrizations.weight."))
    } or own


def _function_name(node: Node, parameters: tuple[str, ...]) -> str:
    """Name a layer that is a function: by its module if the weight is one, else by the weight."""
    if not parameters:
        return node.name
    module, _, rest = parameters[0].partition(".parametrizations.")
    if not rest:
        module, _, name = parameters[0].rpartition(".")
        if not name.startswith("weight"):
            return parameters[0]
    return module or node.name


def _is_in_place(node: Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return isinstance(name, str) and (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("iadd", "isub", "imul", "itruediv")
    )
