"""Drawing: an ONNX graph's nodes as the nodes of a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import onnx_ir as ir

from tract_fx.inspection.onnx.layers import Form, forms_of
from tract_fx.inspection.records import ViewNode
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.parameters import is_training_graph
from tract_fx.passes.onnx_graph.provenance import PREFIX, provenance_of
from tract_fx.passes.onnx_graph.treated import TreatedCall
from tract_fx.passes.onnx_graph.values import ancestors, carries_no_values, operands

Kind: TypeAlias = Literal["input", "parameter", "constant", "operation", "tract", "output"]
Part: TypeAlias = Literal["forward", "backward"]

_GRADIENT, _BUFFER, _RESET = "_grad", "_grad.accumulation.buffer", "lazy_reset_grad"
_ACCUMULATOR = "InPlaceAccumulatorV2"
_PASSED_ON = frozenset({"Identity"})
_STAGES = ("Gram", "factorisation", "solve")
_RESHAPED = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def forward_nodes(model: ir.Model) -> set[ir.Node]:
    """Give the nodes of the forward pass."""
    return ancestors(model.graph.outputs[0]) if is_training_graph(model) else set(model.graph)


class Drawing:
    """One picture that is being drawn, node by node in the order in which they run.

    Args:
        model: The graph.
        treated: Its calls with TrAct.
        parameters: Names of the parameters.
        sizes: Numbers that stand for open sizes, by the size's name.
        shapes: Dtype and shape of values inside TrAct's nodes, by name, where they are known.
        chosen: The form that ran, by the call's node, to draw TrAct's operators; None to draw TrAct
            as one node per call.

    Attributes:
        nodes: What was drawn, by name: that of the first value that the node makes.
    """

    def __init__(
        self,
        model: ir.Model,
        treated: Sequence[TreatedCall],
        parameters: Iterable[str],
        sizes: Mapping[str, int],
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        chosen: Mapping[str, Form] | None,
    ) -> None:
        graph = model.graph
        self.nodes: dict[str, ViewNode] = {}
        self._forward = forward_nodes(model)
        self._owners = {node: call for call in treated for node in call.nodes}
        self._parameters, self._sizes, self._shapes = set(parameters), sizes, shapes
        self._chosen = chosen
        self._drawn: dict[ir.Value, str] = {}
        self._values = {v.name: v for v in graph.inputs}
        self._values |= {v.name: v for node in graph for v in node.outputs}
        self._weights = {call.plain: call.call.weight for call in treated}

    def add(self, node: ir.Node) -> None:
        """Draw a node of the graph."""
        call = self._owners.get(node)
        if call is None:
            self._add_node(node)
        elif self._chosen is None:
            if node is call.nodes[-1]:
                self._add_folded(call)
        elif node is call.nodes[-1]:
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
            label = f"accumulate {str(node.inputs[0].name).removesuffix(_BUFFER)}"
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
                self._add_operator(node, stage)
        if len(forms) == 1:
            self._drawn[call.result] = self._drawn[forms[0].end]
            return
        conditions = {node.inputs[0]: None for form in forms for node, _ in form.choices}
        read = [*(form.end for form in forms), *(v for v in conditions if v is not None)]
        self._put("If", "tract", self._inputs(read), (call.result,), "backward")

    def _add_operator(self, node: ir.Node, stage: str) -> None:
        inputs = self._inputs(operands(node))
        if inputs and not carries_no_values(node) and node.outputs[0] not in self._drawn:
            self._put(node.op_type, "tract", inputs, node.outputs, "backward", stage)

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
        elif value.is_graph_input() and not name.endswith(_BUFFER) and name != _RESET:
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
        name = self._short(str(named[0].name))
        self._drawn.update(dict.fromkeys(named, name))
        detail = self._detail(named[0]) if kind != "output" else ""
        self.nodes[name] = ViewNode(name, label, kind, part, inputs, detail, stage)

    def _short(self, name: str) -> str:
        """Leave out what is in front of every name that the pass made for the one call."""
        calls = {call.record.node for call in self._owners.values()}
        return name.removeprefix(f"{PREFIX}{calls.pop()}/") if len(calls) == 1 else name

    def _detail(self, value: ir.Value) -> str:
        """Dtype and shape: those of a run, or the graph's own, a gradient having its value's."""
        known = self._shapes.get(str(value.name))
        if known is not None:
            return f"{known[0]} {'×'.join(map(str, known[1])) or 'scalar'}"
        if value.shape is None:
            value = self._differentiated(value)
        if value.shape is None:
            return ""
        sizes = [size if isinstance(size, int) else self._size(size) for size in value.shape]
        dtype = "float32" if value.dtype is None else value.dtype.numpy().name
        return f"{dtype} {'×'.join(map(str, sizes)) or 'scalar'}"

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
    if node.op_type == _ACCUMULATOR and first is not None and str(first.name).endswith(_BUFFER):
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
