"""Whether a rewritten model computes TrAct's gradient, and changes nothing else.

For every parameter p that takes part in a call with TrAct, the gradient has to be

    plain gradient of p  +  Σ over these calls  J ((gW (XᵀX/R + λI)⁻¹) - gW)

where J leads from the gradient of the call's effective weight to that of p. gW is measured in the
plain model, and preconditioned in float64 by `ObservedCall`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tract_fx.inspection.batch import dtype_name
from tract_fx.inspection.comparison import OTHER_TOLERANCE, coarsest, compare_runs
from tract_fx.inspection.records import Check, Verification, WeightCheck
from tract_fx.inspection.runs import Runs, Terms
from tract_fx.passes.records import InputLayer
from tract_fx.reference.distance import relative_error
from tract_fx.reference.observed import ObservedCall

OPERATOR_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}
"""Largest error of the preconditioner, by the dtype of the weight's gradient. The library's float32
is good to 2e-5 on standardised photographs; past an a-priori bound of 1e-3 it goes over to float64
on the CPU. In float64 it is the rounding times the bound of the condition where that is more, up to
1e-3. A half-precision gradient is rounded by up to 4e-3 when it is handed on."""

_WORST = 1e-3
"""What the tolerance in float64 stays below."""

DISTINCT = 0.1
"""Where the plain gradient itself is near TrAct's, the tolerance is this share of the distance: a
comparison that the plain gradient would pass says nothing."""

_UNITS = 4.0
"""Units of rounding, relative to the norm, by which two ways to compute one gradient may differ."""

_LOST = (
    "Apply tract_pass or tract_module last, after whatever retraces the model, or wraps or "
    "replaces its layers"
)


_Parts = list[tuple[ObservedCall, Terms]]
"""The calls with TrAct that give something to one parameter's gradient."""


def verify(
    runs: Runs, lost: Sequence[str] = (), untreated: Sequence[InputLayer] = ()
) -> Verification:
    """Compare what the rewritten model gave with float64 and with the plain model."""
    weights, wrong = [], []
    for name, parts in _gather(runs).items():
        check, problem = _check_weight(name, parts, runs)
        if check is not None:
            weights.append(check)
        wrong += [] if problem is None else [problem]
    names = {check.parameter for check in weights}
    compared = compare_runs(runs.rewritten, runs.plain, runs.autocast, names)
    differing, says_nothing = _differing(runs, weights, compared, wrong)
    absent = [
        *_missing(runs, lost),
        *_without_gradient(runs, weights),
        *_hooked(runs, weights),
    ]
    notes = [runs.note, *_remarks(runs, untreated), *_not_finite(runs)]
    others = (*compared[0], *compared[1])
    return Verification(
        weights=tuple(weights),
        others=others,
        problems=(*differing, *absent),
        note=". ".join(notes) + ".",
        lost=tuple(lost),
        inconclusive=says_nothing and not absent,
    )


def _treated(runs: Runs) -> dict[str, InputLayer]:
    """The layers with TrAct, by name."""
    return {call.record.name: call.record for call in runs.calls}


