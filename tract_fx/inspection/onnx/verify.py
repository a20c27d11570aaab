"""Compare what an ONNX training graph computed with TrAct's definition and with the plain graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tract_fx.artifacts.manifest import Manifest
from tract_fx.errors import FailedRunError
from tract_fx.importer.modes import random_operators
from tract_fx.inspection.comparison import NEGLIGIBLE, OTHER_TOLERANCE
from tract_fx.inspection.onnx.layers import chosen_form, forms_of
from tract_fx.inspection.onnx.runs import (
    GraphRun,
    OnnxRuns,
    run_form,
    run_gradients,
    run_with_terms,
)
from tract_fx.inspection.records import Check, Verification, WeightCheck
from tract_fx.inspection.verify import DISTINCT, OPERATOR_TOLERANCE
from tract_fx.passes.onnx_graph.provenance import provenance_of
from tract_fx.passes.onnx_graph.treated import TreatedCall
from tract_fx.passes.onnx_graph.values import subgraphs
from tract_fx.passes.records import InputLayer
from tract_fx.preconditioner.solve import MAX_FLOAT32_AMPLIFICATION
from tract_fx.reference.distance import norm, relative_error
from tract_fx.reference.observed import ObservedCall
from tract_fx.reference.onnx_calls import from_weight_layout, observe_call, to_weight_layout

_TOLERANCE = OPERATOR_TOLERANCE[torch.float32]
_SAME = OTHER_TOLERANCE[torch.float32]
_NEGLIGIBLE = NEGLIGIBLE[torch.float32]

_FEW_ROWS = 256
_MOST_COLUMNS = 2048
"""Sizes within which the form is tried that the batch itself did not choose: it takes O(n³)."""


def wiring_problems(treated: Sequence[TreatedCall]) -> tuple[str, ...]:
    """Look whether TrAct's results are read where the plain gradients were."""
    problems = []
    for call in treated:
        name = call.record.name
        around = [n for n in call.plain.consumers() if provenance_of(n) is None]
        for node in dict.fromkeys(n for n in around if not _lies_in(n, call)):
            problems.append(
                f"{node.op_type} {node.name!r} reads the plain gradient of {name}, past TrAct"
            )
        if not call.result.uses() and not call.result.is_graph_output():
            problems.append(f"nothing reads TrAct's gradient of {name}")
    return tuple(problems)


def _lies_in(node: ir.Node, call: TreatedCall) -> bool:
    """Whether a node lies in a branch of one that the pass made."""
    return any(node.graph is graph for made in call.nodes for graph in subgraphs(made))


def manifest_problems(
    manifest: Manifest | None, present: Mapping[str, float], records: Sequence[InputLayer]
) -> tuple[str, ...]:
    """Compare the calls with TrAct with those that an export has written down."""
    frozen = {record.node for record in records if record.frozen}
    problems = []
    for layer in () if manifest is None else manifest.layers:
        if layer.node in frozen:
            continue
        found = present.get(layer.node)
        if found is None:
            problems.append(f"the manifest has TrAct on {layer.name}, and the graph has not")
        elif not math.isclose(found, layer.lambda_, rel_tol=1e-6):
            problems.append(
                f"the manifest has λ = {layer.lambda_:g} on {layer.name}, and the graph {found:g}"
            )
    return tuple(problems)


def verify_runs(runs: OnnxRuns, problems: Sequence[str]) -> Verification:
    """Compare gradients and outputs with the definition in float64 and with the plain graph."""
    before = run_gradients(runs.plain, runs.batch)
    weights, found = _weight_checks(runs, before)
    forms, notes_of_forms = _form_checks(runs)
    others = (*_term_checks(runs), *forms, *_other_checks(runs, before))
    notes = [
        f"Run on {runs.batch.shapes}, with the graph's own loss",
        runs.batch.note,
        *notes_of_forms,
    ]
    if random_operators(runs.model):
        notes.append("Random operators, such as dropout, drew the same numbers in both graphs")
    note = ". ".join(text for text in notes if text)
    return Verification(weights, others, (*problems, *found), f"{note}.")


