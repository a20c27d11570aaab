"""Records in words and numbers, the same in every rendering; and the verdict in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.records import (
    Check,
    LayerReport,
    LayerStatistics,
    SourceLine,
    Verification,
)
from tract_fx.passes.records import InputLayer

# Control characters act on a terminal; those and lone surrogates are not allowed in XML.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# No layer is called so, and a name keeps its small letter.
_BEGINNINGS = frozenset(
    "a all an drawn each for in it its measured named neither no none nothing of on only several "
    "that the there this two what with without".split()
)
KINDS = {"graph": "torch.fx graph", "module": "eager model", "onnx": "ONNX graph"}
"""What each kind of inspection is of."""

_SEPARATORS = r"[/\\]"


@dataclass(frozen=True)
class Verdict:
    """The answer that a reader looks for first.

    Attributes:
        state: What to mark it with.
        headline: The answer, without a full stop.
        reasons: The numbers behind it, a sentence each, the gravest first.
    """

    state: Literal["right", "wrong", "open"]
    headline: str
    reasons: tuple[str, ...]

    @property
    def symbol(self) -> str:
        """A mark that does not rely on colour."""
        return {"right": "✔", "wrong": "✘", "open": "○"}[self.state]


def verdict(inspection: Inspection) -> Verdict:
    """Say whether the model trains with TrAct's gradient."""
    verification = inspection.verification
    if verification is not None:
        return _verified(inspection, verification)
    if any(layer.taken for layer in inspection.layers):
        reason = "No gradient was compared with the float64 definition: that takes a batch and "
        return Verdict("open", "Not verified", (f"{reason}verify=True",))
    if inspection.layers:
        reason = f"On the input: {', '.join(_names(inspection.layers))}"
    else:
        reason = "No convolution or linear layer that it could be put on reads the model's input"
    return Verdict("open", "TrAct is on no layer", (reason,))


def summary(inspection: Inspection) -> str:
    """An inspection in a few lines: the verdict, its first reason, the layers, how to see more."""
    found = verdict(inspection)
    lines = [
        f"Inspection of {inspection.subject} ({KINDS[inspection.kind]})",
        f"{found.symbol} {found.headline}",
    ]
    lines += [f"  {printable(reason)}" for reason in found.reasons[:1]]
    taken = [layer for layer in inspection.layers if layer.taken]
    lines += [
        f"  {printable(layer.record.name)}: {operation(layer.record)}, λ={layer.record.lambda_:g}, "
        f"{rows_and_columns(layer)}"
        for layer in taken[:3]
    ]
    if len(taken) > 3:
        lines.append(f"  and {plural(len(taken) - 3, 'call', 'calls')} more with TrAct")
    lines.append("print() shows all of it, save('page.html') draws it")
    return "\n".join(lines)


def _verified(inspection: Inspection, verification: Verification) -> Verdict:
    good = [w for w in verification.weights if w.operator.passed]
    bad = [w for w in verification.weights if not w.operator.passed]
    failed = [check for check in worst(verification.others) if not check.passed]
    reasons = [sentence(problem) for problem in verification.problems]
    for weight in [*bad, *good]:
        check = weight.operator
        reasons.append(
            f"{weight.parameter}: {number(check.error)} from the float64 definition, tolerance "
            f"{number(check.tolerance)}; the plain gradient is {number(weight.plain)} away"
        )
    if failed:
        named = ", ".join(f"{c.name} ({number(c.error)})" for c in failed[:3])
        rest = f" and {len(failed) - 3:,} more" if len(failed) > 3 else ""
        reasons.append(f"Not the plain model's: {named}{rest}")
    elif verification.others:
        top = worst(verification.others)[0]
        count = len(verification.others)
        things = plural(count, "output or other gradient", "outputs and other gradients")
        off = f"at most {number(top.error)} off" if top.error else "exactly"
        reasons.append(f"{things} as in the plain model, {off}")
    if verification.verdict == "right":
        headline = "TrAct's gradient is right"
    elif verification.verdict == "open":
        headline = f"Not verified: {_nothing_compared(inspection, verification)}"
    elif bad or verification.lost:
        headline = "TrAct's gradient is wrong"
    else:
        headline = "More than TrAct's gradient changed"
    return Verdict(verification.verdict, headline, tuple(reasons))


def _nothing_compared(inspection: Inspection, verification: Verification) -> str:
    """Say why a comparison is missing; the problems say it at length."""
    taken = [layer for layer in inspection.layers if layer.taken]
    if not taken:
        return "TrAct is on no layer"
    if verification.inconclusive:
        return "the comparison says nothing here"
    if verification.weights:
        return "not every gradient with TrAct could be compared"
    if all(layer.record.frozen for layer in taken):
        return f"{', '.join(_names(taken))} is frozen and has no gradient"
    return "there was no gradient with TrAct to compare"


