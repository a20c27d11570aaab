"""Locate: which nodes of an ONNX graph are the input layers, and why nothing else is.

The input spreads from the graph's inputs through everything that has no trainable parameter. The
first operator that has one ends it: a Conv, Gemm or MatMul with a weight is a candidate, anything
else is refused. Of a training graph only the forward part is looked at. Nothing is rewritten here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from tract_fx.errors import UnsupportedModelError
from tract_fx.modules import Why
from tract_fx.passes.onnx_graph import reasons
from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall, match_call
from tract_fx.passes.onnx_graph.layers import layer_record
from tract_fx.passes.onnx_graph.models import as_ir_model
from tract_fx.passes.onnx_graph.parameters import (
    forward_parameters,
    is_training_graph,
    training_parameters,
)
from tract_fx.passes.onnx_graph.provenance import present_lambdas
from tract_fx.passes.onnx_graph.step_names import has_update
from tract_fx.passes.onnx_graph.values import (
    FEATURES,
    Content,
    ancestors,
    carries_no_values,
    is_number,
    node_names,
    operands,
    static_shape,
)
from tract_fx.passes.reasons import INPUT_IS_WEIGHT, WEIGHT_FROM_INPUT
from tract_fx.passes.records import Findings, InputLayer, Refusal


@dataclass(frozen=True)
class LocatedOnnx:
    """What locating found, with the calls beside the records.

    Attributes:
        findings: The public records.
        calls: The call of each of `findings.layers`, by its record's `node`.
        eligible: Every call that could be treated if the user names it, by record.
    """

    findings: Findings
    calls: dict[str, OnnxCall]
    eligible: tuple[tuple[InputLayer, OnnxCall], ...]


def find_onnx_input_layers(
    model: onnx.ModelProto | ir.Model | str | Path, *, trainable: Iterable[str] | None = None
) -> Findings:
    """Say which layers the pass would take, and for everything else on the input why not.

    Args:
        model: A forward model from any framework, or a training graph as
            `onnxruntime.training.artifacts.generate_artifacts` writes it; or its file. Not changed.
        trainable: Names of the initializers that are trained, where the defaults (see
            `forward_parameters`) are not what you train. A training graph says itself.

    Returns:
        The calls that consume the input, and refusals.

    Raises:
        UnsupportedModelError: `model` is something else, or holds what the passes can't read.
        UnsupportedTrainingError: `trainable` names what can't be trained, or what is trained can't
            be told.
    """
    graph = as_ir_model(model)
    if not is_training_graph(graph):
        return locate(graph, forward_parameters(graph, trainable), ()).findings
    inputs = training_parameters(graph)
    if trainable is not None:
        raise UnsupportedModelError(
            "a training graph with trainable=",
            "the graph has gradients of its own parameters and of no others",
            "Leave trainable out, or give the forward model",
        )
    present = present_lambdas(graph)
    return locate(graph, inputs.trainable, inputs.frozen, present).findings


def locate(
    model: ir.Model,
    trainable: Collection[str],
    frozen: Collection[str],
    present: Mapping[str, float] | None = None,
) -> LocatedOnnx:
    """Find the calls that consume the input of a forward or training graph.

    Parameters, trained or frozen, are initializers or a training graph's inputs. Other initializers
    are constants, and a layer whose weight is one is a filter on the input's way. `present` has λ
    of the calls that are TrAct's already, by the node's name.
    """
    graph = model.graph
    nodes = list(graph)
    if is_training_graph(model) or has_update(model):
        forward = ancestors(graph.outputs[0])
        nodes = [node for node in graph if node in forward]
    walk = _Walk(graph, nodes, frozenset(trainable), frozenset(frozen), present or {})
    walk.run(frozenset())
    labels = walk.labels()
    if labels:
        walk.run(labels)
    return walk.located()


class _Walk:
    """One walk over the nodes, in order; a second one where there are labels."""

    def __init__(
        self,
        graph: ir.Graph,
        nodes: list[ir.Node],
        trainable: frozenset[str],
        frozen: frozenset[str],
        present: Mapping[str, float],
    ) -> None:
        self.graph, self.nodes, self.present = graph, nodes, present
        self.trainable, self.frozen = trainable, frozen
        self.names = node_names(graph)
        self.operands = {node: tuple(operands(node)) for node in nodes}
        read = {value for values in self.operands.values() for value in values}
        # Up to IR 3 initializers were inputs too.
        given = [v for v in graph.inputs if v in read and not v.is_initializer()]
        self.given = [v for v in given if not self._is_parameter(v)]

    def run(self, labels: frozenset[ir.Value]) -> None:
        self.contents: dict[ir.Value, Content] = {
            v: Content() if v in labels else Content(path=(str(v.name),)) for v in self.given
        }
        self.layers: list[tuple[InputLayer, OnnxCall]] = []
        self.eligible: list[tuple[InputLayer, OnnxCall]] = []
        self.refusals: list[Refusal] = []
        for node in self.nodes:
            content = self._visit(node)
            self.contents.update(dict.fromkeys(node.outputs, content))

    def located(self) -> LocatedOnnx:
        findings = Findings(tuple(r for r, _ in self.layers), tuple(self.refusals))
        calls = {record.node: call for record, call in self.layers}
        return LocatedOnnx(findings, calls, tuple(self.eligible))

    def labels(self) -> frozenset[ir.Value]:
        """Tell the inputs that only the loss reads.

        Such a one meets trained parameters only once it has met features, and no layer is behind
        it. An in-graph loss may add parameters (a penalty) to what came of the label.
        """
        return frozenset(value for value in self.given if self._is_label(value))

    def _is_label(self, value: ir.Value) -> bool:
        reached, met = {value}, False
        for node in self.nodes:
            if reached.isdisjoint(self.operands[node]) or carries_no_values(node):
                continue
            contents = [self._content(v) for v in self.operands[node]]
            call = match_call(node)
            if call is not None and self._is_layer(call):
                return False
            features = any(c.from_layers for c in contents)
            if any(c.trainable for c in contents) and not features:
                return False
            met = met or features
            reached.update(node.outputs)
        return met

    def _is_parameter(self, value: ir.Value) -> bool:
        return value.name in self.trainable or value.name in self.frozen

    def _content(self, value: ir.Value) -> Content:
        if self._is_parameter(value):
            name = str(value.name)
            return Content(parameters=(name,), trainable=(name,) * (name in self.trainable))
        node = value.producer()
        if node is not None and node.graph is self.graph and value not in self.contents:
            raise UnsupportedModelError(
                f"the value {value.name!r} is read before {node.op_type} makes it",
                "the nodes of an ONNX graph stand in the order in which they run",
                "Sort them, for example with onnx_ir.passes.common.TopologicalSortPass",
            )
        return self.contents.get(value, Content())

    def _visit(self, node: ir.Node) -> Content:
        """Tell what a node's outputs are made of; record it if it is a layer or a refusal."""
        if carries_no_values(node):
            return Content()
        content = Content.join(self._content(v) for v in self.operands[node])
        call = match_call(node)
        if call is not None and self._is_layer(call):
            self._visit_layer(call, content)
            # On parameters alone a layer makes another computed weight.
            return FEATURES if content.path or content.from_layers else content
        if content.path and reasons.is_quantised_layer(node):
            self._refuse(node, content.path, reasons.QUANTISED)
            return FEATURES
        if content.path and content.trainable:
            # A sum of features and parameters that is one number is part of a loss.
            if not (content.from_layers and is_number(node.outputs[0])):
                why = None if call is None or node.op_type == "MatMul" else reasons.BIASED_FILTER
                self._refuse(node, content.path, why)
            return FEATURES
        if content.path:
            # A frozen parameter in the way is a constant.
            path = (*content.path, self.names[node])
            return dataclasses.replace(content, path=path, parameters=(), quantised=False)
        if content.from_layers:
            return FEATURES  # whatever parameters the features have met
        return dataclasses.replace(
            content, quantised=content.quantised or reasons.makes_quantised(node)
        )

    def _is_layer(self, call: OnnxCall) -> bool:
        """Tell a layer from a filter, whose weight is a constant, and from a product of tensors."""
        x, weight = self._content(call.input), self._content(call.weight)
        if weight.quantised or (weight.parameters and not weight.path):
            return True
        if call.node.op_type != "MatMul":
            return weight.from_layers or bool(weight.path)
        if x.parameters and not x.path and (weight.path or weight.from_layers):
            return True
        # The features would have to be the weight: a matrix that a hypernetwork has made.
        shape = static_shape(call.weight)
        is_matrix = shape is None or len(shape) == 2
        return is_matrix and bool(x.path) and not x.from_layers and weight.from_layers

    def _visit_layer(self, call: OnnxCall, content: Content) -> None:
        node, path = call.node, self._content(call.input).path
        why = self._why_not(call)
        record = None
        if why is None:
            name, weight = self.names[node], self._content(call.weight)
            record = layer_record(call, name, weight, (*path, name), self.present.get(name))
            self.eligible.append((record, call))
        if path and record is not None:
            self.layers.append((record, call))
        elif content.path:
            self._refuse(node, content.path, why or INPUT_IS_WEIGHT)

    def _why_not(self, call: OnnxCall) -> Why | None:
        """Say why a call can't be treated."""
        x, weight = self._content(call.input), self._content(call.weight)
        if weight.path or weight.from_layers:
            if not x.parameters or x.path:
                return WEIGHT_FROM_INPUT
            is_matmul = call.node.op_type == "MatMul"
            return reasons.WEIGHT_ON_THE_LEFT if is_matmul else INPUT_IS_WEIGHT
        if weight.quantised:
            return reasons.QUANTISED
        if call.layout is Layout.CONVOLUTION or call.node.op_type == "Gemm":
            return None
        shape = static_shape(call.weight)
        if shape is None:
            return reasons.UNKNOWN_RANK
        if len(shape) != 2:
            return reasons.BATCHED if len(shape) > 2 else reasons.VECTOR
        return None

    def _refuse(self, node: ir.Node, path: tuple[str, ...], why: Why | None = None) -> None:
        name = self.names[node]
        self.refusals.append(reasons.refuse_operation(node, name, (*path, name), why))
