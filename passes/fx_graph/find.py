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

from tract_fx.modules import is_standard, tract_lambda, why_not
from tract_fx.passes.fx_graph import reasons
from tract_fx.passes.fx_graph.calls import (
    LayerCall,
    is_precondition_grad,
    match_function,
    match_module,
    op_name,
)
from tract_fx.passes.fx_graph.memory import effects
from tract_fx.passes.fx_graph.owners import layer_module, weight_parameters
from tract_fx.passes.fx_graph.rewrite import read_lambda
from tract_fx.passes.fx_graph.values import (
    Value,
    Values,
    attribute_value,
    lookup,
    node_shape,
    resolve,
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
        self.values = Values()
        self.layers: list[tuple[InputLayer, LayerCall]] = []
        self.eligible: list[tuple[InputLayer, LayerCall]] = []
        self.refusals: list[Refusal] = []

    def run(self) -> Located:
        for node in self.gm.graph.nodes:
            if node.op != "output":
                self._visit(node)
        findings = Findings(tuple(r for r, _ in self.layers), tuple(self.refusals))
        return Located(findings, tuple(c for _, c in self.layers), tuple(self.eligible))

    def _visit(self, node: Node) -> None:
        """Tell what a node's value is made of, and record it if it is a layer or a refusal."""
        if node.op == "placeholder":
            # What has a default other than None is a flag or a number.
            flag = node.args and node.args[0] is not None
            value = Value() if flag else Value(path=(node.name,), optional=bool(node.args))
            self.values.add(node, value)
        elif node.op == "get_attr":
            value, memory = attribute_value(self.gm, node)
            self.values.add(node, value, memory=memory)
        elif reasons.carries_no_values(node):
            self.values.add(node, Value())
        elif is_precondition_grad(node):
            weight = node.all_input_nodes[0]
            self.values.add(node, self.values[weight], shares=[weight])
        else:
            self._visit_operation(node)

    def _visit_operation(self, node: Node) -> None:
        value = Value.join(self.values[n] for n in node.all_input_nodes)
        module = lookup(self.gm, node) if node.op == "call_module" else None
        if isinstance(module, nn.Module):
            value = value.with_parameters(str(node.target), module)
        call = match_module(node, module) if module is not None else match_function(node)
        if call is not None and self._has_weight_parameters(call, module):
            self._visit_layer(call, module, value)
            # On parameters alone a layer makes another computed weight (a hypernetwork's).
            features = value.path or value.from_layers
            self.values.add(node, Value(from_layers=True) if features else value)
            return
        effect = effects(node, module)
        met = bool(value.path and value.trainable)
        if met:
            self._refuse(node, value.path, module, None if call is None else reasons.BIASED_FILTER)
            value = Value(from_layers=True)
        elif value.path and not effect.understood:
            self._refuse(node, value.path, module, reasons.UNKNOWN_WRITER)
        elif value.path:
            # A frozen parameter in the way is a constant.
            value = dataclasses.replace(value, parameters=(), path=(*value.path, node.name))
        elif value.from_layers:
            value = Value(from_layers=True)  # whatever parameters the features have met
        self.values.add(node, value, effect.shares)
        for written in effect.writes:
            self.values.write(written, value, over=met)

    def _has_weight_parameters(self, call: LayerCall, module: nn.Module | None) -> bool:
        """Tell a layer from a filter: one whose weight is a buffer is part of the input's path."""
        if module is not None:
            is_buffer = "weight" in dict(module.named_buffers(recurse=False))
            return not is_buffer and next(module.parameters(), None) is not None
        assert call.weight is not None
        weight = self.values[call.weight]
        return bool(weight.parameters) or weight.from_layers or bool(weight.path)

    def _visit_layer(self, call: LayerCall, module: nn.Module | None, value: Value) -> None:
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
            self._refuse(node, value.path, module, why or reasons.INPUT_IS_WEIGHT)

    def _why_not(self, call: LayerCall, module: nn.Module | None) -> str | None:
        """Say why a call of a linear layer or convolution can't be treated."""
        if reasons.via_torch_tract(call.node):
            return reasons.TORCH_TRACT
        if module is not None:
            parameters = list(module.parameters())
            why = why_not(module)
        else:
            assert call.weight is not None
            weight = self.values[call.weight]
            parameters = [resolve(self.gm, name) for name in weight.parameters]
            why = _why_not_weight(call.weight, weight)
            if why is None and len(node_shape(self.gm, call.weight) or (1, 1)) < 2:
                why = reasons.VECTOR
        if why is None and any(p.is_complex() for p in parameters):
            return reasons.COMPLEX
        return why

    def _refuse(
        self, node: Node, path: tuple[str, ...], module: nn.Module | None, why: str | None = None
    ) -> None:
        if reasons.via_torch_tract(node):
            why = reasons.TORCH_TRACT
        self.refusals.append(reasons.refuse_operation(node, (*path, node.name), module, why))

    def _record(
        self, call: LayerCall, module: nn.Module | None, path: tuple[str, ...]
    ) -> InputLayer:
        node = call.node
        if module is not None:
            lambda_ = tract_lambda(module) if node.kwargs.get("tract", True) else None
            prefix = f"{node.target}."
            return InputLayer(
                name=str(node.target),
                node=node.name,
                op=call.op,
                weight=tuple(prefix + name for name in weight_parameters(module)),
                weight_shape=_weight_shape(module),
                geometry=PatchGeometry.of_module(module) if is_standard(module) else None,
                path=path,
                frozen=not any(weight_parameters(module).values()),
                lambda_=lambda_,
                module=str(node.target),
            )
        assert call.weight is not None
        weight = self.values[call.weight]
        shape = node_shape(self.gm, call.weight)
        geometry = None
        if shape is not None and not any(map(_is_computed, call.geometry.values())):
            geometry = PatchGeometry.of_convolution(shape[2:], **call.geometry)
        lambda_ = None if call.precondition is None else read_lambda(call.precondition)
        module_path = layer_module(self.gm, node, weight.parameters)
        return InputLayer(
            name=module_path or _function_name(node, weight.parameters),
            node=node.name,
            op=call.op if shape is None else op_name(max(len(shape) - 2, 0)),
            weight=weight.parameters,
            weight_shape=shape,
            geometry=geometry,
            path=path,
            frozen=not weight.trainable,
            lambda_=lambda_,
            module=module_path,
        )


def _why_not_weight(node: Node, weight: Value) -> str | None:
    """Say why a function call with this weight can't be treated."""
    if node.op == "placeholder":
        return reasons.LIFTED
    if weight.stale:
        return reasons.STALE
    if weight.path or weight.from_layers:
        return reasons.WEIGHT_FROM_INPUT
    return None


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


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, told without reading it: a parametrized one would be computed."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def _is_computed(argument: object) -> bool:
    """Tell an argument that is known only when the graph runs."""
    values = argument if isinstance(argument, (tuple, list)) else [argument]
    return not all(isinstance(value, (int, str)) for value in values)
