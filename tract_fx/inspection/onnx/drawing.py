"""Pictures of an ONNX graph: TrAct's neighbourhood, with TrAct as one node or as its operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from tract_fx.inspection.batch import value_words
from tract_fx.inspection.neighbourhood import view_of
from tract_fx.inspection.onnx.layers import Form, forms_of
from tract_fx.inspection.records import Backward, GraphView, Kind, Part, ViewNode
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET, is_training_graph
from tract_fx.passes.onnx_graph.provenance import PREFIX, provenance_of
from tract_fx.passes.onnx_graph.treated import TreatedCall
from tract_fx.passes.onnx_graph.values import ancestors, carries_no_values, operands

_GRADIENT = "_grad"
_ACCUMULATOR = "InPlaceAccumulatorV2"
_PASSED_ON = frozenset({"Identity"})
_STAGES = ("Gram", "factorisation", "solve")
_RESHAPED = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

Shapes: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of values, by their names."""


@dataclass(frozen=True)
class OnnxPictures:
    """What the pictures of one graph are drawn from.

    Attributes:
        model: The graph.
        treated: Its calls with TrAct.
        outputs: What the layers give whose neighbourhood is drawn.
        parameters: Names of the parameters.
        sizes: Numbers that stand for open sizes in the batch, by the size's name.
        whole: Whether to draw whole graphs instead of neighbourhoods.
    """

    model: ir.Model
    treated: Sequence[TreatedCall]
    outputs: Sequence[ir.Value]
    parameters: Sequence[str]
    sizes: Mapping[str, int]
    whole: bool

    def changed(self) -> GraphView:
        """Draw what the rewrite changed."""
        title = "TrAct in the training graph" if self.treated else "The layers on the input"
        return self._view(title, 1)

    def backward(self, chosen: Mapping[str, Form], shapes: Shapes, *, expanded: bool) -> Backward:
        """Draw the backward pass.

        Args:
            chosen: The form that ran, by the call's node.
            shapes: What is known of the values inside TrAct's nodes.
            expanded: Whether to draw TrAct's operators as well.
        """
        short = self._view("Forward and backward pass, TrAct as one node per call", 2)
        if not expanded or not self.treated:
            return Backward(short, None)
        several = any(len(forms_of(call)) > 1 for call in self.treated)
        note = "The forms that other batches take are not shown" if several and chosen else ""
        title = "Forward and backward pass, TrAct's operators"
        return Backward(short, self._view(title, 1, shapes, chosen, note))

    def _view(
        self,
        title: str,
        radius: int,
        shapes: Shapes | None = None,
        chosen: Mapping[str, Form] | None = None,
        note: str = "",
    ) -> GraphView:
        drawing = _Drawing(self, shapes or {}, chosen)
        for node in self.model.graph:
            drawing.add(node)
        around = {str(value.name) for value in self.outputs}
        nodes = list(drawing.nodes.values())
        return view_of(nodes, title, radius, whole=self.whole, note=note, around=around)


