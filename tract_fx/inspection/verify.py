"""Whether a rewritten model computes TrAct's gradient, and changes nothing else.

For every parameter p that takes part in a call with TrAct, the gradient has to be

    plain gradient of p  +  Σ over these calls  J ((gW (XᵀX/R + λI)⁻¹) - gW)

where J leads from the gradient of the call's effective weight to that of p. gW is measured in the
plain model, and preconditioned in float64 by `ObservedCall`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from tract_fx.inspection.observed import ObservedCall
from tract_fx.inspection.records import Check, Verification, WeightCheck
from tract_fx.inspection.runs import Chain, Runs
from tract_fx.modules import TractLayer
from tract_fx.passes.fx_graph import PROVENANCE
from tract_fx.passes.fx_graph.calls import is_precondition_grad, match_function
from tract_fx.passes.records import InputLayer

__all__ = ["lost_marks", "verify"]

OPERATOR_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}
"""Largest error of the preconditioner, by the dtype of the weight's gradient. The library's float32
is good to 2e-5 on standardised photographs; past an a-priori bound of 1e-3 it goes over to float64
on the CPU. float64 keeps 1e-8 up to a condition of 1e8. A half-precision gradient is rounded by up
to 4e-3 when it is handed on."""

DISTINCT = 0.1
"""Where the plain gradient itself is near TrAct's, the tolerance is this share of the distance: a
comparison that the plain gradient would pass says nothing."""

OTHER_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 5e-2,
}
"""Largest error of outputs and other gradients. On the CPU both models run the same kernels in the
same order and agree to the last bit; atomic sums on CUDA differ by rounding."""

NEGLIGIBLE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
"""Share of the largest gradient below which another is rounding (of the bias before a BatchNorm,
say), and its error is relative to that share."""

_UNITS = 4.0
"""Units of rounding, relative to the norm, by which two ways to compute one gradient may differ."""

_LOST = (
    "Apply tract_pass or tract_module last, after whatever retraces the model, or wraps or "
    "replaces its layers"
)


@dataclass
class _Terms:
    """What the calls with TrAct give to one parameter's gradient, in float64."""

    nodes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    plain: list[Tensor] = field(default_factory=list)
    tract: list[Tensor] = field(default_factory=list)
    own: list[Tensor | None] = field(default_factory=list)


def lost_marks(model: nn.Module, records: Sequence[InputLayer]) -> tuple[str, ...]:
    """Find traces of TrAct on calls that do not have it any more.

    Args:
        model: A model that may have been rewritten, and changed since.
        records: The calls with TrAct that locating finds in it.

    Returns:
        Names of nodes that carry the pass's mark or call a TrAct layer, or for an eager model of
        modules that are TrAct layers, without being among the records.
    """
    if not isinstance(model, fx.GraphModule):
        found = {model.get_submodule(r.module) for r in records if r.module is not None}
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, TractLayer)]
        return tuple(name for name, module in layers if module not in found)
    treated = {record.node for record in records}
    called = [call for node in model.graph.nodes for call in _marked_calls(model, node)]
    return tuple(dict.fromkeys(name for name in called if name not in treated))