def _treated_parameters(runs: OnnxRuns) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p for call in runs.treated for p in call.record.weight))


def _weight_checks(
    runs: OnnxRuns, before: GraphRun
) -> tuple[tuple[WeightCheck, ...], tuple[str, ...]]:
    """Put float64's numbers into the plain graph, and compare the parameters' gradients."""
    names = _treated_parameters(runs)
    exact, own, errors = {}, {}, {}
    for treated, call in zip(runs.treated, runs.calls, strict=True):
        assert call.incoming is not None and call.own_gradient is not None
        expected = call.precondition(call.incoming)
        result = to_weight_layout(treated.call, runs.rewritten.values[str(treated.result.name)])
        errors[treated.record.node] = relative_error(result, expected)
        exact[treated.term] = _as_term(treated, expected)
        own[treated.term] = _as_term(treated, call.precondition(call.own_gradient))
    wanted = run_with_terms(runs.plain, runs.batch, exact, names)
    end_to_end = run_with_terms(runs.plain, runs.batch, own, names)
    checks, problems = [], []
    for name in names:
        found, plain = runs.rewritten.gradients.get(name), before.gradients.get(name)
        if found is None or plain is None or not plain.any():
            problems.append(_nothing_to_compare(name, found))
            continue
        nodes = tuple(t.record.node for t in runs.treated if name in t.record.weight)
        distance = relative_error(plain, wanted[name])
        # A term's own error, too: in a sum with others it would look smaller.
        operator = np.max([relative_error(found, wanted[name]), *(errors[node] for node in nodes)])
        tolerance = min(_TOLERANCE, DISTINCT * distance)
        if distance <= _TOLERANCE:
            problems.append(
                f"{name}: on this batch the plain gradient is within {distance:.1e} of TrAct's, so "
                "that the comparison can't tell them apart. Verify on another batch"
            )
        checks.append(
            WeightCheck(
                parameter=name,
                nodes=nodes,
                operator=Check(f"gradient of {name}", float(operator), tolerance),
                end_to_end=relative_error(found, end_to_end[name]),
                floor=relative_error(wanted[name], end_to_end[name]),
                plain=distance,
            )
        )
    return tuple(checks), tuple(problems)


def _nothing_to_compare(name: str, found: np.ndarray | None) -> str:
    if found is None:
        return f"{name}: the graph collects no gradient of it, and the plain one does"
    return (
        f"{name}: its gradient is zero on this batch, and there is nothing to compare. Verify on "
        "another batch"
    )


def _as_term(treated: TreatedCall, gradient: Tensor) -> np.ndarray:
    dtype = ir.DataType.FLOAT if treated.plain.dtype is None else treated.plain.dtype
    return from_weight_layout(treated.call, gradient).astype(dtype.numpy())


def _term_checks(runs: OnnxRuns) -> list[Check]:
    """Make sure that what TrAct starts from is this call's own gradient, and no other's."""
    checks = []
    for call in runs.calls:
        assert call.incoming is not None and call.own_gradient is not None
        error = relative_error(call.incoming, call.own_gradient)
        checks.append(Check(f"plain gradient of {call.record.node}", error, _TOLERANCE))
    return checks


