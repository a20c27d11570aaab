"""Locate: which nodes of an fx graph are the input layers, and why nothing else is.

The input spreads from the placeholders through everything that has no trainable parameter. The
first operation that has one ends it: a linear layer or convolution is a candidate, anything else is
refused. Layers that are not trained are passed over, unless there is none that is. Nothing is
rewritten here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx, nn
from torch.fx import Node

from tract_fx.modules import TORCH_TRACT, Why, is_standard, tract_lambda, tract_scope, why_not
from tract_fx.passes.fx_graph import reasons
from tract_fx.passes.fx_graph.calls import (
    LayerCall,
    is_precondition_grad,
    match_function,
    match_module,
    read_lambda,
    read_scope,
)
from tract_fx.passes.fx_graph.entering import entering_values
from tract_fx.passes.fx_graph.memory import effects
from tract_fx.passes.fx_graph.owners import (
    has_trained_tensor,
    layer_module,
    weight_parameters,
)
from tract_fx.passes.fx_graph.regions import Region, region_of
from tract_fx.passes.fx_graph.values import (
    Value,
    Values,
    attribute_value,
    lookup,
    node_shape,
    resolve,
)
from tract_fx.passes.reasons import INPUT_IS_WEIGHT, WEIGHT_FROM_INPUT
from tract_fx.passes.records import Findings, InputLayer, Refusal, layer_name
from tract_fx.preconditioner import PatchGeometry, group_of, op_name


@dataclass(frozen=True)
class Located:
    """What locating found, with the nodes beside the records.

    Attributes:
        findings: The public records.
        eligible: Every call that could be treated if the user names it, by record.
        passed: The frozen layers between the input and what was found.
    """

    findings: Findings
    eligible: tuple[tuple[InputLayer, LayerCall], ...]
    passed: tuple[InputLayer, ...] = ()


def locate(gm: fx.GraphModule) -> Located:
    """Find the calls that consume the model's input."""
    return _Locator(gm).run()


@dataclass(frozen=True)
class _Met:
    """A layer on the input's way, or an operation there that is refused.

    Attributes:
        node: The node.
        minor: Whether what it reads does not compete for being the image.
        past_frozen: Whether a frozen layer lies before it.
        record: The layer.
        constant: Whether nothing of the layer is trained.
        refusal: The refusal.
    """

    node: Node
    minor: bool
    past_frozen: bool
    record: InputLayer | None = None
    constant: bool = False
    refusal: Refusal | None = None


def _settled(met: list[_Met]) -> tuple[list[_Met], tuple[InputLayer, ...]]:
    """Leave out what competes with nothing: frozen layers before trained ones, and minor inputs."""
    trained = [m for m in met if m.record is not None and not m.constant and not m.minor]
    passed = [m for m in met if m.constant and not m.minor] if trained else []
    kept = [m for m in met if m not in passed and (trained or not m.past_frozen)]
    if any(not m.minor and (m.record or m.refusal) for m in kept):
        kept = [_aside(m) if m.minor else m for m in kept]
    return kept, tuple(m.record for m in passed if m.record is not None)


def _aside(met: _Met) -> _Met:
    """Make of what reads a minor input a refusal that competes with nothing."""
    if met.refusal is not None:
        return dataclasses.replace(met, refusal=dataclasses.replace(met.refusal, competes=False))
    assert met.record is not None
    refusal = reasons.refuse_operation(met.node, met.record.path, None, reasons.MINOR)
    refusal = dataclasses.replace(refusal, module=met.record.module)
    return dataclasses.replace(met, record=None, refusal=refusal)