def _differing(
    runs: Runs,
    weights: Sequence[WeightCheck],
    compared: tuple[Sequence[Check], Sequence[Check]],
    wrong: Sequence[str],
) -> tuple[Sequence[str], bool]:
    # The problems, and whether they say that the comparison shows nothing.
    # What `wrong` says of weights holds for a model that repeats itself, and for a loss that TrAct
    # leaves as it is.
    outputs, gradients = compared
    if _all_passed([*(w.operator for w in weights), *outputs, *gradients]):
        return wrong, False
    repeated = compare_runs(runs.plain_again(), runs.plain, runs.autocast)
    # An error that is not a number tells nothing, but that the batch or the model is not finite.
    again = [c.name for checks in repeated for c in checks if not (c.passed or math.isnan(c.error))]
    if again:
        problem = (
            "The model does not repeat itself: run again from the same state, the plain model "
            f"differs from itself ({_first(again)}). It has random numbers or state "
            "of its own, in a closure or in an object that is no module, say, and nothing can be "
            "compared. Make it repeat itself (a fixed seed, evaluation mode) to verify it."
        )
        return [problem], True
    if not _all_passed(outputs):
        return wrong, False
    with_tract, without = runs.rewritten.loss, runs.plain.loss
    tolerance = OTHER_TOLERANCE[coarsest(runs.autocast, *runs.plain.outputs.values())]
    if abs(with_tract - without) > tolerance * abs(without):
        problem = (
            f"The loss is {with_tract:.6g} with TrAct and {without:.6g} without, for equal "
            "outputs: it uses a gradient that TrAct changes (create_graph=True with the gradient "
            "of a weight under TrAct, say). The gradients then differ as they should, and the "
            "comparison shows nothing. Verify with a loss without that term."
        )
        return [problem], True
    second_order = not all(call.first_order for call in runs.calls)
    if second_order and not _all_passed(gradients):
        problem = (
            "The loss differentiates a gradient (create_graph=True). If that is the gradient of a "
            "weight under TrAct, other gradients differ as they should, and the comparison shows "
            "nothing: verify with a loss without that term. Else they are wrong."
        )
        return [*wrong, problem], False
    return wrong, False


def _all_passed(checks: Sequence[Check]) -> bool:
    return all(check.passed for check in checks)


def _without_gradient(runs: Runs, weights: Sequence[WeightCheck]) -> Iterator[str]:
    checked = {node for check in weights for node in check.nodes}
    for layer in _treated(runs).values():
        nodes = {c.record.node for c in runs.calls if c.record.name == layer.name}
        if not layer.frozen and checked.isdisjoint(nodes):
            yield (
                f"{layer}: no gradient reaches its weight on this batch, and there is nothing to "
                "compare. Give a loss that depends on it, or a batch on which it does."
            )


def _hooked(runs: Runs, weights: Sequence[WeightCheck]) -> Iterator[str]:
    for check in weights:
        if check.parameter in runs.unrun_hooks:
            yield (
                f"{check.parameter}: a hook of register_post_accumulate_grad_hook is on it, which "
                "only .backward() runs, and which may change the gradient or step an optimizer. It "
                "was not run and is not verified. Inspect before the hook is put on."
            )