def _marked_calls(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """Tell the calls that a node marks: itself, or those whose weight it is."""
    # Exporting a rewritten graph spreads a module's mark over all that its call is traced to.
    marked = PROVENANCE in (node.meta.get("custom") or {})
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        tract_layer = isinstance(module, TractLayer) and node.kwargs.get("tract", True)
        return [node.name] if marked or tract_layer else []
    if not marked or match_function(node) is not None:
        return [node.name] if marked else []
    calls = [call for call in map(match_function, node.users) if call is not None]
    names = [call.node.name for call in calls if node in (call.weight, call.precondition)]
    return names or ([node.name] if is_precondition_grad(node) else [])


def verify(runs: Runs, expected: Sequence[InputLayer], lost: Sequence[str] = ()) -> Verification:
    """Compare what the rewritten model gave with float64 and with the plain model.

    Args:
        runs: Both models' runs on a batch.
        expected: The calls that should have TrAct.
        lost: What `lost_marks` found.

    Returns:
        The verdict and what it rests on.
    """
    terms = _gather(runs)
    weights, problems, notes = [], _missing(runs, expected, lost), [runs.note]
    for name, of_parameter in terms.items():
        check, problem = _check_weight(name, of_parameter, runs)
        if check is not None:
            weights.append(check)
        problems += [] if problem is None else [problem]
    checked = {node for check in weights for node in check.nodes}
    treated = {call.record.name: call.record for call in runs.calls if _has_tract(call.record)}
    for layer in treated.values():
        nodes = {c.record.node for c in runs.calls if c.record.name == layer.name}
        if layer.frozen:
            notes.append(f"{layer.name} is frozen: it has no gradient to verify")
        elif checked.isdisjoint(nodes):
            problems.append(
                f"{layer}: no gradient reaches its weight on this batch, and there is nothing to "
                "compare. Give a loss that depends on it, or a batch on which it does."
            )
    others = tuple(_others(runs, {check.parameter for check in weights}))
    notes += _not_finite(runs)
    return Verification(tuple(weights), others, tuple(problems), ". ".join(notes) + ".")


def _has_tract(record: InputLayer) -> bool:
    return record.lambda_ is not None


def _gather(runs: Runs) -> dict[str, _Terms]:
    """Sort what the calls with TrAct give by parameter."""
    result: dict[str, _Terms] = {}
    for call, chain in zip(runs.calls, runs.chains, strict=True):
        if call.incoming is None or not _has_tract(call.record):
            continue
        plain = chain(call.incoming)
        tract = chain(call.precondition(call.incoming))
        own = _own(call, chain)
        for name, part in plain.items():
            terms = result.setdefault(name, _Terms())
            terms.nodes.append(call.record.node)
            terms.names.append(call.record.name)
            terms.dtype = _coarser(terms.dtype, call.incoming.dtype)
            terms.plain.append(part)
            terms.tract.append(tract[name])
            terms.own.append(None if own is None else own[name])
    return result


def _own(call: ObservedCall, chain: Chain) -> Mapping[str, Tensor] | None:
    """What the call gives with gW in float64 as well; None where gW has other terms."""
    if not call.first_order or call.own_gradient is None:
        return None
    return chain(call.precondition(call.own_gradient))


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def _check_weight(name: str, terms: _Terms, runs: Runs) -> tuple[WeightCheck | None, str | None]:
    """Compare one parameter's gradient; the comparison, and what is wrong beyond it."""
    plain, found = runs.plain.gradients[name], runs.rewritten.gradients.get(name)
    if plain is None or not plain.any():
        return None, None
    dtype = _coarser(terms.dtype, plain.dtype)
    rest = _rest(plain.double(), terms.plain, dtype)
    wanted = rest + sum(terms.tract)
    distance = _distance(plain, wanted)
    error = math.inf if found is None else _distance(found, wanted)
    tolerance = min(OPERATOR_TOLERANCE[dtype], DISTINCT * distance)
    end_to_end = floor = None
    own = [part for part in terms.own if part is not None]
    if len(own) == len(terms.own):
        exact = rest + sum(own)
        end_to_end = math.inf if found is None else _distance(found, exact)
        floor = _distance(wanted, exact)
    check = WeightCheck(
        parameter=name,
        nodes=tuple(dict.fromkeys(terms.nodes)),
        operator=Check(f"gradient of {name}", error, tolerance),
        end_to_end=end_to_end,
        floor=floor,
        plain=distance,
    )
    return check, _problem(check, found, plain, dtype, terms)


def _rest(plain: Tensor, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What the plain gradient has from other uses than calls with TrAct; zero if it is rounding."""
    rest = plain - sum(parts)
    size = float(sum(torch.linalg.vector_norm(part) for part in parts))
    rounding = _UNITS * torch.finfo(dtype).eps * len(parts) * size
    return torch.zeros_like(rest) if torch.linalg.vector_norm(rest) <= rounding else rest


def _problem(
    check: WeightCheck, found: Tensor | None, plain: Tensor, dtype: torch.dtype, terms: _Terms
) -> str | None:
    """Say in words what a failed comparison shows, or one that shows nothing."""
    rounding = torch.finfo(dtype).eps
    if check.operator.passed and not check.plain <= _UNITS * rounding:
        return None
    layers = ", ".join(dict.fromkeys(terms.names))
    if found is None:
        return (
            f"{check.parameter} of {layers}: the rewritten model gives it no gradient, and the "
            f"plain one does. {_LOST}."
        )
    if check.plain <= OPERATOR_TOLERANCE[dtype]:
        return (
            f"{check.parameter} of {layers}: on this batch the plain gradient is within "
            f"{check.plain:.1e} of TrAct's, so that the comparison can't tell them apart in "
            f"{str(dtype).removeprefix('torch.')}. Verify on another batch, or in float64."
        )
    if _distance(found, plain) <= _UNITS * rounding:
        return (
            f"{check.parameter} of {layers}: its gradient is the plain one, TrAct's backward does "
            f"not run. {_LOST}."
        )
    return None


def _missing(runs: Runs, expected: Sequence[InputLayer], lost: Sequence[str]) -> list[str]:
    """Say which calls should have TrAct and have not."""
    treated = {call.record.node for call in runs.calls if _has_tract(call.record)}
    problems = [
        f"{record}: it should have TrAct and has not. {_LOST}."
        for record in expected
        if record.node not in treated
    ]
    problems += [
        f"{name}: the pass has marked it, but TrAct is not on it any more: its layer was replaced, "
        f"or given another forward method. {_LOST}."
        for name in lost
    ]
    if not treated and not problems:
        problems.append(f"No call has TrAct: every gradient is the plain one. {_LOST}.")
    return problems


def _others(runs: Runs, weights: set[str]) -> Iterator[Check]:
    """Compare outputs and all gradients that TrAct must not change with the plain model's."""
    for name in dict.fromkeys([*runs.plain.outputs, *runs.rewritten.outputs]):
        one, other = runs.rewritten.outputs.get(name), runs.plain.outputs.get(name)
        tolerance = OTHER_TOLERANCE[_dtype(runs, one, other)]
        yield Check(name, _error(one, other, 0.0), tolerance)
    gradients = runs.rewritten.gradients, runs.plain.gradients
    inputs = runs.rewritten.input_gradients, runs.plain.input_gradients
    norms = [_norm(g) for of in (gradients[1], inputs[1]) for g in of.values() if g is not None]
    largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    for words, (found, wanted) in (("", gradients), ("the input ", inputs)):
        for name in dict.fromkeys([*wanted, *found]):
            one, other = found.get(name), wanted.get(name)
            if name in weights and not words:
                continue
            if one is None and other is None:
                continue
            dtype = _dtype(runs, one, other)
            error = _error(one, other, NEGLIGIBLE[dtype] * largest)
            yield Check(f"gradient of {words}{name}", error, OTHER_TOLERANCE[dtype])


def _dtype(runs: Runs, *tensors: Tensor | None) -> torch.dtype:
    """The coarsest dtype that took part."""
    dtype = runs.autocast or torch.float64
    for tensor in tensors:
        dtype = dtype if tensor is None else _coarser(dtype, tensor.dtype)
    return dtype


def _error(found: Tensor | None, wanted: Tensor | None, negligible: float) -> float:
    """Distance relative to the reference, or to `negligible` where that is larger."""
    if found is None or wanted is None:
        present = found if found is not None else wanted
        assert present is not None
        found = torch.zeros_like(present) if found is None else found
        wanted = torch.zeros_like(present) if wanted is None else wanted
    if found.shape != wanted.shape:
        return math.inf
    return _distance(found, wanted, negligible)


def _distance(found: Tensor, wanted: Tensor, negligible: float = 0.0) -> float:
    """‖found - wanted‖ / ‖wanted‖ in float64; entries that are equal count as such if infinite."""
    one, other = found.double(), wanted.double()
    difference = torch.where(one == other, 0.0, one - other)
    distance = float(torch.linalg.vector_norm(difference))
    scale = max(_norm(other), negligible)
    if scale == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / scale


def _norm(tensor: Tensor) -> float:
    """Norm of the finite entries."""
    values = tensor.double()
    return float(torch.linalg.vector_norm(torch.where(values.isfinite(), values, 0.0)))


def _not_finite(runs: Runs) -> Iterator[str]:
    """Say which values are not finite."""
    for model, run in (("with TrAct", runs.rewritten), ("plain", runs.plain)):
        values = {
            **run.outputs,
            **{f"the gradient of {n}": g for n, g in run.gradients.items()},
            **{f"the gradient of the input {n}": g for n, g in run.input_gradients.items()},
        }
        names = [n for n, v in values.items() if v is not None and not v.isfinite().all()]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"Not finite in the model {model}: {', '.join(names[:3])}{more}"
