"""Which calls of layers an ONNX graph has, and what TrAct's nodes there compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tract_fx.inspection.batch import dtype_name
from tract_fx.inspection.layers import LayerCalls, layer_reports
from tract_fx.inspection.records import LayerReport
from tract_fx.inspection.sources import source_in
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.find import LocatedOnnx
from tract_fx.passes.onnx_graph.provenance import Provenance, provenance_of
from tract_fx.passes.onnx_graph.treated import TreatedCall
from tract_fx.passes.onnx_graph.values import subgraphs
from tract_fx.reference.observed import ObservedCall

_TRACE = "pkg.torch.onnx.stack_trace"
"""Where torch's exporter notes the line that a node comes from."""

_SYSTEMS = {
    "row space": ("XXᵀ (R × R)", "output's gradient"),
    "column space": ("the Gram (n × n)", "weight's gradient"),
}
"""What is inverted, and what that is multiplied with, by the form's name in a node's record."""

BRANCHES = {True: "then_branch", False: "else_branch"}


@dataclass(frozen=True)
class Form:
    """One way in which TrAct's gradient is computed for a call.

    Attributes:
        nodes: Its nodes, in the order in which they run, those around the branches included.
        end: What it computes: TrAct's result, or its branch's output where an If chooses it.
        choices: The Ifs on the way to it, the outer ones first, each with the value of its
            condition under which the form runs.
    """

    nodes: tuple[ir.Node, ...]
    end: ir.Value
    choices: tuple[tuple[ir.Node, bool], ...] = ()

    @property
    def conditions(self) -> dict[str, bool]:
        """What the Ifs' conditions are, by name, where this form runs."""
        return {str(node.inputs[0].name): when for node, when in self.choices if node.inputs[0]}

    @property
    def in_float64(self) -> bool:
        """Whether it computes in float64."""
        casts = (node for node in self.nodes if is_standard(node, "Cast"))
        return any(node.attributes.get_int("to") == ir.DataType.DOUBLE for node in casts)


def onnx_calls(located: LocatedOnnx) -> LayerCalls:
    """Read the calls of a graph."""
    traces = {r.node: call.node.metadata_props.get(_TRACE, "") for r, call in located.eligible}
    sources = {name: source_in(trace) for name, trace in traces.items()}
    return LayerCalls(located.findings, [record for record, _ in located.eligible], sources, {})


def onnx_layer_reports(
    calls: LayerCalls,
    treated: Sequence[TreatedCall],
    observed: Sequence[ObservedCall],
    values: Mapping[str, np.ndarray],
) -> tuple[LayerReport, ...]:
    """Report on the calls with TrAct, and on those on the input without."""
    nodes = {call.record.node: call for call in treated}
    runs = {call.record.node: call for call in observed}
    reports = []
    for report in layer_reports(calls, ()):
        call, run = nodes.get(report.record.node), runs.get(report.record.node)
        if call is not None:
            form, gram = _in_words(call, chosen_form(call, values))
            report = dataclasses.replace(report, form=form, gram=gram)
        if run is not None:
            report = dataclasses.replace(
                report,
                input_shape=tuple(run.x.shape),
                input_dtype=dtype_name(run.x.dtype),
                rows=run.row_count,
                columns=run.columns,
            )
        reports.append(report)
    return tuple(reports)


def forms_of(call: TreatedCall) -> tuple[Form, ...]:
    """Take apart how TrAct's gradient of a call is computed."""
    return _forms(Form(call.nodes, call.result))


def _forms(form: Form) -> tuple[Form, ...]:
    choice = next((node for node in form.nodes if is_standard(node, "If")), None)
    if choice is None:
        return (form,)
    around = tuple(node for node in form.nodes if node is not choice)
    found: list[Form] = []
    for when, branch in BRANCHES.items():
        graph = choice.attributes[branch].as_graph()
        choices = (*form.choices, (choice, when))
        found += _forms(Form((*around, *graph), graph.outputs[0], choices))
    return tuple(found)


def conditions_of(call: TreatedCall) -> tuple[str, ...]:
    """Name the values by which the graph chooses the form."""
    return tuple(dict.fromkeys(name for form in forms_of(call) for name in form.conditions))


def chosen_form(call: TreatedCall, values: Mapping[str, np.ndarray]) -> Form | None:
    """Tell the form that ran."""
    known = {name: bool(values[name].item()) for name in conditions_of(call) if name in values}
    return next((f for f in forms_of(call) if f.conditions.items() <= known.items()), None)


def _in_words(call: TreatedCall, chosen: Form | None) -> tuple[str, str]:
    """The form, and how the Gram is computed."""
    forms = forms_of(call)
    systems = list(dict.fromkeys(_system(form) for form in forms if not form.in_float64))
    by_size = len(systems) > 1
    if chosen is not None:
        by = "; an If chooses it by the batch's size" if by_size else ""
        return f"{_system(chosen)}{by}", _gram(chosen)
    words = f"by the batch's size (If): {', or '.join(systems)}" if by_size else "".join(systems)
    if any(form.in_float64 for form in forms):
        words += "; in float64 where the input is not standardised (If)"
    grams = dict.fromkeys(_gram(form) for form in forms if not form.in_float64)
    return words, "; or ".join(grams)


def _system(form: Form) -> str:
    """What is solved, and what it is multiplied with."""
    said = next((record.form for record in _records(form) if record.form), "")
    if said not in _SYSTEMS:
        return "not recorded in this graph, which an earlier version wrote"
    matrix, gradient = _SYSTEMS[said]
    return f"Inverse of {matrix}{' in float64' if form.in_float64 else ''}, on the {gradient}"


def _gram(form: Form) -> str:
    """How the matrix is computed; empty where the graph does not say."""
    return ", ".join(dict.fromkeys(record.gram for record in _records(form) if record.gram))


def _records(form: Form) -> Iterator[Provenance]:
    """What the form's nodes say of themselves, those of a graph in one before it."""
    for node in form.nodes:
        inner = (n for graph in subgraphs(node) for n in graph.all_nodes())
        yield from (record for n in (*inner, node) if (record := provenance_of(n)) is not None)