def _remarks(runs: Runs, untreated: Sequence[InputLayer]) -> Iterator[str]:
    """What is right, or may be meant, and has to be known."""
    treated = _treated(runs)
    for layer in treated.values():
        if layer.frozen:
            yield f"{layer.name} is frozen: it has no gradient to verify"
    nodes = {call.record.node for call in runs.calls}
    missing = [r for r in untreated if not r.frozen and r.node not in nodes]
    if treated and missing:
        again = [
            f"{r.name} in its call {r.node!r}" if r.name in treated else r.name for r in missing
        ]
        layers = list(dict.fromkeys([*treated, *(r.name for r in missing)]))
        yield (
            f"Without TrAct, the input is also read by {', '.join(dict.fromkeys(again))}: if that "
            f"is not meant, apply the pass with layers={layers}"
        )
    if runs.unrun_hooks:
        yield (
            "Hooks of register_post_accumulate_grad_hook, which only .backward() runs, were not "
            f"run: they are on {_first(runs.unrun_hooks)}"
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _gather(runs: Runs) -> dict[str, _Parts]:
    """Sort what the calls with TrAct give by parameter."""
    result: dict[str, _Parts] = {}
    for call, terms in zip(runs.calls, runs.terms, strict=True):
        if terms is not None:
            for name in terms.plain:
                result.setdefault(name, []).append((call, terms))
    return result


def _check_weight(name: str, parts: _Parts, runs: Runs) -> tuple[WeightCheck | None, str | None]:
    """Compare one parameter's gradient; the comparison, and what is wrong beyond it."""
    plain, found = runs.plain.gradients[name], runs.rewritten.gradients.get(name)
    if plain is None or not plain.any():
        return None, None
    calls = [call for call, _ in parts]
    dtype = coarsest(None, plain, *(call.incoming for call in calls))
    rest = _rest(plain.double(), [terms.plain[name] for _, terms in parts], dtype)
    wanted = rest + sum(terms.tract[name] for _, terms in parts)
    plain_distance = _error(plain, wanted)
    error = math.inf if found is None else _error(found, wanted)
    condition = max(call.condition_bound for call in calls)
    tolerance = min(_tolerance(dtype, condition), DISTINCT * plain_distance)
    end_to_end = floor = None
    own = [terms.own[name] for _, terms in parts if terms.own is not None]
    if len(own) == len(parts):
        exact = rest + sum(own)
        end_to_end = math.inf if found is None else _error(found, exact)
        floor = _error(wanted, exact)
    check = WeightCheck(
        parameter=name,
        nodes=tuple(dict.fromkeys(call.record.node for call in calls)),
        operator=Check(f"gradient of {name}", error, tolerance),
        end_to_end=end_to_end,
        floor=floor,
        plain=plain_distance,
    )
    layers = ", ".join(dict.fromkeys(call.record.name for call in calls))
    return check, _problem(check, found, plain, dtype, layers)


def _error(found: Tensor, wanted: Tensor) -> float:
    return relative_error(found, wanted, agreeing="infinities")


def _tolerance(dtype: torch.dtype, condition: float) -> float:
    usual = OPERATOR_TOLERANCE[dtype]
    if dtype != torch.float64 or not math.isfinite(condition):
        return usual
    return max(usual, min(condition * torch.finfo(dtype).eps, _WORST))


def _rest(plain: Tensor, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What the plain gradient has from other uses than calls with TrAct; zero if it is rounding."""
    rest = plain - sum(parts)
    size = float(sum(torch.linalg.vector_norm(part) for part in parts))
    rounding = _UNITS * torch.finfo(dtype).eps * len(parts) * size
    return torch.zeros_like(rest) if torch.linalg.vector_norm(rest) <= rounding else rest


def _problem(
    check: WeightCheck, found: Tensor | None, plain: Tensor, dtype: torch.dtype, layers: str
) -> str | None:
    """Say in words what a failed comparison shows, or one that shows nothing."""
    rounding = torch.finfo(dtype).eps
    if check.operator.passed and not check.plain <= _UNITS * rounding:
        return None
    if found is None:
        return (
            f"{check.parameter} of {layers}: the rewritten model gives it no gradient, and the "
            f"plain one does. {_LOST}."
        )
    if check.plain <= OPERATOR_TOLERANCE[dtype]:
        return (
            f"{check.parameter} of {layers}: on this batch the plain gradient is within "
            f"{check.plain:.1e} of TrAct's, so that the comparison can't tell them apart in "
            f"{dtype_name(dtype)}. Verify on another batch, or in float64."
        )
    if _error(found, plain) <= _UNITS * rounding:
        return (
            f"{check.parameter} of {layers}: its gradient is the plain one, TrAct's backward does "
            f"not run. {_LOST}."
        )
    return None


def _missing(runs: Runs, lost: Sequence[str]) -> list[str]:
    """Say which calls should have TrAct and have not."""
    problems = [
        f"{name}: the pass has marked it, and in this run it has no TrAct. Its layer was replaced, "
        "or given another forward method; or TrAct's node was taken out of the graph; or the model "
        "calls the layer under torch.no_grad(), does not call it, or calls another in its place "
        f"that it holds in a closure. {_LOST}."
        for name in lost
    ]
    if not runs.calls and not problems:
        problems.append(f"No call has TrAct: every gradient is the plain one. {_LOST}.")
    return problems


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
            yield f"Not finite in the model {model}: {_first(names)}"
