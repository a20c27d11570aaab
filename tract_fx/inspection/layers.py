"""Which calls of layers a model has, which of them TrAct is on, and how it is computed there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from tract_fx.inspection.all_processes import gram_notes
from tract_fx.inspection.batch import dtype_name
from tract_fx.inspection.records import LayerReport, SourceLine
from tract_fx.inspection.sources import source_of
from tract_fx.passes.fx_graph import locate
from tract_fx.passes.records import Findings, InputLayer
from tract_fx.preconditioner import gram_algorithm, is_quicker, plan_solve
from tract_fx.reference.observed import ObservedCall

_FORMS = {
    "cholesky": "Cholesky of the Gram",
    "row space": "Cholesky of XXᵀ, on the output's gradient in an eager layer whose input needs "
    "none, else in the row space",
    "no rows": "gW / λ, for there are no rows",
}

_SMALL = (
    "; of so few rows an eager layer whose input needs no gradient computes it from the output's, "
    "in the dtype that its error asks for"
)


@dataclass(frozen=True)
class LayerCalls:
    """The calls of layers in a graph, of whatever kind.

    Attributes:
        findings: What locating says of the model's input.
        records: All calls, in graph order.
        sources: The user's line of each call, by its node's name, None where it is not known.
        padding_modes: How a call's module pads, by its node's name; empty where with zeros.
    """

    findings: Findings
    records: Sequence[InputLayer]
    sources: Mapping[str, SourceLine | None]
    padding_modes: Mapping[str, str]

    @cached_property
    def on_input(self) -> set[str]:
        """Names of the nodes that consume the model's input."""
        return {record.node for record in self.findings.layers}

    @property
    def taken(self) -> list[InputLayer]:
        """The calls that TrAct is on."""
        return [r for r in self.records if r.lambda_ is not None]

    @property
    def candidates(self) -> list[InputLayer]:
        """Those that consume the model's input and that it is not on."""
        return [r for r in self.records if r.lambda_ is None and r.node in self.on_input]

    @property
    def others(self) -> int:
        """How many further calls there are."""
        return len(self.records) - len(self.taken) - len(self.candidates)


def read_layers(graph: fx.GraphModule, model: nn.Module) -> LayerCalls:
    """Read the calls of a graph."""
    located = locate(graph)
    records = [record for record, _ in located.eligible]
    sources = {record.node: source_of(call.node) for record, call in located.eligible}
    modes = {record.node: _padding_mode(record, model) for record in records}
    return LayerCalls(located.findings, records, sources, modes)


def _padding_mode(record: InputLayer, model: nn.Module) -> str:
    """Name what a call's own module pads with before it multiplies; empty for zeros."""
    try:
        layer = model.get_submodule(record.module or "")
    except AttributeError:  # an exported graph keeps parameters, and no modules
        return ""
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.padding_mode == "zeros":
        return ""
    return layer.padding_mode if any(layer._reversed_padding_repeated_twice) else ""


def layer_reports(calls: LayerCalls, observed: Sequence[ObservedCall]) -> tuple[LayerReport, ...]:
    """Report on the calls with TrAct, and on those on the input without."""
    by_node = {call.record.node: call for call in observed}
    taken = [_report(record, calls, by_node.get(record.node)) for record in calls.taken]
    return (*taken, *(_report(record, calls, None) for record in calls.candidates))


def _report(record: InputLayer, calls: LayerCalls, call: ObservedCall | None) -> LayerReport:
    form, gram = _computation(record, call)
    columns = call.columns if call is not None else None
    if columns is None and record.weight_shape is not None:
        columns = math.prod(record.weight_shape[1:])
    return LayerReport(
        record=record,
        on_input=record.node in calls.on_input,
        source=calls.sources.get(record.node),
        input_shape=None if call is None else tuple(call.x.shape),
        input_dtype=None if call is None else dtype_name(call.x.dtype),
        rows=None if call is None else call.row_count,
        columns=columns,
        form=form,
        gram=gram,
        note=_note(record, calls, call),
    )


def _computation(record: InputLayer, call: ObservedCall | None) -> tuple[str, str]:
    """Say how the library solves a call, by the plan that it makes itself."""
    if call is None or record.lambda_ is None or record.geometry is None:
        return "", ""
    if call.all_rows is not None:
        if call.all_rows.rows is not None:
            return "Cholesky of XXᵀ of all processes' rows, which are gathered, float64", ""
        return "Cholesky of the Gram of all processes, float64", "added up in float64"
    dtype = call.x.dtype if call.incoming is None else call.incoming.dtype
    plan = plan_solve(dtype, call.x, record.lambda_, record.geometry)
    form = f"{_FORMS[plan.form]}, {dtype_name(plan.dtype)}"
    if plan.form != "cholesky":
        return form, ""
    if call.x.is_cpu and is_quicker(call.x.shape, torch.Size(call.weight_shape), record.geometry):
        form += _SMALL
    algorithm = gram_algorithm(record.geometry.batched(call.x), record.geometry)
    return form, f"{algorithm}, {dtype_name(plan.dtype)} products, float64 sums"


def _note(record: InputLayer, calls: LayerCalls, call: ObservedCall | None) -> str:
    if record.lambda_ is not None:
        return "; ".join([*_notes(record, calls), *gram_notes(record, call)])
    if calls.taken:
        return "TrAct was put on another layer"
    if len({r.name for r in calls.candidates}) > 1 or calls.findings.refusals:
        return "TrAct is on no layer; of several on the input one has to be named: layers=[…]"
    return "TrAct is on no layer; the pass would take this one"


def _notes(record: InputLayer, calls: LayerCalls) -> Iterator[str]:
    """Say what is unusual about a call with TrAct."""
    if record.frozen:
        yield "its weight requires no gradient, so that TrAct is idle"
    elif record.node not in calls.on_input:
        yield "named by the user: it does not consume the model's input"
    if mode := calls.padding_modes.get(record.node):
        yield f"its input is shown as it is multiplied, after its {mode} padding"