class _Locator:
    """One walk over the graph, in order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.root = gm
        # Of the graph that the walk is in: the model's own, or that of a region in it.
        self.gm, self.prefix, self.trains = gm, "", True
        self.values = Values()
        self.entering = entering_values(gm.graph)
        self.met: list[_Met] = []
        self.eligible: list[tuple[InputLayer, LayerCall]] = []

    def run(self) -> Located:
        self._walk()
        kept, passed = _settled(self.met)
        layers = tuple(m.record for m in kept if m.record is not None)
        refusals = tuple(m.refusal for m in kept if m.refusal is not None)
        return Located(Findings(layers, refusals), tuple(self.eligible), passed)

    def _walk(self) -> None:
        for node in self.gm.graph.nodes:
            if node.op != "output" and node not in self.values:
                self._visit(node)

    def _visit(self, node: Node) -> None:
        """Tell what a node's value is made of, and record it if it is a layer or a refusal."""
        if node.op == "placeholder":
            self.values.add(node, self.entering[node])
        elif node.op == "get_attr":
            value, memory = attribute_value(self.gm, node, self.prefix)
            self.values.add(node, value, memory=memory)
        elif reasons.carries_no_values(node):
            self.values.add(node, Value())
        elif is_precondition_grad(node):
            weight = node.all_input_nodes[0]
            self.values.add(node, self.values[weight], shares=[weight])
        else:
            region = region_of(self.gm, node)
            if region is None:
                self._visit_operation(node)
            else:
                self._visit_region(node, region)

    def _visit_region(self, node: Node, region: Region) -> None:
        """Walk through a graph that a node calls, as if it stood in the node's place."""
        placeholders = region.module.graph.find_nodes(op="placeholder")
        for placeholder, operand in zip(placeholders, region.operands, strict=True):
            given = isinstance(operand, Node)
            value = self.values[operand] if given else Value()
            self.values.add(placeholder, value, shares=[operand] if given else ())
        outside = self.gm, self.prefix, self.trains
        self.gm, self.prefix = region.module, f"{self.prefix}{region.target}."
        self.trains = self.trains and region.trains
        self._walk()
        self.gm, self.prefix, self.trains = outside
        results = region.module.graph.output_node().all_input_nodes
        self.values.add(node, Value.join(self.values[n] for n in results), shares=results)

    def _visit_operation(self, node: Node) -> None:
        value = Value.join(self.values[n] for n in node.all_input_nodes)
        module = lookup(self.gm, node) if node.op == "call_module" else None
        if isinstance(module, nn.Module):
            value = value.with_parameters(self.prefix + str(node.target), module)
            if has_trained_tensor(module):
                value = dataclasses.replace(value, trainable=True)
        if not self.trains:
            value = dataclasses.replace(value, trainable=False)
        call = match_module(node, module) if module is not None else match_function(node)
        if call is not None and self._has_weight_parameters(call, module):
            constant = self._visit_layer(call, module, value) and not value.trainable
            self.values.add(node, self._result(call, value, constant))
            return
        effect = effects(node, module)
        met = bool(value.path and value.trainable)
        if met:
            self._refuse(node, value, module, None if call is None else reasons.BIASED_FILTER)
            value = Value(from_layers=True)
        elif value.path and not effect.understood:
            self._refuse(node, value, module, reasons.UNKNOWN_WRITER)
        elif value.path:
            # A frozen parameter in the way is a constant.
            value = dataclasses.replace(value, parameters=(), path=(*value.path, node.name))
        elif value.from_layers:
            value = Value(from_layers=True)  # whatever parameters the features have met
        self.values.add(node, value, effect.shares)
        for written in effect.writes:
            self.values.write(written, value, over=met)

    def _result(self, call: LayerCall, value: Value, constant: bool) -> Value:
        """Tell what a layer's output is made of."""
        if not value.path and not value.from_layers:
            return value  # of parameters alone: another computed weight (a hypernetwork's)
        x = self.values[call.input]
        if not x.path or x.from_layers or not constant:
            return Value(from_layers=True)
        # A layer that is not trained is a constant on the way.
        path = (*x.path, call.node.name)
        return Value(path=path, optional=True, minor=x.minor, past_frozen=True)

    def _has_weight_parameters(self, call: LayerCall, module: nn.Module | None) -> bool:
        """Tell a layer from a filter: one whose weight is a buffer is part of the input's path."""
        if module is not None:
            is_buffer = "weight" in dict(module.named_buffers(recurse=False))
            has_parameters = not is_buffer and next(module.parameters(), None) is not None
            return has_parameters or has_trained_tensor(module)
        assert call.weight is not None
        weight = self.values[call.weight]
        return bool(weight.parameters) or weight.from_layers or bool(weight.path)

    def _visit_layer(self, call: LayerCall, module: nn.Module | None, value: Value) -> bool:
        """Record a layer; tell whether it could be treated."""
        node, x = call.node, self.values[call.input]
        why = self._why_not(call, module)
        record = None
        if why is None:
            record = self._record(call, module, (*x.path, node.name))
            self.eligible.append((record, call))
        if x.path and record is not None:
            self.met.append(_Met(node, x.minor, x.past_frozen, record, not value.trainable))
        elif value.path:
            self._refuse(node, value, module, why or INPUT_IS_WEIGHT)
        return record is not None

    def _why_not(self, call: LayerCall, module: nn.Module | None) -> Why | None:
        """Say why a call of a linear layer or convolution can't be treated."""
        if reasons.via_torch_tract(call.node):
            return TORCH_TRACT
        if module is not None:
            parameters = list(module.parameters())
            why = why_not(module)
        else:
            assert call.weight is not None
            weight = self.values[call.weight]
            parameters = [resolve(self.root, name) for name in weight.parameters]
            why = _why_not_weight(call.weight, weight)
            if why is None and len(node_shape(self.gm, call.weight) or (1, 1)) < 2:
                why = reasons.VECTOR
        if why is None and any(p is not None and p.is_complex() for p in parameters):
            return reasons.COMPLEX
        return why

    def _refuse(
        self, node: Node, value: Value, module: nn.Module | None, why: Why | None = None
    ) -> None:
        if reasons.via_torch_tract(node):
            why = TORCH_TRACT
        refusal = reasons.refuse_operation(node, (*value.path, node.name), module, why)
        self.met.append(_Met(node, value.minor, value.past_frozen, refusal=refusal))

    def _record(
        self, call: LayerCall, module: nn.Module | None, path: tuple[str, ...]
    ) -> InputLayer:
        node = call.node
        if module is not None:
            lambda_ = tract_lambda(module) if node.kwargs.get("tract", True) else None
            name = self.prefix + str(node.target)
            return InputLayer(
                name=name,
                node=self.prefix + node.name,
                op=call.op,
                weight=tuple(f"{name}.{own}" for own in weight_parameters(module)),
                weight_shape=_weight_shape(module),
                geometry=PatchGeometry.of_module(module) if is_standard(module) else None,
                path=path,
                frozen=not any(weight_parameters(module).values()),
                lambda_=lambda_,
                module=name,
                group=None if lambda_ is None else group_of(tract_scope(module)),
            )
        assert call.weight is not None
        weight = self.values[call.weight]
        shape = node_shape(self.gm, call.weight)
        geometry = None
        if shape is not None and not any(map(_is_computed, call.geometry.values())):
            geometry = PatchGeometry.of_convolution(shape[2:], **call.geometry)
        lambda_ = None if call.precondition is None else read_lambda(call.precondition)
        module_path = layer_module(self.root, node, weight.parameters)
        return InputLayer(
            name=module_path or layer_name(node.name, weight.parameters),
            node=self.prefix + node.name,
            op=call.op if shape is None else op_name(max(len(shape) - 2, 0)),
            weight=weight.parameters,
            weight_shape=shape,
            geometry=geometry,
            path=path,
            frozen=not weight.trainable,
            lambda_=lambda_,
            module=module_path,
            group=None if call.precondition is None else group_of(read_scope(call.precondition)),
        )


def _why_not_weight(node: Node, weight: Value) -> Why | None:
    """Say why a function call with this weight can't be treated."""
    if node.op == "placeholder" and not weight.parameters:
        return reasons.LIFTED
    if weight.stale:
        return reasons.STALE
    if weight.path or weight.from_layers:
        return WEIGHT_FROM_INPUT
    return None


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, told without reading it: a parametrized one would be computed."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    assert isinstance(module, nn.modules.conv._ConvNd)
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def _is_computed(argument: object) -> bool:
    """Tell an argument that is known only when the graph runs."""
    values = argument if isinstance(argument, (tuple, list)) else [argument]
    return not all(isinstance(value, (int, str)) for value in values)