def _form_checks(runs: OnnxRuns) -> tuple[list[Check], list[str]]:
    """Run the forms that the graph keeps for other batches, apart from the graph."""
    checks, notes = [], []
    for treated, call in zip(runs.treated, runs.calls, strict=True):
        forms, read = forms_of(treated), runs.rewritten.values
        ran = chosen_form(treated, read)
        by_size = len({form.in_float64 for form in forms}) < len(forms)
        resized = _resized(treated, call, read) if by_size else None
        if by_size and resized is None and call.row_count < call.columns:
            form = f"The form of {treated.record.node} for {call.columns} rows and more"
            notes.append(f"{form}, an inverse of that size, was not tried")
        batches = [] if resized is None else [(resized, "")]
        if ran is not None and any(form.in_float64 for form in forms):
            for values in (read, *(values for values, _ in batches)):
                scaled = _rescaled(treated, call, values, up=not ran.in_float64)
                if scaled is not None:
                    words = "standardised" if ran.in_float64 else "not standardised"
                    batches.append((scaled, f", {words}"))
        for values, kind in batches:
            other = observe_call(treated, values)
            assert other.own_gradient is not None and other.incoming is not None
            incoming = other.own_gradient.to(other.incoming.dtype)
            values[str(treated.plain.name)] = from_weight_layout(treated.call, incoming)
            name = f"TrAct on {treated.record.node} with {other.row_count} rows{kind}"
            error = math.nan
            try:
                results = run_form(runs.model, treated, values, [treated.term])
                found = to_weight_layout(treated.call, results[treated.term])
                error = relative_error(found, other.precondition(incoming))
            except FailedRunError as failure:
                notes.append(f"{name}: {failure.found}")
            checks.append(Check(name, error, _TOLERANCE))
    return checks, notes


def _rescaled(
    treated: TreatedCall, call: ObservedCall, values: Mapping[str, np.ndarray], *, up: bool
) -> dict[str, np.ndarray] | None:
    """Scale the input to where float32 is far too coarse, or good enough; None for all zero."""
    name, lambda_ = str(treated.call.input.name), treated.record.lambda_
    x = values[name]
    mean_square = float(np.mean(np.square(x, dtype=np.float64))) if x.size else 0.0
    assert lambda_ is not None
    if not 0 < mean_square < math.inf:
        return None
    limit = MAX_FLOAT32_AMPLIFICATION / float(np.finfo(np.float32).eps)
    wanted = limit * (1000 if up else 0.1) * lambda_ / call.columns
    scaled = (x * math.sqrt(wanted / mean_square)).astype(x.dtype)
    plain, dz = str(treated.plain.name), str(treated.output_gradient.name)
    return {name: scaled, dz: values[dz], plain: values[plain]}


def _resized(
    treated: TreatedCall, call: ObservedCall, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """Cut or repeat the images, so that there are fewer rows than columns or the other way round.

    None where one image alone makes as many rows as there are columns, so that the other form never
    runs, and where it would take too long.
    """
    axis = 1 if treated.call.input_transposed else 0
    x, dz = str(treated.call.input.name), str(treated.output_gradient.name)
    images = values[x].shape[axis]
    per_image = max(1, call.row_count // images)
    if call.row_count >= call.columns:
        count = min((call.columns - 1) // per_image, max(1, _FEW_ROWS // per_image))
    else:
        count = -(-call.columns // per_image) if call.columns <= _MOST_COLUMNS else 0
    if not count or values[x].ndim < 2:
        return None
    index = np.arange(count) % images
    return {
        x: np.ascontiguousarray(values[x].take(index, axis)),
        dz: np.ascontiguousarray(values[dz].take(index, 0)),
        str(treated.plain.name): values[str(treated.plain.name)],
    }


def _other_checks(runs: OnnxRuns, before: GraphRun) -> list[Check]:
    """Outputs, and the gradients that TrAct leaves alone, against the plain graph."""
    checks = [
        Check(f"output {name}", relative_error(value, before.outputs[name]), _SAME)
        for name, value in runs.rewritten.outputs.items()
    ]
    largest = max((norm(value) for value in before.gradients.values()), default=0.0)
    for name, value in runs.rewritten.gradients.items():
        if name not in _treated_parameters(runs):
            error = relative_error(value, before.gradients[name], _NEGLIGIBLE * largest)
            checks.append(Check(f"gradient of {name}", error, _SAME))
    return checks
