"""Inspect an ONNX graph: a training graph with TrAct or without, or a forward model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx
import onnx_ir as ir

from tract_fx.artifacts.versions import versions
from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.onnx.batch import OnnxBatch, make_batch
from tract_fx.inspection.onnx.drawing import OnnxPictures, Shapes
from tract_fx.inspection.onnx.layers import (
    Form,
    chosen_form,
    onnx_calls,
    onnx_layer_reports,
)
from tract_fx.inspection.onnx.runs import OnnxRuns, run_form, run_with_tract
from tract_fx.inspection.onnx.subject import OnnxSubject, read_subject
from tract_fx.inspection.onnx.text import graph_text
from tract_fx.inspection.onnx.verify import manifest_problems, verify_runs, wiring_problems
from tract_fx.inspection.records import ForwardDiff, Verification
from tract_fx.inspection.statistics import statistics as measure
from tract_fx.passes.onnx_graph.find import LocatedOnnx, locate
from tract_fx.passes.onnx_graph.provenance import PREFIX
from tract_fx.passes.onnx_graph.treated import TreatedCall, treated_calls, without_tract

_FORWARD = (
    "A forward graph: TrAct is a property of gradients, and goes in when a training graph is made "
    "of it, by export_training, or by generate_artifacts and tract_onnx_pass"
)
_VERSIONS = {"onnx": onnx.__version__, "onnx_ir": ir.__version__}


def inspect_onnx(
    model: onnx.ModelProto | ir.Model | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    backward: Literal["short", "expanded"] | None = "short",
    verify: bool = True,
    statistics: bool = True,
    whole: bool = False,
) -> Inspection:
    """Show what TrAct is in an ONNX graph, and whether it is right: `inspect_graph` of ONNX.

    Parameters are those of the checkpoint beside a training graph, or else random. What is missing
    of the batch (the graph's inputs, then its targets) is noise. No file is changed.
    """
    graphs = _read(model)
    subject = graphs.subject
    asked = verify or statistics or example_inputs is not None
    run = None
    if graphs.treated and asked:
        batch = make_batch(subject, example_inputs)
        run = run_with_tract(subject.model, graphs.plain, graphs.treated, batch)
    calls = onnx_calls(graphs.located)
    drawn = [call.call for call in graphs.treated] or graphs.located.calls.values()
    pictures = OnnxPictures(
        subject.model,
        graphs.treated,
        [call.output for call in drawn],
        (*subject.trainable, *subject.frozen),
        {} if run is None else _open_sizes(subject, run.batch),
        whole,
    )
    chosen = {} if run is None else _chosen(run)
    shapes = _shapes(run, chosen) if backward == "expanded" and run is not None else {}
    has_gradients = backward is not None and subject.is_training
    return Inspection(
        subject=subject.name,
        kind="onnx",
        batch="" if run is None else run.batch.shapes,
        layers=onnx_layer_reports(
            calls,
            graphs.treated,
            () if run is None else run.calls,
            {} if run is None else run.rewritten.values,
        ),
        refusals=calls.findings.refusals,
        others=calls.others,
        forward=ForwardDiff(
            graph_text(graphs.plain), graph_text(subject.model), pictures.changed()
        ),
        backward=pictures.backward(chosen, shapes, expanded=backward == "expanded")
        if has_gradients
        else None,
        verification=_verification(graphs, run) if verify else None,
        statistics=measure(run.calls) if statistics and run is not None else None,
        notes=_notes(graphs, run),
        # A forward graph takes no ONNX Runtime.
        versions=versions() if subject.is_training else _VERSIONS,
    )


@dataclass(frozen=True)
class _Graphs:
    """The graph, the same without TrAct, and where TrAct is."""

    subject: OnnxSubject
    plain: ir.Model
    located: LocatedOnnx
    treated: tuple[TreatedCall, ...]
    problems: tuple[str, ...]


def _read(model: onnx.ModelProto | ir.Model | str | os.PathLike[str]) -> _Graphs:
    subject = read_subject(model)
    if not subject.is_training:
        located = locate(subject.model, subject.trainable, ())
        return _Graphs(subject, subject.model, located, (), ())
    plain, present = without_tract(subject.model)
    located = locate(subject.model, subject.trainable, subject.frozen, present)
    records = [record for record, _ in located.eligible]
    treated, problems = treated_calls(subject.model, plain, records)
    problems = (
        *problems,
        *wiring_problems(treated),
        *manifest_problems(subject.manifest, present, records),
    )
    return _Graphs(subject, plain, located, treated, problems)


def _chosen(run: OnnxRuns) -> dict[str, Form]:
    forms = {call.record.node: chosen_form(call, run.rewritten.values) for call in run.treated}
    return {node: form for node, form in forms.items() if form is not None}


def _shapes(run: OnnxRuns, chosen: Mapping[str, Form]) -> Shapes:
    """Dtype and shape of what TrAct's operators computed on the batch."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for call in run.treated:
        form = chosen[call.record.node]
        names = [str(value.name) for node in form.nodes for value in node.outputs]
        values = run_form(run.model, call, run.rewritten.values, names, form)
        shapes |= {name: (array.dtype.name, array.shape) for name, array in values.items()}
    return shapes


def _open_sizes(subject: OnnxSubject, batch: OnnxBatch) -> dict[str, int]:
    """What the open sizes of the graph's inputs were in the batch."""
    return {
        wanted: size
        for spec in subject.inputs
        for wanted, size in zip(spec.shape, batch.feeds[spec.name].shape, strict=True)
        if isinstance(wanted, str)
    }


def _verification(graphs: _Graphs, run: OnnxRuns | None) -> Verification:
    if run is not None:
        return replace(verify_runs(run, graphs.problems), lost=graphs.problems)
    graph = graphs.subject.model.graph
    lost = graphs.problems
    reason = "every gradient in this training graph is the plain one"
    if not graphs.subject.is_training:
        reason = "this is a forward graph, which has no gradients"
    elif any(name.startswith(PREFIX) for name in graph.initializers):
        reason = (
            f"constants named {PREFIX}… are there, and no node says that the pass has made it. A "
            "tool that has written the file anew has dropped the nodes' metadata, or the nodes"
        )
        lost = (reason, *lost)
    problems = (f"No TrAct: {reason}", *graphs.problems)
    return Verification((), (), problems, "Nothing was run.", lost)


def _notes(graphs: _Graphs, run: OnnxRuns | None) -> tuple[str, ...]:
    if not graphs.subject.is_training:
        return (_FORWARD,)
    if not graphs.treated:
        return ("No call has TrAct, so that nothing was run",)
    if run is None:
        return ("Nothing was run: rows and shapes are those that the graph itself tells",)
    notes = [run.batch.note] if run.batch.note else []
    manifest = graphs.subject.manifest
    if manifest is not None and manifest.precision != "float32":
        notes.append(f"Training rounds large products to {manifest.precision}; here nothing does")
    return tuple(notes)