class _Drawing:
    """One picture that is being drawn, node by node in the order in which they run.

    TrAct's operators are drawn where a form is chosen, else one node per call. `nodes` is what was
    drawn, by name: that of the first value that the node makes.
    """

    def __init__(self, of: OnnxPictures, shapes: Shapes, chosen: Mapping[str, Form] | None) -> None:
        graph = of.model.graph
        self.nodes: dict[str, ViewNode] = {}
        is_training = is_training_graph(of.model)
        self._forward = ancestors(graph.outputs[0]) if is_training else set(graph)
        calls = {call.record.node for call in of.treated}
        # In front of every name that the pass made for the one call.
        self._prefix = f"{PREFIX}{calls.pop()}/" if len(calls) == 1 else ""
        self._owners = {node: call for call in of.treated for node in call.nodes}
        self._parameters, self._sizes, self._shapes = set(of.parameters), of.sizes, shapes
        self._chosen = chosen
        self._drawn: dict[ir.Value, str] = {}
        self._values = {v.name: v for v in graph.inputs}
        self._values |= {v.name: v for node in graph for v in node.outputs}
        self._weights = {call.plain: call.call.weight for call in of.treated}

    def add(self, node: ir.Node) -> None:
        """Draw a node of the graph."""
        call = self._owners.get(node)
        if call is None:
            self._add_node(node)
        elif node is not call.nodes[-1]:
            return
        elif self._chosen is None:
            self._add_folded(call)
        else:
            self._add_operators(call, self._chosen.get(call.record.node))

    def _add_node(self, node: ir.Node) -> None:
        part: Part = "forward" if node in self._forward else "backward"
        read = list(operands(node))
        inputs = self._inputs(read)
        if carries_no_values(node) or (read and not inputs):
            return  # it works on sizes
        if node.op_type in (_PASSED_ON if part == "forward" else _RESHAPED) and len(inputs) == 1:
            self._drawn.update(dict.fromkeys(node.outputs, inputs[0]))
            return
        label, kind = f"{node.op_type}{_kernel(node)}", _kind(node)
        output = node.outputs[0]
        if node.op_type == _ACCUMULATOR and node.inputs[0] is not None:
            label = f"accumulate {str(node.inputs[0].name).removesuffix(BUFFER)}"
        elif output.is_graph_output():
            label += f" → {output.name}"
        self._put(label, kind, inputs, node.outputs, part)

    def _add_folded(self, call: TreatedCall) -> None:
        inside = {value for node in call.nodes for value in node.outputs}
        read = [v for node in call.nodes for v in operands(node) if v not in inside]
        inputs = self._inputs(value for value in read if not _is_lambda(value))
        label = f"TrAct λ = {call.record.lambda_:g}"
        self._put(label, "tract", inputs, (call.result,), "backward")

    def _add_operators(self, call: TreatedCall, chosen: Form | None) -> None:
        """Draw the form that ran, or each with the If between them."""
        forms = forms_of(call) if chosen is None else (chosen,)
        self._inputs(v for node in call.nodes for v in operands(node) if _is_lambda(v))
        for form in forms:
            for node, stage in _staged(form):
                read = self._inputs(operands(node))
                if read and not carries_no_values(node) and node.outputs[0] not in self._drawn:
                    self._put(node.op_type, "tract", read, node.outputs, "backward", stage)
        if len(forms) == 1:
            self._drawn[call.result] = self._drawn[forms[0].end]
            return
        conditions = {node.inputs[0]: None for form in forms for node, _ in form.choices}
        read_by_if = [*(form.end for form in forms), *(v for v in conditions if v is not None)]
        self._put("If", "tract", self._inputs(read_by_if), (call.result,), "backward")

    def _inputs(self, values: Iterable[ir.Value]) -> tuple[str, ...]:
        """Name what is drawn of the values that a node reads, and draw those that no node makes."""
        values = list(values)
        for value in values:
            if value not in self._drawn and value.producer() is None:
                self._add_source(value)
        found = (self._drawn[value] for value in values if value in self._drawn)
        return tuple(dict.fromkeys(found))

    def _add_source(self, value: ir.Value) -> None:
        """Draw an input of the graph, a parameter or λ; other constants are left out."""
        name = str(value.name)
        if _is_lambda(value) and value.const_value is not None:
            label = f"λ = {float(value.const_value.numpy()):g}"
            self._put(label, "constant", (), (value,), "backward")
        elif name in self._parameters:
            self._put(name, "parameter", (), (value,), "forward")
        elif value.is_graph_input() and not name.endswith(BUFFER) and name != RESET:
            self._put(name, "input", (), (value,), "forward")

    def _put(
        self,
        label: str,
        kind: Kind,
        inputs: tuple[str, ...],
        outputs: Iterable[ir.Value],
        part: Part,
        stage: str = "",
    ) -> None:
        named = [value for value in outputs if value.name]
        if not named:
            return
        name = str(named[0].name).removeprefix(self._prefix)
        self._drawn.update(dict.fromkeys(named, name))
        detail = self._detail(named[0]) if kind != "output" else ""
        self.nodes[name] = ViewNode(name, label, kind, part, inputs, detail, stage)

    def _detail(self, value: ir.Value) -> str:
        """Dtype and shape: those of a run, or the graph's own, a gradient having its value's."""
        known = self._shapes.get(str(value.name))
        if known is not None:
            return value_words(*known)
        if value.shape is None:
            value = self._differentiated(value)
        if value.shape is None:
            return ""
        sizes = [size if isinstance(size, int) else self._size(size) for size in value.shape]
        dtype = "float32" if value.dtype is None else value.dtype.numpy().name
        return value_words(dtype, sizes)

    def _differentiated(self, value: ir.Value) -> ir.Value:
        """Give what a gradient is of; the builder leaves the gradients' shapes out."""
        if value in self._weights:
            return self._weights[value]
        return self._values.get(str(value.name).removesuffix(_GRADIENT), value)

    def _size(self, size: ir.SymbolicDim) -> int | str:
        return self._sizes.get(str(size.value), "?" if size.value is None else size.value)


def _staged(form: Form) -> list[tuple[ir.Node, str]]:
    """A form's nodes with their stages, which read of none behind them where all are recorded."""
    needed = ancestors(form.end)
    records = [(node, provenance_of(node)) for node in form.nodes if node in needed]
    staged = [(node, record.stage if record else "") for node, record in records]
    if all(stage in _STAGES for _, stage in staged):
        return sorted(staged, key=lambda pair: _STAGES.index(pair[1]))
    return [(node, stage or "not recorded") for node, stage in staged]


def _kind(node: ir.Node) -> Kind:
    if is_standard(node, "Constant"):
        return "constant"
    first = node.inputs[0] if node.inputs else None
    if node.op_type == _ACCUMULATOR and first is not None and str(first.name).endswith(BUFFER):
        return "output"
    return "operation"


def _is_lambda(value: ir.Value) -> bool:
    name = str(value.name)
    return value.is_initializer() and name.startswith(PREFIX) and name.endswith("/lambda")


def _kernel(node: ir.Node) -> str:
    """The size of a convolution's kernel and its stride, where the node states them."""
    kernel, strides = node.attributes.get_ints("kernel_shape"), node.attributes.get_ints("strides")
    shown = "" if not kernel else f" {'×'.join(map(str, kernel))}"
    if strides and any(step != 1 for step in strides):
        shown += f", stride {'×'.join(map(str, strides))}"
    return shown