def _names(layers: Sequence[LayerReport]) -> list[str]:
    return list(dict.fromkeys(layer.record.name for layer in layers))


def worst(checks: Sequence[Check]) -> list[Check]:
    """Sort comparisons."""

    def key(check: Check) -> tuple[bool, float]:
        if check.error == 0:
            return check.passed, 0.0
        ratio = check.error / check.tolerance if check.tolerance else math.inf
        return check.passed, -math.inf if math.isnan(ratio) else -ratio

    return sorted(checks, key=key)


def printable(text: str) -> str:
    """Take out of a name what a terminal would act on and XML does not allow."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, most: int) -> str:
    """Cut the middle out of a long name."""
    if len(text) <= most:
        return text
    start = (most - 1) // 3
    return f"{text[:start]}…{text[len(text) - (most - 1 - start) :]}"


def number(value: float | None) -> str:
    """Write a measured number."""
    if value is None:
        return "–"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, exponent, power = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa


def plural(count: int, one: str, many: str) -> str:
    """Count things."""
    return f"{count:,} {one if count == 1 else many}"


def sentence(text: str) -> str:
    """Begin a note with a capital, unless it begins with a name or a formula."""
    first = text.partition(" ")[0]
    return text[0].upper() + text[1:] if first in _BEGINNINGS else text


def shape(sizes: Sequence[int] | None) -> str:
    """Write a shape."""
    if sizes is None:
        return "unknown shape"
    return "×".join(map(str, sizes)) or "scalar"


def operation(record: InputLayer) -> str:
    """Say what a layer does to its input."""
    geometry, sizes = record.geometry, record.weight_shape
    groups = 1 if geometry is None else geometry.groups
    channels = "" if sizes is None or len(sizes) < 2 else f" {sizes[1] * groups} → {sizes[0]}"
    parts = [f"{record.op}{channels}"]
    if geometry is None:
        parts.append("geometry not known before running")
    elif geometry.kernel:
        parts.append(shape(geometry.kernel))
        if set(geometry.stride) != {1}:
            parts.append(f"stride {_per_dimension(geometry.stride)}")
        if any(geometry.flat_padding):
            parts.append(f"padding {_padding(geometry.padding)}")
        if set(geometry.dilation) != {1}:
            parts.append(f"dilation {_per_dimension(geometry.dilation)}")
        if groups > 1:
            parts.append(f"{groups} groups")
    return ", ".join(parts)


def measured(layer: LayerStatistics) -> list[tuple[str, str, str]]:
    """Say what was measured of a call."""

    def both(plain: float, tract: float) -> str:
        return f"{number(plain)} → {number(tract)}"

    found = []
    if values := layer.eigenvalues:
        zeros = f", and {layer.zeros:,} that are zero for want of rows" if layer.zeros else ""
        ends = f"{number(values[-1])} … {number(values[0])}"
        found.append(("Eigenvalues", ends, f"of the Gram, {len(values):,}{zeros}"))
    condition = both(layer.condition, layer.regularised_condition)
    found.append(("Condition number", condition, "with λ added"))
    found.append(("Gradient norm", both(layer.plain_norm, layer.tract_norm), "plain → TrAct"))
    found.append(("Cosine", number(layer.cosine), "between both gradients"))
    if layer.images:
        shares = both(layer.plain_correlation, layer.tract_correlation)
        found.append(("Contrast and share", shares, "correlation in the update, plain → TrAct"))
    ends = f"from {number(layer.minimum)} to {number(layer.maximum)}"
    return [*found, ("Input", f"{number(layer.mean)} ± {number(layer.std)}", ends)]


def _per_dimension(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else shape(values)


def _padding(pairs: Sequence[tuple[int, int]]) -> str:
    if all(before == after for before, after in pairs):
        return _per_dimension([before for before, _ in pairs])
    if len(set(pairs)) == 1:
        return f"{pairs[0][0]} before and {pairs[0][1]} after"
    return " × ".join(f"({before}, {after})" for before, after in pairs)


def rows_and_columns(layer: LayerReport) -> str:
    """Give the size of X."""
    rows = "rows not counted" if layer.rows is None else plural(layer.rows, "row", "rows")
    columns = "?" if layer.columns is None else plural(layer.columns, "column", "columns")
    groups = 1 if layer.record.geometry is None else layer.record.geometry.groups
    return f"{rows} × {columns}" + (f", in each of {groups} groups" if groups > 1 else "")


def join_path(names: Sequence[str], most: int = 6) -> str:
    """Write the way from the model's input to a node."""
    shown = list(names)
    if len(shown) > most:
        shown[most // 2 : len(shown) - most // 2] = [f"… {len(shown) - most // 2 * 2} more …"]
    return " → ".join(shown)


def place(source: SourceLine | None) -> str:
    """Name a line of the user's code in short."""
    if source is None:
        return ""
    return f"{re.split(_SEPARATORS, source.file)[-1]}:{source.line}"
